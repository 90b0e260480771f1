"""search.html: every candidate of a search, the front, and what the budget cost, on one page.

Built like report.html (page.py): one file that asks for nothing from outside and runs no script.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import geometric_mean
from typing import Any, Final
from xml.etree import ElementTree as ET

from matplotlib import style

from pipeline.drawing import ACCENT, BAD, GOOD, LOOK, MUTED, canvas, inline, label_points
from pipeline.markup import Node, figure, section, table_head, tag
from pipeline.page import MARKS, definitions, document
from pipeline.plots import front
from pipeline.search_report import header, loss, loss_title, result, row

Json = Mapping[str, Any]


def page(found: Json) -> str:
    """Return search.html of the JSON of a search."""
    drawn = [each for each in (_trade_off(found, "speed"), _trade_off(found, "size")) if each]
    main = tag(
        "main",
        _banner(found),
        *([section("Front", tag("div", *drawn, class_="plots"))] if drawn else []),
        section("Candidates", *_table(found)),
        section("Setting", definitions(found["settings"]), definitions(found["budget"])),
    )
    return document(f"secateur search: {found['outcome'] or 'not ended'}, {found['model']}", main)


def _banner(found: Json) -> ET.Element:
    outcome = found["outcome"] or "inconclusive"
    facts = {
        "model": found["model"],
        "baseline": found["baseline"],
        "loads": ", ".join(found["loads"]),
        "artifact": found["artifact"] or "none",
    }
    mark = tag("span", MARKS[outcome], class_="mark", aria_hidden="true")
    return tag(
        "header",
        tag("p", "secateur search", class_="brand"),
        tag("h1", mark, outcome.title() if found["ended"] else "Not ended"),
        tag("p", result(found), class_="result"),
        definitions(facts),
        class_=f"banner {outcome}",
    )


def _table(found: Json) -> Iterable[ET.Element]:
    titles = header(found)
    rows = []
    for candidate in found["candidates"]:
        cells: Sequence[Node] = row(found, candidate)
        chosen = candidate["number"] == found["chosen"]
        first = tag("th", tag("b", cells[0]) if chosen else cells[0], scope="row")
        named = zip(titles[1:], cells[1:], strict=True)
        rows.append(tag("tr", first, *(tag("td", cell, data_label=title) for title, cell in named)))
    table = tag("table", table_head(titles), tag("tbody", *rows), class_="checks")
    yield tag("div", table, class_="scroll", tabindex="0")
    yield tag(
        "p",
        f"* on the front: no other one is better in both. The {loss_title(found)} is of the"
        " selection split; the gate split has judged those alone whose outcome stands in the last"
        " column.",
        class_="hint",
    )


def _trade_off(found: Json, what: str) -> ET.Element | None:
    """Return what was lost against speed or size, of all candidates that were measured."""
    measured = [c for c in found["candidates"] if c["lost"] is not None]
    if not measured:
        return None
    label, title = TITLES[what]
    points = [(_value(candidate, what), loss(found, candidate["lost"])) for candidate in measured]
    budget, title_of_loss = found["budget"], loss_title(found)
    limit = budget.get("max_drop", budget.get("max_perplexity_ratio"))
    sign = -1 if what == "speed" else 1
    best = front([sign * value for value, _ in points], [lost for _, lost in points],
                 higher_is_better=False)  # fmt: skip
    with style.context(["default", LOOK]):
        drawing, axes = canvas(3.2)
        axes.grid(visible=True)
        axes.axhline(loss(found, 0), color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        if limit is not None:
            axes.axhline(limit, color=BAD, linewidth=1, linestyle=(0, (5, 3)))
        steps = zip(*(points[place] for place in best), strict=True)
        axes.plot(*steps, color=GOOD, linewidth=2, alpha=0.8, drawstyle="steps-post")
        for candidate, point in zip(measured, points, strict=True):
            chosen = candidate["number"] == found["chosen"]
            axes.plot(
                *point, "o", color=GOOD if chosen else ACCENT, markersize=9 if chosen else 6,
                fillstyle="full" if candidate["selection"] == "pass" else "none", zorder=3,
            )  # fmt: skip
        axes.margins(0.12)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.set_ylabel(title_of_loss.replace("_", " "))
        label_points(drawing, axes, [str(c["number"]) for c in measured], points)
        named = zip(measured, points, strict=True)
        alt = "; ".join(f"{c['number']}: {lost:.4f} at {x:.3g}" for c, (x, lost) in named)
        svg = inline(drawing, f"search-{what}", f"{title_of_loss} against {label}. {alt}")
    return figure(title, CAPTION, svg)


CAPTION: Final = (
    "Up is better. Full: passes on the selection split; green: chosen; dashed: the limit."
)
TITLES: Final = {
    "speed": ("times as fast, mean of the loads", "Loss and speed"),
    "size": ("size as a share of the baseline", "Loss and size"),
}


def _value(candidate: Json, what: str) -> float:
    if what == "size":
        return float(candidate["size"])
    return geometric_mean(value for value, _, _ in candidate["speedups"])
