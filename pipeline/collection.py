"""The runs of a sweep joined: what was picked for each, and what came out.

A run that is missing, damaged, stale, or of other data than the others is named, and never left out
in silence. Nothing is chosen here: all runs were judged by the same gate examples, so the best of
them passes more often than it should.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pipeline.report import baseline, busy_note, markdown_table, shape
from pipeline.sweep import Standing, members, plan_hash, standing
from pipeline.writing import write_text

SCHEMA: Final = 1
Json = Mapping[str, Any]


def collect(folder: Path) -> dict[str, Any]:
    """Return the joined runs of a sweep, and write sweep.json and sweep.md.

    Raises:
        RecipeError: there is no plan, or it was changed.
    """
    runs = members(folder)
    found = _of_one_kind([standing(run) for run in runs])
    joined: dict[str, Any] = {
        "schema": SCHEMA,
        "plan": plan_hash(folder),
        "runs": [],
        "missing": [],
        "notes": _notes([each.report for each in found if each.report is not None]),
    }
    for run, each in zip(runs, found, strict=True):
        named = {"index": run.index, "folder": str(run.folder), "picked": dict(run.picked)}
        if each.report is None:
            joined["missing"].append(named | {"state": each.state, "reason": each.reason})
        else:
            joined["runs"].append(named | _result(each.report))
    text = json.dumps(joined, indent=1, allow_nan=False)
    write_text(folder / "sweep.json", text + "\n")
    write_text(folder / "sweep.md", markdown(joined))
    return joined


def _of_one_kind(found: Sequence[Standing]) -> list[Standing]:
    """Return how the runs stand, those of other data than the first one's as stale."""
    data = next((each.report["data"]["fingerprints"] for each in found if each.report), None)
    return [
        each
        if each.report is None or each.report["data"]["fingerprints"] == data
        else replace(
            each,
            state="stale",
            report=None,
            reason="found other data than those of the first run that is done; plan again into"
            " another folder",
        )
        for each in found
    ]


def _result(report: Json) -> dict[str, Any]:
    first, last = baseline(report), report["stages"][-1]
    metric = last["score"]["metric"]
    of_score = {f"{metric} drop", f"relative {metric} drop", f"{metric} ratio"}
    checks = [check for check in report["verdict"]["checks"] if check["what"] in of_score]
    return {
        "outcome": report["verdict"]["outcome"],
        "metric": metric,
        "score": last["score"]["value"],
        "baseline_score": first["score"]["value"],
        "loss": {key: checks[0][key] for key in ("what", "estimate", "low", "high")}
        if checks
        else None,
        "speedups": {shape(load): load["speedup"] for load in last["loads"]},
        "size_bytes": last["size_bytes"],
        "size_ratio": last["size_bytes"] / first["size_bytes"],
        "artifact": report["artifact"],
    }


def _notes(reports: Sequence[Json]) -> list[str]:
    """Return what has to be known of the figures."""
    notes = []
    candidates = {name for report in reports for name in report["ledger"].get("candidates", ())}
    if len(candidates) > 1:
        notes.append(
            f"the gate split has judged {len(candidates)} candidates: the verdict of the best of"
            " them is too good; to choose, use `secateur search`, or judge it once more on other"
            " examples"
        )
    places = {json.dumps([report["machine"][k] for k in ("cpu", "gpu")]) for report in reports}
    if len(places) > 1:
        notes.append(
            f"measured on {len(places)} kinds of machines: each speedup is against the baseline on"
            " its own, and they do not compare"
        )
    if busy := sum(bool(busy_note(report)) for report in reports):
        notes.append(f"{busy} of the runs were measured on a busy machine")
    return notes


def table(joined: Json, *, intervals: bool = True) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the runs that are done, with intervals or without."""
    runs = joined["runs"]
    places = list(dict.fromkeys(place for run in runs for place in run["picked"]))
    loads = list(runs[0]["speedups"]) if runs else []
    header = ["run", *(place.removeprefix("steps.") for place in places)]
    header += [runs[0]["metric"] if runs else "score", "lost", "MB", "size"]
    header += [f"speedup {load}" for load in loads] + ["verdict"]
    return header, [
        [
            Path(run["folder"]).name,
            *(run["picked"].get(place, "-") for place in places),
            f"{run['score']:.4f}",
            _figure(run["loss"], "estimate", "{:.4f}", intervals=intervals),
            f"{run['size_bytes'] / 1e6:.2f}",
            f"{run['size_ratio']:.3f}",
            *(
                _figure(run["speedups"].get(load), "value", "{:.2f}", intervals=intervals)
                for load in loads
            ),
            run["outcome"],
        ]
        for run in runs
    ]


def missing_lines(joined: Json) -> list[str]:
    """Return a line for each run that is not done."""
    return [f"{m['folder']}: {m['state']}: {m['reason']}" for m in joined["missing"]]


def markdown(joined: Json) -> str:
    """Return sweep.md."""
    count, lost = len(joined["runs"]), missing_lines(joined)
    lines = [f"# Sweep: {count} of {count + len(lost)} runs", ""]
    if lost:
        lines += ["**Not in this table:**", ""]
        lines += [*(f"- {line}" for line in lost), ""]
    if count:
        lines += [markdown_table(*table(joined)), ""]
    return "\n".join([*lines, *(f"{note}.\n" for note in joined["notes"])])


def _figure(found: Json | None, name: str, pattern: str, *, intervals: bool) -> str:
    """Return a figure, and its interval if that is wanted."""
    if found is None:
        return "-"
    value, low, high = (pattern.format(found[key]) for key in (name, "low", "high"))
    return f"{value} ({low} to {high})" if intervals else value
