"""What a search tells, as search.json and search.md, and a line for every candidate.

search_page.py makes the HTML page of the same JSON.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from benchmarks.metrics import METRICS
from pipeline import front
from pipeline.front import Candidate, Found
from pipeline.report import markdown_table, shape

Json = Mapping[str, Any]

SCHEMA: Final = 1


def content(found: Found) -> dict[str, Any]:
    """Return search.json: units in names, fractions never per cent, None what is not known.

    `lost` and `lost_on_part` are what `metrics.lost` counts; tables and pages show `loss` of it.
    """
    best, first = found.settings.best, found.first
    on_front = {c.number for c in front.pareto(found.candidates, best)}
    judged = {f.candidate.number: f.report.verdict.outcome for f in found.finalists}
    passed = [number for number, outcome in judged.items() if outcome == "pass"]
    winner = next((f.candidate for f in found.finalists if f.candidate.number in passed), None)
    dearer = front.beyond(found.candidates, winner, best) if winner else None
    last = found.finalists[-1].report if found.finalists else None
    return {
        "schema": SCHEMA,
        "ended": found.ended,
        "outcome": found.outcome if found.ended else None,
        "model": first.model.source,
        "metric": found.metric,
        "baseline": first.baseline,
        "loads": [shape(load.model_dump()) for load in first.target.loads],
        "settings": found.settings.model_dump(),
        "budget": first.budget.model_dump(exclude_none=True),
        "confidence": found.confidence,
        "candidates": [
            _described(candidate, best)
            | {"on_front": candidate.number in on_front, "gate": judged.get(candidate.number)}
            for candidate in found.candidates
        ],
        "chosen": passed[0] if passed else None,
        "artifact": last.artifact if last and passed else None,
        "better_beyond_budget": dearer.number if dearer else None,
        "note": found.note,
        "fewer": found.fewer,
    }


def _described(candidate: Candidate, best: front.Best) -> dict[str, Any]:
    known = candidate.measured or candidate.foreseen
    measured, screened = candidate.measured, candidate.screened
    return {
        "number": candidate.number,
        "picked": dict(candidate.picked),
        "state": candidate.state,
        "why": candidate.why,
        "merit": candidate.merit(best) if known else None,
        "speedups": [list(each) for each in known.speedups] if known else None,
        "size": known.size if known else None,
        "divergence": candidate.foreseen.divergence if candidate.foreseen else None,
        "lost_on_part": screened.lost if screened else None,
        "score": measured.score if measured else None,
        "lost": measured.lost if measured else None,
        "checks": [asdict(check) for check in measured.checks] if measured else None,
        "selection": candidate.outcome,
        "seconds": candidate.seconds,
    }


def header(found: Json) -> tuple[str, ...]:
    """Return the titles of the table of candidates."""
    speedups = (f"speedup {load}" for load in found["loads"])
    return ("", "picked", *speedups, "size", loss_title(found), "selection", "gate")


def loss_title(found: Json) -> str:
    """Return what `loss` gives: as reports have it, a drop of a score, a ratio of perplexities."""
    better = METRICS[found["metric"]].higher_is_better
    return f"{found['metric']} {'drop' if better else 'ratio'}"


def loss(found: Json, lost: float) -> float:
    """Return `loss_title` of what `metrics.lost` counts."""
    return lost if METRICS[found["metric"]].higher_is_better else 1 + lost


def row(found: Json, candidate: Json) -> tuple[str, ...]:
    """Return a candidate's line of the table."""
    picked = ", ".join(
        f"{name(place)} {words}".strip() for place, words in candidate["picked"].items()
    )
    speedups = candidate["speedups"] or [None] * len(found["loads"])
    lost = candidate["lost"] if candidate["lost"] is not None else candidate["lost_on_part"]
    part = " (a part)" * (candidate["lost"] is None and lost is not None)
    said = candidate["selection"] or f"{candidate['state']}: {candidate['why']}"
    star = "*" * candidate["on_front"]
    return (
        f"{candidate['number']}{star}",
        picked,
        *("-" if each is None else "{:.2f} ({:.2f}-{:.2f})".format(*each) for each in speedups),
        "-" if candidate["size"] is None else f"{candidate['size']:.3f}",
        "-" if lost is None else f"{loss(found, lost):.4f}{part}",
        said,
        candidate["gate"] or "",
    )


def name(place: str) -> str:
    """Return the words for an open value, from its place in the file; a step has none."""
    return ".".join(part for part in place.split(".")[1:] if not part.isdigit())


def result(found: Json) -> str:
    """Return what came of a search, in a few sentences."""
    return f"{_chosen(found)} {found['fewer']}".rstrip()


def _chosen(found: Json) -> str:
    by_number = {c["number"]: c for c in found["candidates"]}
    of = f"of {len(by_number)} candidates"
    if found["chosen"] is None:
        if not found["ended"]:
            return f"Not ended: {len(by_number)} candidates so far. Run the same command to go on."
        judged = [n for n, c in by_number.items() if c["gate"]]
        if not judged and found["note"]:
            return f"None {of} met the gate split: {found['note']}."
        if not judged:
            return f"None {of} is within the budget on the selection split."
        tried = ", ".join(f"{n} ({by_number[n]['gate']})" for n in judged)
        more = f"; {found['note']}" if found["note"] else ""
        return f"None {of} passed on the gate split: {tried}{more}."
    chosen = by_number[found["chosen"]]
    text = f"Candidate {found['chosen']} {of}: {_merit(found, chosen)}."
    if (number := found["better_beyond_budget"]) is not None:
        other = by_number[number]
        lost = other["lost"] if other["lost"] is not None else other["lost_on_part"]
        text += (
            f" The budget cost: candidate {number} is {_merit(found, other)}, with a"
            f" {loss_title(found)} of {loss(found, lost):.4f} on the selection split, or a part of"
            f" it, in place of {loss(found, chosen['lost']):.4f}."
        )
    return text


def _merit(found: Json, candidate: Json) -> str:
    if found["settings"]["best"] == "speed":
        return f"{candidate['merit']:.2f} times as fast as the baseline"
    return f"{candidate['merit']:.2f} times smaller than the baseline"


def markdown(found: Json) -> str:
    """Return search.md."""
    rows = [
        [cell.replace("|", "\\|").replace("*", "\\*") for cell in row(found, each)]
        for each in found["candidates"]
    ]
    return (
        f"## secateur search: {found['outcome'] or 'not ended'}\n\n{result(found)}\n\n"
        f"{markdown_table(header(found), rows)}\n\n"
        f"\\* on the front: no other candidate is better in both. The {loss_title(found)} is of the"
        " selection split; the gate split has judged those alone whose outcome stands in the last"
        " column.\n"
    )
