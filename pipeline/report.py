"""What a run returns: the stages with what was measured of each, and the verdict.

The dataclasses are the schema of report.json: units in names, fractions never per cent, None where
a number is not known. report.schema.json, made of them, is for other programs. page.py makes the
HTML page of the same JSON.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from benchmarks.figures import Percentiles, Ratio
from benchmarks.outcomes import Fidelity

SCHEMA: Final = 3
READ: Final = (2, SCHEMA)
"""The schemas that can still be read: 3 only adds to 2."""
STALLED: Final = "cpu_stalled_before_and_after"

Outcome = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True)
class Score:
    """The task's metric over the gate split."""

    metric: str
    value: float
    examples: int
    higher_is_better: bool = True


@dataclass(frozen=True)
class Load:
    """Speed at one input shape.

    `speedup` is the ratio of the baseline's latency to this one's, `gain` of the stage before's;
    `first_call_ms` is that of the first call at this shape, in a fresh process; `resident_ms` the
    median of a call without the copies to a device and back, None on the CPU; `joules` the energy
    of a call and `energy` its ratio to the baseline's, None without a sensor.
    """

    batch: int
    sequence: int | None
    latency_ms: Percentiles
    first_call_ms: float
    throughput_per_s: float
    speedup: Ratio
    gain: Ratio
    resident_ms: float | None = None
    joules: float | None = None
    energy: Ratio | None = None


@dataclass(frozen=True)
class Stage:
    """One artifact and what was measured of it.

    `seconds` is what the step took when it was done; `format` the artifact's, `runtime` what it was
    measured in; `kept_heads` the heads that are left, by layer, in the unpruned model's numbers.
    `gain_note` says what the step gained over the stage before, or that it did not pay.
    """

    name: str
    step: Mapping[str, Any] | None
    format: str
    runtime: str
    folder: str
    seconds: float
    parameters: int
    size_bytes: int
    score: Score
    fidelity: Fidelity
    loads: tuple[Load, ...]
    memory: Mapping[str, int | None]
    load_seconds: float
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    kept_heads: tuple[tuple[int, ...], ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    gain_note: str = ""


@dataclass(frozen=True)
class Check:
    """One line of the budget: what is allowed, what was found, and what follows.

    `allowed` is the most that the quantity may be, or with `at_least` the least.
    """

    what: str
    allowed: float
    estimate: float
    low: float
    high: float
    outcome: Outcome
    note: str = ""
    at_least: bool = False


@dataclass(frozen=True)
class Verdict:
    """The outcome of all checks: fail if one fails, pass if all pass."""

    outcome: Outcome
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Report:
    """A whole run.

    `baseline` is the name of the stage that the others are compared with; `evidence` the sha256 of
    the outcomes of the gate's examples that lie beside report.json, of `baseline` and `candidate`,
    and of the `slices` that they fall into, if there are any. `ledger` holds the fingerprint of
    these examples, and the digests of all candidates that they have judged, this one too.
    `not_measured` says why device_peak_bytes, resident_ms or joules are None.
    """

    recipe: Mapping[str, Any]
    machine: Mapping[str, Any]
    data: Mapping[str, Any]
    baseline: str
    stages: tuple[Stage, ...]
    verdict: Verdict
    artifact: str
    evidence: Mapping[str, str] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)
    not_measured: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Return report.json."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)


def json_schema() -> str:
    """Return the JSON Schema of report.json, as report.schema.json holds it."""
    from pydantic import TypeAdapter

    found = TypeAdapter(Report).json_schema(mode="serialization")
    for kind in (found, *found["$defs"].values()):
        kind["description"] = " ".join(kind["description"].split())
        for described in kind["properties"].values():
            described.pop("title", None)  # it says what the name says
    found["properties"]["schema"] = {"const": SCHEMA}
    found["required"].append("schema")
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | found
    return json.dumps(found, indent=2) + "\n"


def baseline(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the stage that the others are compared with."""
    found: Mapping[str, Any] = next(
        stage for stage in report["stages"] if stage["name"] == report["baseline"]
    )
    return found


def table(
    report: Mapping[str, Any], *, intervals: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the stage table, for the terminal and for Markdown.

    Args:
        report: the JSON of a report.
        intervals: show the intervals of the speedups, too.
    """
    first = report["stages"][0]
    names = [shape(load) for load in first["loads"]]
    header = ["stage", first["score"]["metric"], "flips", "MB", "peak MB"]
    header += [f"ms {name}" for name in names] + [f"speedup {name}" for name in names]
    return header, [_row(stage, intervals=intervals) for stage in report["stages"]]


def _row(stage: Mapping[str, Any], *, intervals: bool) -> list[str]:
    flips, peak = stage["fidelity"]["flips"], stage["memory"]["peak_rss_bytes"]
    speedups = [load["speedup"] for load in stage["loads"]]
    return [
        stage["name"],
        f"{stage['score']['value']:.4f}",
        "-" if flips is None else str(flips),
        f"{stage['size_bytes'] / 1e6:.1f}",
        "-" if peak is None else f"{peak / 1e6:.0f}",
        *(f"{load['latency_ms']['p50']:.1f}" for load in stage["loads"]),
        *(
            f"{s['value']:.2f}" + (f" ({s['low']:.2f}-{s['high']:.2f})" if intervals else "")
            for s in speedups
        ),
    ]


def shape(load: Mapping[str, Any]) -> str:
    """Return a load's name: 8x128, or for images batch 8."""
    return f"{load['batch']}x{load['sequence']}" if load["sequence"] else f"batch {load['batch']}"


BUSY: Final = 0.2
"""The share of time waited for a core above which a machine counts as busy."""


def uses_note(report: Mapping[str, Any]) -> str:
    """Return a warning if the gate split has judged other candidates, too, else nothing."""
    count = len(report.get("ledger", {}).get("candidates", ()))
    if count < 2:  # noqa: PLR2004
        return ""
    return (
        f"the gate split has judged {count} candidates: the best of several passes it more often"
        " than it should; choose on the selection split, and judge once"
    )


def busy_note(report: Mapping[str, Any]) -> str:
    """Return a warning if other work took the cores while the speed was measured, else nothing."""
    stalled = max((s for s in report["machine"].get(STALLED, ()) if s is not None), default=0.0)
    if stalled <= BUSY:
        return ""
    return (
        f"the machine was busy while speed was measured: tasks waited {stalled:.0%} of the time for"
        " a core; the ratios hold better than the latencies"
    )


def step_words(step: Mapping[str, Any] | None) -> str:
    """Return a step and those of its settings that are not none, off or 0, in one line."""
    if step is None:
        return "the model as it came"
    blocks = {"algorithm", "block_size", "symmetric"}  # of weights alone
    other = step["step"] == "quantize" and not step["method"].endswith("-weights")
    settings = [
        f"{key} {_setting(value)}"
        for key, value in step.items()
        if key != "step" and value and not (other and key in blocks)
    ]
    return ", ".join([str(step["step"]), *settings])


def _setting(value: Any) -> str:
    """Return a setting, or those of one that has some itself and are given."""
    if isinstance(value, Mapping):
        given = [f"{key} {_setting(each)}" for key, each in value.items() if each]
        return f"({', '.join(given)})"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


SAME: Final = "the same file as the stage before"
"""What is said of a step that found its work done."""
SHOWN: Final = 50_000
"""Bytes of a part from which on it is listed."""


def notes(stage: Mapping[str, Any]) -> list[str]:
    """Return what a step gained, what a quantization changed, and where the bytes are now."""
    details, changed = stage["details"], list[str]()
    undone = [
        f"round {at} taken back: {done['selection']:.4g} on the selection split,"
        f" {details['selection_before']:.4g} before the step"
        for at, done in enumerate(details.get("rounds", ()), 1)
        if not done.get("kept", True)
    ]
    if stage["gain_note"] == SAME:
        return [SAME, *undone]
    if "quantized_nodes" in details:
        changed.append(f"{details['quantized_nodes']} nodes quantized")
        if details.get("reduce_range"):
            changed.append("weights of 7 bits")
        if details.get("left"):
            changed.append(f"left as they were: {', '.join(details['left'])}")
    parts = details.get("bytes_by_part", {}) if stage["gain_note"] else {}
    largest = sorted(parts.items(), key=lambda item: -item[1])
    sizes = ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in largest if size >= SHOWN)
    return [line for line in (stage["gain_note"], *undone, ", ".join(changed), sizes) if line]


def check_line(check: Mapping[str, Any]) -> str:
    """Return one check in words."""
    bounds = f"{check['estimate']:.4g} ({check['low']:.4g} to {check['high']:.4g})"
    note = f"; {check['note']}" if check["note"] else ""
    limit = f"at {'least' if check['at_least'] else 'most'} {check['allowed']:g}"
    return f"{check['what']}: {bounds}, {limit}: {check['outcome']}{note}"


def stage_table(report: Mapping[str, Any]) -> str:
    """Return the stage table in Markdown."""
    return markdown_table(*table(report))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def evidence(report: Mapping[str, Any]) -> str:
    """Return where and on how many examples was measured, as a sentence."""
    machine, target = report["machine"], report["recipe"]["target"]
    where = f"{machine['cpu']}, {target['threads']} of {machine['cores']} cores"
    examples = report["stages"][-1]["score"]["examples"]
    return f"{where}, {target['runtime']} on {target['device']}; {examples} examples judged."


def result(report: Mapping[str, Any]) -> str:
    """Return what came out, compared with the baseline, in one sentence."""
    base, last = baseline(report), report["stages"][-1]
    speed = ", ".join(
        f"{load['speedup']['value']:.2f}\u00d7 at {shape(load)}" for load in last["loads"]
    )
    metric = base["score"]["metric"]
    before, after = base["score"]["value"], last["score"]["value"]
    change = f"stayed at {after:#.4g}"
    if after != before:
        verb = "fell" if after < before else "rose"
        change = f"{verb} by {abs(after - before):.3g}, from {before:#.4g} to {after:#.4g}"
    return (
        f"Against {base['name']}, {last['name']} has"
        f" {last['size_bytes'] / base['size_bytes']:.0%} of the size and a speed of {speed};"
        f" {metric.replace('_', ' ')} {change}."
    )


def dropped_note(dropped: Mapping[str, int]) -> str:
    """Return how many examples the splits lost, nothing if none."""
    found = ", ".join(f"{name} {count:,}" for name, count in dropped.items() if count)
    return f"dropped, being there twice or in another split, too: {found}" if found else ""


def markdown(report: Mapping[str, Any]) -> str:
    """Return report.md, fit for a pull request: what a reviewer needs, the rest folded away."""
    told = report["stages"][-1]["fidelity"]
    flips = "" if told["flips"] is None else f" {told['flips']} examples flipped"
    if told.get("broken") is not None:  # schema 2 has none
        flips += f", {told['broken']} of them to wrong"
    lines = [f"# secateur: {report['verdict']['outcome']}", ""]
    lines += [result(report) + (flips and f"{flips}."), ""]
    lines += [f"- {check_line(check)}" for check in report["verdict"]["checks"]]
    lines += ["", stage_table(report), ""]
    if note := busy_note(report):
        lines += [f"**{note}**", ""]
    for note in (uses_note(report), dropped_note(report["data"].get("dropped", {}))):
        lines += [note, ""] if note else []
    lines += [f"Speedup and flips against `{report['baseline']}`. {evidence(report)}", ""]
    lines += ["<details><summary>What each stage did</summary>", ""]
    for stage in report["stages"]:
        lines.append(f"- {stage['name']}: {'; '.join((step_words(stage['step']), *notes(stage)))}")
    lines += ["", "</details>", ""]
    return "\n".join(lines)
