"""The tables of report.html: what came of each stage, its latencies, its decisions.

On a phone every row is a card: each cell carries its column's title for that.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from xml.etree import ElementTree as ET

from benchmarks.outcomes import CLOSE
from pipeline.markup import UNMEASURED, Node, number, table_head, tag
from pipeline.report import baseline, notes, shape, step_words

Json = Mapping[str, Any]
Cells = dict[str, list[Node]]
"""What stands in the cells of a row, by the title of the column."""

FEW: Final = "too few samples"
PERCENTILES: Final = ("p50", "p90", "p95", "p99")
DECISIONS: Final = (
    ("agreement", "agreement", "{:.4f}", "share of equal decisions"),
    ("broken", "broken", "{:g}", "right before, wrong now"),
    ("mended", "mended", "{:g}", "wrong before, right now"),
    ("KL mean", "kl_mean", "{:.2g}", "divergence of the probabilities from its own, in nats"),
    ("KL p99", "kl_p99", "{:.2g}", ""),
    ("margin", "margin", "{:.3f}", "how much more probable the first class was than the second"),
    ("close", "close", "{:.3f}", f"share of decisions with a margin below {CLOSE:g}"),
    ("perplexity", "perplexities", "{:.4g}", "of a document: the median, and 5 to 95 %"),
    ("ratio", "perplexity_ratios", "{:.4g}", "of that to the baseline's"),
)
"""Title, key of the fidelity, form and meaning of each column."""


def stage_table(report: Json) -> Iterable[ET.Element]:
    """Yield the table of stages, a row for each load, and what its marks mean."""
    drop = "drop" if baseline(report)["score"]["higher_is_better"] else "ratio"
    first = report["stages"][0]
    titles = [*_of_stage(report, first), *_of_load(first["loads"][0])]
    groups = [tag("tbody", *_stage_rows(report, stage)) for stage in report["stages"]]
    yield _table("Stages", titles, groups)
    yield tag(
        "p",
        f"Speedup: latency of {report['baseline']} over the stage's, from interleaved runs, with"
        f" its 95 % interval. {drop.title()} and flips against {report['baseline']}."
        f" \u2013 {UNMEASURED}.",
        class_="hint",
    )


def _stage_rows(report: Json, stage: Json) -> Iterable[ET.Element]:
    span, whole = len(stage["loads"]), _of_stage(report, stage)
    tags = [tag("span", "baseline", class_="tag")] if stage is baseline(report) else []
    name = tag("th", stage["name"], " ", *tags, scope="rowgroup", rowspan=str(span + 1))
    cells = _cells(whole, rowspan=str(span))
    for index, load in enumerate(stage["loads"]):
        each = _of_load(load)
        yield tag("tr", *(() if index else (name, *cells)), *_cells(each, class_="number quarter"))
    note = tag("span", step_words(stage["step"]), class_="note")
    gain, *rest = notes(stage) or [""]
    if gain:
        note.append(tag("b", gain))
    for line in rest:
        note.append(tag("br"))
        note[-1].tail = line
    yield tag("tr", tag("td", note, class_="foot", colspan=str(len(whole) + len(each))))


def _of_stage(report: Json, stage: Json) -> Cells:
    memory, metric = stage["memory"], stage["score"]["metric"]
    value, reference = stage["score"]["value"], baseline(report)["score"]["value"]
    peak: list[Node] = [_mb(memory["peak_rss_bytes"], "{:.0f}")]
    if memory.get("device_peak_bytes") is not None:
        peak.append(tag("small", _mb(memory["device_peak_bytes"], "{:.0f} on device")))
    better = stage["score"]["higher_is_better"]
    change = f"{reference - value or 0.0:.4f}" if better else f"{value / reference:.4f}"
    return {
        metric: [f"{value:#.4g}"],
        "drop" if better else "ratio": [change],
        "flips": [number(stage["fidelity"]["flips"])],
        "size MB": [_mb(stage["size_bytes"], "{:.1f}")],
        "parameters": [f"{stage['parameters'] / 1e6:.2f} M"],
        "peak MB": peak,
    }


def _of_load(load: Json) -> Cells:
    speedup = load["speedup"]
    bounds = tag("small", f"{speedup['low']:.2f}\u2013{speedup['high']:.2f}")
    return {
        "load": [shape(load)],
        "speedup": [f"{speedup['value']:.2f}\u00d7", bounds],
        "p50 ms": [_ms(load["latency_ms"]["p50"])],
        "per s": [f"{load['throughput_per_s']:.1f}"],
    }


def latencies(stages: Sequence[Json]) -> Iterable[ET.Element]:
    """Yield the table of latencies, a row for each load, and what its columns are."""
    groups = []
    for stage in stages:
        rows = [
            tag("tr", *_cells(_of_calls(load), class_="number quarter")) for load in stage["loads"]
        ]
        rows[0].insert(0, tag("th", stage["name"], scope="rowgroup", rowspan=str(len(rows))))
        groups.append(tag("tbody", *rows))
    yield _table("Latency", list(_of_calls(stages[0]["loads"][0])), groups)
    yield tag(
        "p",
        "In milliseconds, with exact 95 % intervals for calls that do not depend on each other."
        " Worth: of how many such calls these tell, as neighbours are alike. First: the first call"
        f" in a fresh process. \u2013 {FEW}.",
        class_="hint",
    )


def _of_calls(load: Json) -> Cells:
    latency, resident = load["latency_ms"], load.get("resident_ms")
    return {
        "load": [shape(load)],
        **{name: list(_percentile(latency, name)) for name in PERCENTILES},
        "calls": [str(latency["samples"])],
        "worth": [number(latency["effective_samples"], "{:.0f}")],
        "first": [_ms(load["first_call_ms"])],
        **({"without copies": [_ms(resident)]} if resident is not None else {}),
        **({"joules": [f"{load['joules']:.3g}"]} if load.get("joules") is not None else {}),
    }


def _percentile(latency: Json, name: str) -> Iterable[Node]:
    """Yield a percentile with its interval, as far as they are known."""
    value = latency[name]
    yield number(None, missing=FEW) if value is None else _ms(value)
    low, high = latency["intervals"].get(name, (None, None))
    if low is not None:
        yield tag("small", f"\u2265 {_ms(low)}" if high is None else f"{_ms(low)}\u2013{_ms(high)}")


def decisions(report: Json) -> Iterable[ET.Element]:
    """Yield the table of how far each stage's decisions are from the baseline's."""
    found = [stage["fidelity"] for stage in report["stages"]]
    known = [column for column in DECISIONS if any(f[column[1]] is not None for f in found)]
    if not known:
        yield tag("p", "Nothing is decided: the answers are numbers.", class_="hint")
        return
    groups = []
    for stage, fidelity in zip(report["stages"], found, strict=True):
        cells = {title: list(_spread(fidelity[key], form)) for title, key, form, _ in known}
        row = tag(
            "tr", tag("th", stage["name"], scope="row"), *_cells(cells, class_="number quarter")
        )
        groups.append(tag("tbody", row))
    yield _table("Decisions", [title for title, *_ in known], groups)
    meanings = "; ".join(f"{title}: {meaning}" for title, _, _, meaning in known if meaning)
    text = f"On the gate's examples, against {report['baseline']}. {meanings[0].upper()}"
    yield tag("p", f"{text}{meanings[1:]}.", class_="hint")


def _spread(value: Any, form: str) -> Iterable[Node]:
    """Yield a number, or of three quantiles the middle one with the others."""
    if isinstance(value, Mapping):
        yield number(value["p50"], form)
        yield tag("small", "\u2013".join(form.format(value[end]) for end in ("p5", "p95")))
    else:
        yield number(value, form)


def _table(label: str, titles: Sequence[str], groups: Sequence[ET.Element]) -> ET.Element:
    """Return a table of stages, which is scrolled where it is wider than the page."""
    table = tag("table", table_head(("stage", *titles)), *groups, class_="stages")
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=label)


def _cells(contents: Cells, **attributes: str) -> list[ET.Element]:
    attributes = {"class_": "number"} | attributes
    return [
        tag("td", *content, data_label=title, **attributes) for title, content in contents.items()
    ]


def _ms(value: float) -> str:
    """Return milliseconds with four digits, or all that stand before the point."""
    return f"{value:.{max(0, 3 - len(str(int(value))) + 1)}f}"


def _mb(count: int | None, form: str) -> Node:
    return number(None if count is None else count / 1e6, form)
