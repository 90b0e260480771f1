"""report.html: a run as one page to read on a phone, at a desk, or years later.

The page is one file that asks for nothing from outside and runs no script; its own content policy
forbids both. It is built as a tree of elements, not as text, so that nothing that stands in a
report can become markup. The numbers are those of report.json; nothing is computed anew but the
differences between stages.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from xml.etree import ElementTree as ET

import yaml

from benchmarks.metrics import METRICS
from pipeline import plots
from pipeline.report import check_line, shape

Json = Mapping[str, Any]
Node = ET.Element | str

MARKS: Final = {"pass": "\u2713", "fail": "\u2717", "inconclusive": "?"}
SENTENCES: Final = {
    "pass": "The result is within its budget.",
    "fail": "The result is not within its budget.",
    "inconclusive": "The data cannot say whether the result is within its budget.",
}
FEW: Final = "too few samples"
LOAD_COLUMNS: Final = 7
UNMEASURED: Final = "not measured"
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
        tag("style", STYLE),
    )
    main = tag(
        "main",
        banner(report),
        section("Budget", budget(report)),
        section("Stages", *stage_table(report)),
        section("Plots", tag("div", *drawings(report), class_="plots")),
        section("What is left of each layer", *layers(report["stages"])),
        section("Setting", *setting(report)),
    )
    html = tag("html", head, tag("body", main), lang="en")
    ET.indent(html, "")
    return "<!DOCTYPE html>\n" + ET.tostring(html, encoding="unicode", method="html") + "\n"


def tag(name: str, /, *content: Node, **attributes: str) -> ET.Element:
    """Return an element; `class_` stands for class, `aria_label` for aria-label."""
    element = ET.Element(
        name, {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    )
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
    return tag(
        "header",
        tag("p", "secateur", class_="brand"),
        tag("h1", tag("span", MARKS[outcome], class_="mark", aria_hidden="true"), outcome.title()),
        tag("p", tag("b", SENTENCES[outcome]), " ", result(report), class_="result"),
        definitions(facts),
        class_=f"banner {outcome}",
    )


def result(report: Json) -> str:
    """Return what came out, compared with the baseline, in one sentence."""
    base, last = _baseline(report), report["stages"][-1]
    speed = " and ".join(
        f"{load['speedup']['value']:.2f}\u00d7 at {shape(load)}" for load in last["loads"]
    )
    metric = base["score"]["metric"]
    before, after = base["score"]["value"], last["score"]["value"]
    verb = "fell" if after < before else "rose" if after > before else "stayed"
    change = f" by {abs(after - before):.3g}, from {before:.4g} to {after:.4g}"
    return (
        f"Against {base['name']}, {last['name']} has {last['size_bytes'] / base['size_bytes']:.0%} of"
        f" the size and runs faster by {speed};"
        f" {metric.replace('_', ' ')} {verb}{change if verb != 'stayed' else f' {after:.4g}'}."
    )


def budget(report: Json) -> ET.Element:
    """Return the checks as a table."""
    head = ("check", "allowed", "estimate", "interval", "outcome", "note")
    rows = []
    for check in report["verdict"]["checks"]:
        outcome = check["outcome"]
        sign = "\u2265" if _at_least(check) else "\u2264"
        mark = tag("span", f"{MARKS[outcome]} {outcome}", class_=f"outcome {outcome}")
        low, high = (f"{check[end]:.3g}" for end in ("low", "high"))
        bounds = "exact" if low == high else f"{low} to {high}"
        cells: Sequence[Node] = (
            f"{sign} {check['allowed']:g}",
            f"{check['estimate']:.3g}",
            tag("span", bounds, interval(check), class_="bounds"),
            mark,
            check["note"],
        )
        named = [tag("td", cell, data_label=label) for label, cell in zip(head[1:], cells, strict=True)]
        rows.append(tag("tr", tag("th", check["what"], scope="row"), *named))
    return tag("table", _head(head), tag("tbody", *rows), class_="checks")


def interval(check: Json) -> ET.Element:
    """Return a small picture: the interval and the estimate, before what is allowed."""
    bounds = [check[key] for key in ("low", "high", "estimate", "allowed")]
    width = 1.4 * (max(bounds) - min(bounds)) or 1.0
    start = (max(bounds) + min(bounds) - width) / 2

    def at(value: float) -> float:
        return 100 * (value - start) / width

    limit, low, high = at(check["allowed"]), at(check["low"]), at(check["high"])
    left, right = (limit, 100.0) if _at_least(check) else (0.0, limit)
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
    metric = _baseline(report)["score"]["metric"]
    drop = "drop" if METRICS[metric].higher_is_better else "ratio"
    head = ("stage", metric, drop, "flips", "agreement", "size MB", "parameters", "peak MB", "load")
    head += ("speedup", "p50 ms", "p90", "p95", "p99", "per s")
    groups = [tag("tbody", *stage_rows(report, stage)) for stage in report["stages"]]
    table = tag("table", _head(head), *groups, class_="stages")
    scroll = {"tabindex": "0", "role": "region", "aria_label": "Stages"}
    yield tag("div", table, class_="scroll", **scroll)
    yield tag(
        "p",
        f"Speedup: latency of {report['baseline']} over the stage's, from interleaved runs, with its"
        f" 95 % interval. Drop, flips and agreement against {report['baseline']}. \u2013 {UNMEASURED},"
        f" or for a percentile {FEW}.",
        class_="hint",
    )


def stage_rows(report: Json, stage: Json) -> Iterable[ET.Element]:
    """Yield the rows of a stage."""
    base, fidelity, memory = _baseline(report), stage["fidelity"], stage["memory"]
    value, reference = stage["score"]["value"], base["score"]["value"]
    better = METRICS[stage["score"]["metric"]].higher_is_better
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
    note = tag("span", step_words(stage["step"]), " ", tag("b", stage["gain_note"]), class_="note")
    yield tag("tr", tag("td", note, class_="foot", colspan=str(len(whole) + LOAD_COLUMNS)))


def load_cells(load: Json) -> Iterable[ET.Element]:
    """Yield the cells of a load: its shape, speedup, latencies, throughput."""
    speedup, latency = load["speedup"], load["latency_ms"]
    yield tag("td", shape(load), class_="load")
    bounds = tag("small", f"{speedup['low']:.2f}\u2013{speedup['high']:.2f}")
    yield tag("td", f"{speedup['value']:.2f}\u00d7", bounds, class_="number")
    for name in ("p50", "p90", "p95", "p99"):
        yield tag("td", number(latency[name], "{:.2f}", FEW), class_="number")
    yield tag("td", f"{load['throughput_per_s']:.1f}", class_="number")


def step_words(step: Json | None) -> str:
    """Return a step and its settings in one line."""
    if step is None:
        return "the model as it came"
    settings = [f"{key} {value}" for key, value in step.items() if key != "step"]
    return ", ".join([str(step["step"]), *settings])


def drawings(report: Json) -> Iterable[ET.Element]:
    """Yield the plots: trade-off at each load, what each stage cost and gained, memory and size."""
    stages = report["stages"]
    names = [stage["name"] for stage in stages]
    scores = [stage["score"]["value"] for stage in stages]
    base = _baseline(report)
    metric = base["score"]["metric"]
    better = METRICS[metric].higher_is_better
    limit = _limit(report)
    caption = "Up is better, left is faster. Hollow, dotted: the baseline."
    for index, load in enumerate(stages[0]["loads"]):
        svg = plots.trade_off(
            f"trade{index}",
            names,
            [stage["loads"][index]["latency_ms"]["p50"] for stage in stages],
            scores,
            metric=metric,
            higher_is_better=better,
            baseline=names.index(base["name"]),
            limit=limit,
        )
        dashed = " Dashed: the budget." if limit is not None else ""
        yield _figure(f"{metric} and latency at {shape(load)}", caption + dashed, svg)
    changes = [after - before for before, after in zip(scores, scores[1:], strict=False)]
    colours = [plots.GOOD if (change > 0) == better else plots.BAD for change in changes]
    texts = [f"{change:+.4f}" for change in changes]
    svg = plots.bars("score", names[1:], changes, texts=texts, colours=colours)
    yield _figure(f"Change of {metric} by stage", "Against the stage before.", svg)
    gains = {
        shape(load): [_triple(stage["loads"][index]["gain"]) for stage in stages[1:]]
        for index, load in enumerate(stages[0]["loads"])
    }
    svg = plots.intervals("gain", names[1:], gains, what="times as fast as the stage before")
    yield _figure("Gain in speed by stage", "With its 95 % interval; right of 1 is faster.", svg)
    amounts = {
        "Size on disk": [stage["size_bytes"] for stage in stages],
        "Peak memory of the process": [stage["memory"]["peak_rss_bytes"] for stage in stages],
        "Peak memory of the device": [stage["memory"].get("device_peak_bytes") for stage in stages],
    }
    for index, (title, counts) in enumerate(amounts.items()):
        if any(count is not None for count in counts):
            texts = ["\u2013" if count is None else f"{count / 1e6:.0f}" for count in counts]
            colours = [plots.ACCENT] * len(names)
            svg = plots.bars(f"amount{index}", names, counts, texts=texts, colours=colours)
            yield _figure(title, "In MB.", svg)


def layers(stages: Sequence[Json]) -> Iterable[ET.Element]:
    """Yield a picture of the heads and neurons that are left, for each stage that changed them."""
    first = before = stages[0]
    shown = []
    for stage in stages[1:]:
        if any(stage[key] != before[key] for key in ("kept_heads", "neurons")):
            shown.append(layer_table(first, stage))
        before = stage
    if shown:
        legend = tag("span", tag("i", class_="kept"), " kept ", tag("i", class_="cut"), " cut")
        yield tag("p", legend, f" Layers from the input down, compared with {first['name']}.", class_="hint")
        yield tag("div", *shown, class_="plots")
    else:
        yield tag("p", "No stage cut heads or neurons.", class_="hint")


def layer_table(first: Json, stage: Json) -> ET.Element:
    """Return layer x head as cells, and the share of neurons left as bars."""
    rows, total, kept = [], sum(map(len, first["kept_heads"])), sum(map(len, stage["kept_heads"]))
    every = zip(
        *(first["kept_heads"], stage["kept_heads"], first["neurons"], stage["neurons"]), strict=True
    )
    for index, (heads, left, neurons, rest) in enumerate(every):
        cells = [
            tag("i", class_=state, title=f"layer {index}, head {head}: {state}")
            for head in heads
            for state in ("kept" if head in left else "cut",)
        ]
        width = f"width:{100 * rest / neurons if neurons else 0:.1f}%"
        rows.append(
            tag(
                "tr",
                tag("th", str(index), scope="row"),
                tag("td", tag("span", *cells, class_="heads")),
                tag("td", f"{len(left)}/{len(heads)}", class_="number"),
                tag("td", tag("span", tag("i", style=width), class_="neurons")),
                tag("td", f"{rest}/{neurons}", class_="number"),
            )
        )
    share = f"{kept} of {total} heads, {sum(stage['neurons'])} of {sum(first['neurons'])} neurons left."
    head = tag("thead", tag("tr", *(tag("th", text, scope="col") for text in ("", "heads", "", "neurons", ""))))
    return _figure(stage["name"], share, tag("table", head, tag("tbody", *rows), class_="layers"))


def setting(report: Json) -> Iterable[ET.Element]:
    """Yield machine, data and recipe."""
    text = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
    parts = {"Machine": report["machine"], "Data": report["data"]}
    yield tag(
        "div", *(tag("div", tag("h3", title), definitions(part)) for title, part in parts.items()), class_="plots"
    )
    yield tag("details", tag("summary", "Recipe"), tag("pre", text, tabindex="0"))
    yield tag("p", f"Schema {report['schema']} of report.json.", class_="hint")


def definitions(entries: Json) -> ET.Element:
    """Return a mapping as a list of names with their values."""
    pairs = [
        tag("div", tag("dt", key.removesuffix("_bytes").replace("_", " ")), tag("dd", *_plain(key, value)))
        for key, value in entries.items()
    ]
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
    return tag(
        "thead", tag("tr", *(tag("th", title, scope="col", class_=title) for title in titles))
    )


def _figure(title: str, caption: str, content: ET.Element) -> ET.Element:
    return tag("figure", tag("figcaption", tag("b", title.replace("_", " ")), " ", caption), content)


def _baseline(report: Json) -> Json:
    found: Json = next(stage for stage in report["stages"] if stage["name"] == report["baseline"])
    return found


def _at_least(check: Json) -> bool:
    """Whether the check asks for as much as is allowed, or more."""
    return bool(check["what"].startswith("speedup"))


def _limit(report: Json) -> float | None:
    """Return the score at which the budget is spent, if there is a budget for it."""
    allowed, value = report["recipe"]["budget"], _baseline(report)["score"]["value"]
    if allowed.get("max_drop") is not None:
        return float(value - allowed["max_drop"])
    ratio = allowed.get("max_perplexity_ratio")
    return None if ratio is None else float(value * ratio)


def _triple(ratio: Json) -> tuple[float, float, float]:
    return ratio["value"], ratio["low"], ratio["high"]


def _mb(count: int | None) -> float | None:
    return None if count is None else count / 1e6


STYLE: Final = """
:root { --ground:#f5f6f8; --card:#fff; --ink:#1c2128; --muted:#57606a; --line:#d5dae1;
  --accent:#2f5fd0; --second:#b5530a; --pass:#1a7f37; --fail:#c4231c; --inconclusive:#8a5a00;
  --soft:#eef1f6; }
@media (prefers-color-scheme: dark) { :root { --ground:#0e1116; --card:#161b22; --ink:#e6eaf0;
  --muted:#9aa4b1; --line:#313943; --accent:#7ea6ff; --second:#f0a35e; --pass:#4cc26a;
  --fail:#ff7b72; --inconclusive:#e3b341; --soft:#1f2630; } }
* { box-sizing:border-box; }
html { -webkit-text-size-adjust:100%; text-size-adjust:100%; }
body { margin:0; background:var(--ground); color:var(--ink);
  font:15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width:1240px; margin:0 auto; padding:16px; }
section, .banner { background:var(--card); border:1px solid var(--line); border-radius:10px;
  padding:16px 18px; margin:0 0 16px; min-width:0; overflow-wrap:anywhere; }
h1 { font-size:28px; line-height:1.2; margin:2px 0 8px; display:flex; align-items:center; gap:10px; }
h2 { font-size:17px; margin:0 0 10px; }
h3 { font-size:15px; margin:0 0 4px; }
p { margin:0 0 8px; }
small { display:block; color:var(--muted); font-size:12px; }
.brand { color:var(--muted); font-size:13px; margin:0; }
.hint, figcaption { color:var(--muted); font-size:13px; margin:8px 0 0; }
figcaption b { color:var(--ink); font-size:14px; display:block; }
.pass { --tone:var(--pass); } .fail { --tone:var(--fail); }
.inconclusive { --tone:var(--inconclusive); }
.banner { border-left:8px solid var(--tone); }
.banner h1, .outcome { color:var(--tone); }
.mark { display:grid; place-items:center; width:34px; height:34px; border-radius:50%;
  background:var(--tone); color:var(--card); font-size:20px; }
.result { font-size:16px; max-width:90ch; }
.outcome { font-weight:600; white-space:nowrap; }
dl { display:flex; flex-wrap:wrap; gap:8px 28px; margin:12px 0 0; }
dl div { min-width:0; }
dt { color:var(--muted); font-size:12px; }
dd { margin:0; }
table { border-collapse:collapse; font-size:14px; font-variant-numeric:tabular-nums; }
th, td { text-align:left; vertical-align:top; padding:6px 10px; border-bottom:1px solid var(--line); }
thead th { color:var(--muted); font-weight:500; font-size:12px; white-space:nowrap; }
.number { text-align:right; white-space:nowrap; }
.null { color:var(--muted); cursor:help; }
.checks { width:100%; }
.interval { position:relative; display:inline-block; width:150px; height:14px; margin-top:4px;
  flex:none; background:var(--soft); border-radius:3px; overflow:hidden; }
.bounds { display:flex; flex-wrap:wrap; justify-content:space-between; gap:0 14px; max-width:320px; }
.interval i { position:absolute; }
.fine { top:0; bottom:0; background:color-mix(in srgb, var(--pass) 20%, transparent); }
.range { top:5px; height:4px; background:var(--tone); min-width:1px; }
.estimate { top:3px; width:8px; height:8px; margin-left:-4px; border-radius:50%;
  background:var(--tone); }
.limit { top:0; bottom:0; width:2px; margin-left:-1px; background:var(--ink); }
.scroll { overflow-x:auto; margin:0 -18px; padding:0 18px; }
.stages { min-width:100%; overflow-wrap:normal; }
.stages th, .stages td { padding:6px 8px; border:0; }
.stages thead th:not(:first-child, .load) { text-align:right; }
.stages thead, .stages tbody { border-bottom:1px solid var(--line); }
.stages small { display:inline; margin-left:4px; }
.stages td.foot { padding-top:0; }
.stages tbody th { position:sticky; left:-18px; background:var(--card); z-index:1; }
.note { position:sticky; left:120px; display:inline-block; max-width:min(60rem, 100vw - 185px);
  color:var(--muted); font-size:13px; }
.note b { color:var(--ink); font-weight:500; }
.tag { font-size:11px; font-weight:500; color:var(--muted); border:1px solid var(--line);
  border-radius:4px; padding:0 4px; }
.load { white-space:nowrap; }
.plots { display:grid; grid-template-columns:repeat(auto-fill, minmax(min(100%, 340px), 1fr));
  gap:22px 28px; }
.plots > * { margin:0; min-width:0; }
svg { display:block; width:100%; max-width:520px; height:auto; margin-top:6px; }
svg * { stroke-linejoin:round; stroke-linecap:butt; }
svg text { font-family:inherit !important; paint-order:stroke; stroke:var(--card);
  stroke-width:3px; }
.layers { margin-top:8px; width:100%; font-size:12px; }
.layers th, .layers td { padding:2px 4px; border:0; vertical-align:middle; }
.layers th { color:var(--muted); font-weight:400; }
.heads { display:flex; flex-wrap:wrap; gap:2px; }
.kept, .cut { width:11px; height:11px; border-radius:2px; border:1px solid var(--accent);
  background:var(--accent); display:inline-block; flex:none; }
.cut { border-color:var(--line); background:linear-gradient(135deg, transparent 44%,
  var(--muted) 44% 56%, transparent 56%); }
.neurons { display:block; min-width:44px; height:9px; background:var(--soft); border-radius:2px; }
.neurons i { display:block; height:100%; background:var(--second); border-radius:2px; }
details { margin-top:14px; border-top:1px solid var(--line); padding-top:10px; }
summary { cursor:pointer; font-weight:600; }
pre { overflow-x:auto; background:var(--soft); padding:12px; border-radius:6px; font-size:13px; }
@media (max-width:700px) {
  main { padding:8px; } section, .banner { padding:14px; }
  .scroll { margin:0 -14px; padding:0 14px; } .stages tbody th { left:-14px; }
  .checks thead { display:none; }
  .checks tr { display:grid; grid-template-columns:1fr 1fr; border-bottom:1px solid var(--line);
    padding:8px 0; }
  .checks th { grid-column:1 / -1; font-size:15px; }
  .checks th, .checks td { border:0; padding:2px 0; }
  .checks td[data-label]:not([data-label=""])::before { content:attr(data-label); display:block;
    color:var(--muted); font-size:12px; }
  .checks td:last-child { grid-column:1 / -1; } .checks td:empty { display:none; }
}
@media print { body { background:none; } section { break-inside:avoid; } }
"""
