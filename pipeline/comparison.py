"""Two runs side by side: what was asked of them, and what came out.

Only runs that were measured alike are compared: on one machine, in one runtime with as many
threads, at the same loads, judged on the same examples. The scores of the two results are paired,
example by example, with what lies beside the reports; the latencies are of different hours, so
that speed is told by the ratios to each run's own baseline. Imports no torch.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.metrics import METRICS
from benchmarks.outcomes import Fidelity, fidelity
from pipeline import judging, quality
from pipeline.evidence import EvidenceError
from pipeline.reading import stage_names
from pipeline.report import Check, busy_note, markdown_table, shape, step_words, table

Json = Mapping[str, Any]

SIDES: Final = ("a", "b")
CONFIDENCE: Final = 0.95
"""Of each end of the interval of a difference of scores."""
ALIKE: Final = (
    *judging.PLACE,
    "recipe.task.kind",
    "data.fingerprints.gate",
    "metric",
)
"""What must be the same of both."""
SHA256: Final = 64
"""Characters of such a hash."""
ASIDE: Final = ("recipe.target.rounds", "recipe.target.seconds", "data.labels")
"""What is not told: how long was measured, and names."""


@dataclass(frozen=True)
class Comparison:
    """Two reports, what differs between them, and what that came to.

    `differences` are name and value in either; `rows` those of the stages under `header`. Of the
    two results, `score` is what the second lost against the first, or None if the outcomes of
    either do not lie beside its report, and `decisions` how far they are apart.
    """

    reports: tuple[Json, Json]
    differences: list[tuple[str, str, str]]
    header: list[str]
    rows: list[list[str]]
    score: Check | None
    decisions: Fidelity | None


def compare(first: Path, second: Path) -> Comparison:
    """Return two runs side by side, from the paths of their reports.

    Raises:
        EvidenceError: a report is missing or damaged, or the two are not comparable; every
            difference that forbids it is named.
    """
    paths = first, second
    a, b = (judging.read(path) for path in paths)
    both = {*_steps(a)} & {*_steps(b)}
    known = [dict(_facts(report, both)) for report in (a, b)]
    different = [
        (name, _text(known[0].get(name)), _text(known[1].get(name)))
        for name in dict.fromkeys([*known[0], *known[1]])
        if known[0].get(name) != known[1].get(name)
    ]
    if forbidden := [each for each in different if each[0].startswith(ALIKE)]:
        told = "; ".join(f"{name}: found {one} and {other}" for name, one, other in forbidden)
        raise EvidenceError(f"{second}: not comparable with {first}: {told}; expected the same")
    header, rows = _side_by_side(a, b)
    score, decisions = _paired(paths, (a, b))
    shown = [each for each in different if not each[0].startswith(ASIDE)]
    return Comparison((a, b), shown, header, rows, score, decisions)


def results(found: Comparison) -> list[str]:
    """Return what the second run's result is against the first one's, a line each."""
    a, b = (report["stages"][-1] for report in found.reports)
    lines = [_score_line(found, a, b)]
    if found.decisions is not None:
        told = found.decisions
        flips = "" if told.flips is None else f", {told.broken} broken and {told.mended} mended"
        if told.agreement is not None:
            lines.append(f"decisions: {told.agreement:.4f} are equal{flips}")
    lines.append(f"size: {b['size_bytes'] / a['size_bytes']:.3g}x")
    peaks = [stage["memory"]["peak_rss_bytes"] for stage in (a, b)]
    if None not in peaks:
        lines.append(f"peak memory: {peaks[1] / peaks[0]:.3g}x")
    for before, after in zip(a["loads"], b["loads"], strict=True):
        one, other = before["speedup"], after["speedup"]
        word = "not told apart"
        if one["high"] < other["low"]:
            word = "faster"
        elif other["high"] < one["low"]:
            word = "slower"
        bounds = (f"{s['value']:.2f} ({s['low']:.2f}-{s['high']:.2f})" for s in (one, other))
        lines.append(f"speedup at {shape(before)}: {' and '.join(bounds)}: {word}")
    return lines


def warnings(found: Comparison) -> list[str]:
    """Return what makes the comparison worth less than it seems."""
    a, b = found.reports
    said = []
    if a["evidence"]["baseline"] != b["evidence"]["baseline"]:
        said.append("the baselines differ: each speedup is against its run's own")
    busy = [f"{side}: {busy_note(r)}" for side, r in zip(SIDES, (a, b), strict=True)]
    return said + [note for note in busy if not note.endswith(": ")]


def markdown(found: Comparison, names: tuple[str, str]) -> str:
    """Return the comparison as Markdown, fit for a pull request."""
    verdicts = [report["verdict"]["outcome"] for report in found.reports]
    lines = [f"# secateur: {names[1]} against {names[0]}", ""]
    lines += [
        f"- {side}: `{name}`, {verdict}"
        for side, name, verdict in zip(SIDES, names, verdicts, strict=True)
    ]
    if found.differences:
        rows = [list(difference) for difference in found.differences]
        lines += ["", markdown_table(["what differs", *SIDES], rows)]
    lines += ["", markdown_table(found.header, found.rows), ""]
    lines += ["The result of b against that of a:", ""]
    lines += [f"- {line}" for line in (*results(found), *warnings(found))]
    return "\n".join(lines) + "\n"


def _steps(report: Json) -> dict[str, Json]:
    steps = report["recipe"]["steps"]
    return dict(zip(stage_names([step["step"] for step in steps]), steps, strict=True))


def _facts(report: Json, both: Collection[str]) -> Iterable[tuple[str, Any]]:
    """Yield what was asked for, and where, by name; a step as a whole if it is not in `both`."""
    recipe, machine, data = report["recipe"], report["machine"], report["data"]
    steps = {name: s if name in both else step_words(s) for name, s in _steps(report).items()}
    yield from _flat("recipe", {**recipe, "steps": steps})
    here = ("cpu", "cpu_flags", "cores", "gpu", "system", "python", "versions")
    yield from _flat("machine", {key: machine.get(key) for key in here})
    yield from _flat("data", data)
    yield "metric", report["stages"][0]["score"]["metric"]


def _flat(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value


def _text(value: Any) -> str:
    """Return a value as JSON has it, one that is not there as a dash, the beginning of a hash."""
    if value is None:
        return "-"
    if not isinstance(value, str):
        return json.dumps(value)
    return f"{value[:12]}.." if len(value) == SHA256 else value


def _side_by_side(a: Json, b: Json) -> tuple[list[str], list[list[str]]]:
    """Return the rows of both by stage, the stages in an order that is that of both."""
    header, of_a = table(a, intervals=False)
    rows = {
        side: {row[0]: row[1:] for row in of_one}
        for side, of_one in zip(SIDES, (of_a, table(b, intervals=False)[1]), strict=True)
    }
    names = list(rows["a"])
    at = 0
    for name in rows["b"]:
        if name in names:
            at = names.index(name) + 1
        else:
            names.insert(at, name)
            at += 1
    found = [
        [name if side == "a" or name not in rows["a"] else "", side, *rows[side][name]]
        for name in names
        for side in SIDES
        if name in rows[side]
    ]
    return [header[0], "", *header[1:]], found


def _paired(
    paths: tuple[Path, Path], reports: tuple[Json, Json]
) -> tuple[Check | None, Fidelity | None]:
    """Return the difference of the two results' scores and decisions, if both can be paired."""
    if not all((path.parent / judging.EVIDENCE).is_dir() for path in paths):
        return None, None
    a, b = (
        judging.outcomes(path, "candidate", report["evidence"]["candidate"])
        for path, report in zip(paths, reports, strict=True)
    )
    name = reports[0]["stages"][0]["score"]["metric"]
    metric = METRICS[name]
    none = 1.0 if metric.kind == "perplexity" else 0.0
    score = quality.check_score(name, a.columns, b.columns, allowed=none, confidence=CONFIDENCE)
    right = (lambda c: np.asarray(metric.function(c)) > 0) if metric.kind == "binary" else None
    return score, fidelity(a, b, right)


def _score_line(found: Comparison, a: Json, b: Json) -> str:
    metric, check = a["score"]["metric"], found.score
    values = f"{a['score']['value']:.4f} and {b['score']['value']:.4f}"
    if check is None:
        return f"{metric}: {values}; not paired, as evidence/ does not lie beside both reports"
    word = {"pass": "better", "fail": "worse", "inconclusive": "not told apart"}[check.outcome]
    bounds = f"{check.estimate:.4g} ({check.low:.4g} to {check.high:.4g})"
    kind = "ratio" if METRICS[metric].kind == "perplexity" else "drop"
    return f"{metric}: {values}, {kind} {bounds}: {word}"
