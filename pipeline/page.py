"""report.html: a run as one page to read on a phone, at a desk, or years later.

The page is one file that asks for nothing from outside and runs no script; its own content policy
forbids both. It is built as a tree of elements, not as text, so that nothing that stands in a
report can become markup. The numbers are those of report.json; nothing is computed anew but
differences and ratios of scores and sizes.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import yaml

from pipeline.cells import layers
from pipeline.markup import Node, figure, number, section, table_head, tag
from pipeline.plots import (
    Plot,
    draw_amounts,
    draw_changes,
    draw_gains,
    draw_latencies,
    draw_trade_offs,
)
from pipeline.report import busy_note, check_line, result, shape, uses_note
from pipeline.tables import decisions, latencies, stage_table

Json = Mapping[str, Any]

MARKS: Final = {"pass": "\u2713", "fail": "\u2717", "inconclusive": "?"}
SENTENCES: Final = {
    "pass": "The result is within its budget.",
    "fail": "The result is not within its budget.",
    "inconclusive": "The data cannot say whether the result is within its budget.",
}
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Json) -> str:
    """Return report.html of the JSON of a report."""
    outcome, stages = report["verdict"]["outcome"], report["stages"]
    attribution = (draw_changes(stages), draw_gains(stages))
    main = tag(
        "main",
        banner(report),
        section("Budget", budget(report)),
        section("Stages", *stage_table(report)),
        section("Accuracy and speed", *_plots(draw_trade_offs(report)), *_plots(attribution)),
        section("Decisions", *decisions(report)),
        section("Latency", *latencies(stages), *_plots(draw_latencies(stages))),
        section("Size and memory", *_plots(draw_amounts(stages))),
        section("Heads and neurons", *layers(stages)),
        section("Setting", *setting(report)),
    )
    return document(f"secateur: {outcome}, {report['recipe']['model']['source']}", main)


def document(title: str, main: ET.Element) -> str:
    """Return a page as text, from its title and what stands in it."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Path(__file__).with_suffix(".css").read_text(encoding="utf-8")),
    )
    html = tag("html", head, tag("body", main), lang="en")
    ET.indent(html, "")
    return "<!DOCTYPE html>\n" + ET.tostring(html, encoding="unicode", method="html") + "\n"


def banner(report: Json) -> ET.Element:
    """Return the verdict, what was done, and what came out, in words."""
    recipe, outcome = report["recipe"], report["verdict"]["outcome"]
    target = recipe["target"]
    threads = f", {target['threads']} threads" if target.get("threads") else ""
    facts = {
        "model": recipe["model"]["source"],
        "task": recipe["task"]["kind"],
        "target": f"{target['runtime']} on {target['device']}{threads}",
        "loads": ", ".join(shape(load) for load in report["stages"][0]["loads"]),
        "artifact": report["artifact"],
    }
    mark = tag("span", MARKS[outcome], class_="mark", aria_hidden="true")
    return tag(
        "header",
        tag("p", "secateur", class_="brand"),
        tag("h1", mark, outcome.title()),
        tag("p", tag("b", SENTENCES[outcome]), " ", result(report), class_="result"),
        *(
            tag("p", f"{note[0].upper()}{note[1:]}.", class_="busy")
            for note in (busy_note(report), uses_note(report))
            if note
        ),
        definitions(facts),
        class_=f"banner {outcome}",
    )


def budget(report: Json) -> ET.Element:
    """Return the checks as a table."""
    head = ("check", "allowed", "estimate", "interval", "outcome", "note")
    rows = []
    for check in report["verdict"]["checks"]:
        outcome = check["outcome"]
        sign = "\u2265" if check["at_least"] else "\u2264"
        mark = tag("span", f"{MARKS[outcome]} {outcome}", class_=f"outcome {outcome}")
        low, high = (f"{check[end]:.4g}" for end in ("low", "high"))
        bounds = "exact" if low == high else f"{low} to {high}"
        cells: Sequence[Node] = (
            f"{sign} {check['allowed']:g}",
            f"{check['estimate']:.4g}",
            tag("span", bounds, interval(check), class_="bounds"),
            mark,
            check["note"],
        )
        named = zip(head[1:], cells, strict=True)
        values = (tag("td", cell, data_label=label) for label, cell in named)
        rows.append(tag("tr", tag("th", check["what"], scope="row"), *values))
    return tag("table", table_head(head), tag("tbody", *rows), class_="checks")


def interval(check: Json) -> ET.Element:
    """Return a small picture: the interval and the estimate, before what is allowed."""
    bounds = [check[key] for key in ("low", "high", "estimate", "allowed")]
    width = 1.4 * (max(bounds) - min(bounds)) or 1.0
    start = (max(bounds) + min(bounds) - width) / 2

    def at(value: float) -> float:
        return 100 * (value - start) / width

    limit, low, high = at(check["allowed"]), at(check["low"]), at(check["high"])
    left, right = (limit, 100.0) if check["at_least"] else (0.0, limit)
    return tag(
        "span",
        tag("i", class_="fine", style=f"left:{left:.1f}%;width:{right - left:.1f}%"),
        tag("i", class_="range", style=f"left:{low:.1f}%;width:{high - low:.1f}%"),
        tag("i", class_="estimate", style=f"left:{at(check['estimate']):.1f}%"),
        tag("i", class_="limit", style=f"left:{limit:.1f}%"),
        class_=f"interval {check['outcome']}",
        role="img",
        aria_label=check_line(check),
    )


def setting(report: Json) -> Iterable[ET.Element]:
    """Yield machine, data and recipe."""
    text = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
    parts = {"Machine": report["machine"], "Data": report["data"]}
    if report.get("not_measured"):
        parts["Not measured"] = report["not_measured"]
    lists = (tag("div", tag("h3", title), definitions(part)) for title, part in parts.items())
    yield tag("div", *lists, class_="plots")
    yield tag("details", tag("summary", "Recipe"), tag("pre", text, tabindex="0"))
    yield tag("p", f"Schema {report['schema']} of report.json.", class_="hint")


def definitions(entries: Json) -> ET.Element:
    """Return a mapping as a list of names with their values."""
    names = {key: key.removesuffix("_bytes").replace("_", " ") for key in entries}
    pairs = (
        tag("div", tag("dt", names[key]), tag("dd", *_plain(key, value)))
        for key, value in entries.items()
    )
    return tag("dl", *pairs)


def _plain(key: str, value: Any) -> Iterable[Node]:
    if value is None:
        yield number(None)
    elif isinstance(value, Mapping):
        yield ", ".join(f"{name} {part}" for name, part in value.items())
    elif isinstance(value, list):
        yield ", ".join(map(str, value))
    else:
        size = key.endswith("_bytes") and not isinstance(value, str)
        yield f"{value / 1e9:.1f} GB" if size else str(value)


def _plots(plots: Iterable[Plot]) -> Iterable[ET.Element]:
    """Yield the plots as a grid, if there are any."""
    if found := [figure(*plot) for plot in plots]:
        yield tag("div", *found, class_="plots")
