"""report.html: a run as one page to read on a phone, at a desk, or years later.

The page is one file that asks for nothing from outside and runs no script; its own content policy
forbids both. It is built as a tree of elements, not as text, so that nothing that stands in a
report can become markup. The numbers are those of report.json; nothing is computed anew but
differences and ratios of scores and sizes.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import yaml

from pipeline.plots import baseline, draw
from pipeline.report import check_line, notes, shape, step_words

Json = Mapping[str, Any]
Node = ET.Element | str

MARKS: Final = {"pass": "\u2713", "fail": "\u2717", "inconclusive": "?"}
SENTENCES: Final = {
    "pass": "The result is within its budget.",
    "fail": "The result is not within its budget.",
    "inconclusive": "The data cannot say whether the result is within its budget.",
}
FEW: Final = "too few samples"
UNMEASURED: Final = "not measured"
STAGE_COLUMNS: Final = ("flips", "agreement", "size MB", "parameters", "peak MB")
LOAD_COLUMNS: Final = ("load", "speedup", "p50 ms", "p90", "p95", "p99", "per s")
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Json) -> str:
    """Return report.html of the JSON of a report."""
    outcome = report["verdict"]["outcome"]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"secateur: {outcome}, {report['recipe']['model']['source']}"),
        tag("style", Path(__file__).with_suffix(".css").read_text(encoding="utf-8")),
    )
    main = tag(
        "main",
        banner(report),
        section("Budget", budget(report)),
        section("Stages", *stage_table(report)),
        section("Plots", tag("div", *(_figure(*plot) for plot in draw(report)), class_="plots")),
        section("What is left of each layer", *layers(report["stages"])),
        section("Setting", *setting(report)),
    )
    html = tag("html", head, tag("body", main), lang="en")
    ET.indent(html, "")
    return "<!DOCTYPE html>\n" + ET.tostring(html, encoding="unicode", method="html") + "\n"


def tag(name: str, /, *content: Node, **attributes: str) -> ET.Element:
    """Return an element; `class_` stands for class, `aria_label` for aria-label."""
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    element = ET.Element(name, {names[key]: value for key, value in attributes.items()})
    for node in content:
        if isinstance(node, ET.Element):
            element.append(node)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + node
        else:
            element.text = (element.text or "") + node
    return element


def section(title: str, *content: Node) -> ET.Element:
    """Return a titled part of the page."""
    return tag("section", tag("h2", title), *content)


def number(value: float | None, pattern: str = "{:g}", missing: str = UNMEASURED) -> Node:
    """Return a number as text, or a dash that says why there is none."""
    if value is None:
        return tag("span", "\u2013", class_="null", title=missing)
    return pattern.format(value)


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
        definitions(facts),
        class_=f"banner {outcome}",
    )


def result(report: Json) -> str:
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
    return tag("table", _head(head), tag("tbody", *rows), class_="checks")


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


def stage_table(report: Json) -> Iterable[ET.Element]:
    """Yield the table of stages, a row for each load, and what its marks mean."""
    metric = baseline(report)["score"]["metric"]
    drop = "drop" if baseline(report)["score"]["higher_is_better"] else "ratio"
    head = ["stage", metric, drop, *STAGE_COLUMNS, *LOAD_COLUMNS]
    groups = [tag("tbody", *stage_rows(report, stage)) for stage in report["stages"]]
    table = tag("table", _head(head), *groups, class_="stages")
    scroll = {"tabindex": "0", "role": "region", "aria_label": "Stages"}
    yield tag("div", table, class_="scroll", **scroll)
    yield tag(
        "p",
        f"Speedup: latency of {report['baseline']} over the stage's, from interleaved runs, with"
        f" its 95 % interval. {drop.title()}, flips and agreement against {report['baseline']}."
        f" \u2013 {UNMEASURED}, or for a percentile {FEW}.",
        class_="hint",
    )


def stage_rows(report: Json, stage: Json) -> Iterable[ET.Element]:
    """Yield the rows of a stage."""
    base, fidelity, memory = baseline(report), stage["fidelity"], stage["memory"]
    value, reference = stage["score"]["value"], base["score"]["value"]
    better = stage["score"]["higher_is_better"]
    span = len(stage["loads"])
    tags = [tag("span", "baseline", class_="tag")] if stage is base else []
    peak: list[Node] = [number(_mb(memory["peak_rss_bytes"]), "{:.0f}")]
    if memory.get("device_peak_bytes") is not None:
        peak.append(tag("small", number(_mb(memory["device_peak_bytes"]), "{:.0f} on device")))
    whole: list[list[Node]] = [
        [f"{value:#.4g}"],
        [f"{reference - value or 0.0:.4f}" if better else f"{value / reference:.4f}"],
        [number(fidelity["flips"])],
        [number(fidelity["agreement"], "{:.4f}")],
        [f"{stage['size_bytes'] / 1e6:.1f}"],
        [f"{stage['parameters'] / 1e6:.2f} M"],
        peak,
    ]
    name = tag("th", stage["name"], " ", *tags, scope="rowgroup", rowspan=str(span + 1))
    cells = [tag("td", *content, rowspan=str(span), class_="number") for content in whole]
    for index, load in enumerate(stage["loads"]):
        first = (name, *cells) if not index else ()
        yield tag("tr", *first, *load_cells(load))
    note = tag("span", step_words(stage["step"]), class_="note")
    gain, *rest = notes(stage) or [""]
    if gain:
        note.append(tag("b", gain))
    for line in rest:
        note.append(tag("br"))
        note[-1].tail = line
    yield tag("tr", tag("td", note, class_="foot", colspan=str(len(whole) + len(LOAD_COLUMNS))))


def load_cells(load: Json) -> Iterable[ET.Element]:
    """Yield the cells of a load: its shape, speedup, latencies, throughput."""
    speedup, latency = load["speedup"], load["latency_ms"]
    yield tag("td", shape(load), class_="number")
    bounds = tag("small", f"{speedup['low']:.2f}\u2013{speedup['high']:.2f}")
    yield tag("td", f"{speedup['value']:.2f}\u00d7", bounds, class_="number")
    for name in ("p50", "p90", "p95", "p99"):
        yield tag("td", number(latency[name], "{:.2f}", FEW), class_="number")
    yield tag("td", f"{load['throughput_per_s']:.1f}", class_="number")


def layers(stages: Sequence[Json]) -> Iterable[ET.Element]:
    """Yield a picture of the heads and neurons that are left, for each stage that changed them."""
    first, keys = stages[0], ("kept_heads", "neurons")
    shown = [
        layer_table(first, stage)
        for before, stage in pairwise(stages)
        if any(stage[key] != before[key] for key in keys)
    ]
    if shown:
        legend = tag("span", tag("i", class_="kept"), " kept, ", tag("i", class_="cut"), " cut.")
        text = f" Layers from the input down, compared with {first['name']}."
        yield tag("p", legend, text, class_="hint")
        yield tag("div", *shown, class_="plots")
    else:
        yield tag("p", "No stage cut heads or neurons.", class_="hint")


def layer_table(first: Json, stage: Json) -> ET.Element:
    """Return layer x head as cells, and the share of neurons left as bars."""
    both = [part[key] for key in ("kept_heads", "neurons") for part in (first, stage)]
    rows = []
    for index, (heads, left, neurons, rest) in enumerate(zip(*both, strict=True)):
        states = ["kept" if head in left else "cut" for head in heads]
        cells = [
            tag("i", class_=state, title=f"layer {index}, head {head}: {state}")
            for head, state in zip(heads, states, strict=True)
        ]
        columns = f"grid-template-columns:repeat({min(len(heads), 16)},minmax(5px,12px))"
        width = f"width:{100 * rest / neurons if neurons else 0:.1f}%"
        rows.append(
            tag(
                "tr",
                tag("th", str(index), scope="row"),
                tag("td", tag("span", *cells, class_="heads", style=columns)),
                tag("td", f"{len(left)}/{len(heads)}", class_="number"),
                tag("td", tag("span", tag("i", style=width), class_="neurons")),
                tag("td", f"{rest}/{neurons}", class_="number"),
            )
        )
    total, kept = (sum(map(len, part["kept_heads"])) for part in (first, stage))
    neurons, rest = (sum(part["neurons"]) for part in (first, stage))
    share = f"{kept} of {total} heads, {rest} of {neurons} neurons left."
    head = _head(("", "heads", "", "neurons", ""))
    return _figure(stage["name"], share, tag("table", head, tag("tbody", *rows), class_="layers"))


def setting(report: Json) -> Iterable[ET.Element]:
    """Yield machine, data and recipe."""
    text = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
    parts = {"Machine": report["machine"], "Data": report["data"]}
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
        yield f"{value / 1e9:.1f} GB" if key.endswith("_bytes") else str(value)


def _head(titles: Iterable[str]) -> ET.Element:
    return tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles)))


def _figure(title: str, caption: str, content: ET.Element) -> ET.Element:
    return tag("figure", tag("figcaption", tag("b", title), " ", caption), content)


def _mb(count: int | None) -> float | None:
    return None if count is None else count / 1e6
