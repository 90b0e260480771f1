"""The plots of report.html, as SVG elements that lie in the page.

matplotlib draws, and its global state is as before afterwards. The idea is that one drawing serves
the light and the dark page: each colour is a placeholder that becomes a CSS variable, the ground is
transparent, and text stays text, in the page's font. Ids get the plot's name in front, so that many
drawings can share a page.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final
from xml.etree import ElementTree as ET

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from pipeline.report import shape

Json = Mapping[str, Any]
Point = tuple[float, float]
Plot = tuple[str, str, ET.Element]
"""Title, caption and drawing."""

INK, MUTED, LINE = "#000001", "#000002", "#000003"
ACCENT, SECOND, GOOD, BAD = "#000004", "#000005", "#000006", "#000007"
VARIABLES: Final = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    ACCENT: "--accent",
    SECOND: "--second",
    GOOD: "--pass",
    BAD: "--fail",
}
"""Placeholder colour -> CSS variable of the page."""

WIDTH: Final = 4.6
"""Inches; 331 units of the drawing, about a phone's width, so that 9 units are legible there."""
LOOK: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",  # the same ids in every run
    "text.parse_math": False,  # a stage may be called $x$
    "font.sans-serif": ["DejaVu Sans"],  # it comes with matplotlib, and is wider than the page's
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
SERIES: Final = ((ACCENT, "o"), (SECOND, "s"), (INK, "D"), (MUTED, "^"))
"""Colour and marker of each series; the marker tells them apart without colour."""


def draw(report: Json) -> Iterable[Plot]:
    """Yield all plots of a report."""
    for index, load in enumerate(report["stages"][0]["loads"]):
        yield draw_trade_off(report, index, load)
    yield draw_changes(report["stages"])
    yield draw_gains(report["stages"])
    yield from draw_amounts(report["stages"])


def baseline(report: Json) -> Json:
    """Return the stage that the others are compared with."""
    found: Json = next(stage for stage in report["stages"] if stage["name"] == report["baseline"])
    return found


def spent(report: Json) -> float | None:
    """Return the score at which the budget is spent, if there is a budget for it."""
    allowed, value = report["recipe"]["budget"], baseline(report)["score"]["value"]
    if allowed.get("max_drop") is not None:
        return float(value - allowed["max_drop"])
    ratio = allowed.get("max_perplexity_ratio")
    return None if ratio is None else float(value * ratio)


def draw_trade_off(report: Json, index: int, load: Json) -> Plot:
    """Return score against latency at the load with this index."""
    stages, metric, limit = report["stages"], baseline(report)["score"]["metric"], spent(report)
    names = _names(stages)
    svg = trade_off(
        f"trade{index}",
        names,
        [stage["loads"][index]["latency_ms"]["p50"] for stage in stages],
        [stage["score"]["value"] for stage in stages],
        metric=metric.replace("_", " "),
        higher_is_better=baseline(report)["score"]["higher_is_better"],
        baseline=names.index(report["baseline"]),
        limit=limit,
    )
    dashed = "" if limit is None else " Dashed: the budget."
    caption = f"Up is better, left is faster. Hollow, dotted: the baseline.{dashed}"
    return f"Latency and {metric.replace('_', ' ')} at {shape(load)}", caption, svg


def draw_changes(stages: Sequence[Json]) -> Plot:
    """Return how much each stage changed the score."""
    metric = stages[0]["score"]["metric"]
    changes = [b["score"]["value"] - a["score"]["value"] for a, b in pairwise(stages)]
    better = stages[0]["score"]["higher_is_better"]
    colours = [GOOD if (change > 0) == better else BAD for change in changes]
    texts = [f"{change:+.4f}" for change in changes]
    svg = bars("score", _names(stages[1:]), changes, texts=texts, colours=colours)
    return f"Change of {metric.replace('_', ' ')} by stage", "Against the stage before.", svg


def draw_gains(stages: Sequence[Json]) -> Plot:
    """Return how much faster each stage made it."""
    gains = {
        shape(load): [
            tuple(stage["loads"][index]["gain"][key] for key in ("value", "low", "high"))
            for stage in stages[1:]
        ]
        for index, load in enumerate(stages[0]["loads"])
    }
    svg = intervals("gain", _names(stages[1:]), gains, what="times as fast as the stage before")
    return "Gain in speed by stage", "With its 95 % interval; right of 1 is faster.", svg


def draw_amounts(stages: Sequence[Json]) -> Iterable[Plot]:
    """Yield sizes and peak memories, as far as they are known."""
    amounts = {
        "Size on disk": [stage["size_bytes"] for stage in stages],
        "Peak memory of the process": [stage["memory"]["peak_rss_bytes"] for stage in stages],
        "Peak memory of the device": [stage["memory"].get("device_peak_bytes") for stage in stages],
    }
    for index, (title, counts) in enumerate(amounts.items()):
        if any(count is not None for count in counts):
            texts = ["not measured" if count is None else f"{count / 1e6:.0f}" for count in counts]
            colours = [ACCENT] * len(stages)
            svg = bars(f"amount{index}", _names(stages), counts, texts=texts, colours=colours)
            yield title, "In MB.", svg


def trade_off(
    name: str,
    stages: Sequence[str],
    latencies_ms: Sequence[float],
    scores: Sequence[float],
    *,
    metric: str,
    higher_is_better: bool,
    baseline: int,
    limit: float | None,
) -> ET.Element:
    """Return score against latency: the stages joined in order, up is better, left is faster.

    Args:
        name: the plot's, unique in its page.
        stages: their names.
        latencies_ms: of each stage.
        scores: of each stage.
        metric: what the scores are.
        higher_is_better: else the axis is turned over.
        baseline: the place of the stage that is drawn hollow.
        limit: the score at which the budget is spent, if there is one.
    """
    with style.context(["default", LOOK]):
        figure, axes = _canvas(2.9)
        axes.grid(visible=True)
        axes.axhline(scores[baseline], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        if limit is not None:
            axes.axhline(limit, color=BAD, linewidth=1, linestyle=(0, (5, 3)))
        axes.plot(latencies_ms, scores, color=ACCENT, linewidth=1.2, alpha=0.45)
        for place, (latency, score) in enumerate(zip(latencies_ms, scores, strict=True)):
            axes.plot(
                *(latency, score), "o", color=ACCENT, markersize=7, markeredgewidth=1.8, zorder=3,
                fillstyle="none" if place == baseline else "full",
            )  # fmt: skip
        axes.margins(0.1)
        axes.set_xlim(0, max(latencies_ms) * 1.08)
        if not higher_is_better:
            axes.invert_yaxis()
        axes.set_xlabel("p50 latency, ms")
        axes.set_ylabel(metric)
        _label_points(figure, axes, stages, list(zip(latencies_ms, scores, strict=True)))
        points = zip(stages, scores, latencies_ms, strict=True)
        alt = "; ".join(f"{stage}: {score:.4g} at {ms:.3g} ms" for stage, score, ms in points)
        return _inline(figure, name, f"{metric} against latency. {alt}")


def bars(
    name: str,
    labels: Sequence[str],
    values: Sequence[float | None],
    *,
    texts: Sequence[str],
    colours: Sequence[str],
) -> ET.Element:
    """Return a lying bar for each label, with its text at the end; None is a text alone."""
    with style.context(["default", LOOK]):
        figure, axes = _canvas(0.3 + 0.31 * len(labels))
        places = range(len(labels))
        drawn = axes.barh(places, [value or 0.0 for value in values], 0.62, color=colours)
        axes.bar_label(drawn, labels=list(texts), padding=4, fontsize=9)
        below = any(value is not None and value < 0 for value in values)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.margins(x=0.3 if below else 0.22)
        if not below:
            axes.set_xlim(left=0)
        _name_rows(axes, labels)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        alt = "; ".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))
        return _inline(figure, name, alt)


def intervals(
    name: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[Sequence[float]]],
    *,
    what: str,
) -> ET.Element:
    """Return ratios with their intervals around the line at 1.

    Args:
        name: the plot's, unique in its page.
        labels: one a row.
        series: name of the series -> value, low and high of each row.
        what: the ratio's name.
    """
    with style.context(["default", LOOK]):
        figure, axes = _canvas(0.95 + len(labels) * max(0.31, 0.16 * len(series)))
        axes.grid(visible=True, axis="x")
        axes.axvline(1, color=MUTED, linewidth=1)
        for index, (title, ratios) in enumerate(series.items()):
            colour, marker = SERIES[index % len(SERIES)]
            offset = 0.6 * ((index + 0.5) / len(series) - 0.5)
            values = [value for value, _, _ in ratios]
            below = [value - low for value, low, _ in ratios]
            above = [high - value for value, _, high in ratios]
            axes.errorbar(
                *(values, [place + offset for place in range(len(labels))]), xerr=[below, above],
                fmt=marker, color=colour, markersize=5, linewidth=1.6, capsize=2.5, label=title,
            )  # fmt: skip
        _name_rows(axes, labels)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(what)
        axes.margins(x=0.08)
        figure.legend(
            loc="outside upper left", ncols=4, frameon=False, fontsize=9, labelcolor=INK,
            handletextpad=0.2, columnspacing=1.2,
        )  # fmt: skip
        rows = [
            f"{label} at {title}: {value:.2f} ({low:.2f} to {high:.2f})"
            for title, ratios in series.items()
            for label, (value, low, high) in zip(labels, ratios, strict=True)
        ]
        return _inline(figure, name, f"{what}. {'; '.join(rows)}")


def _names(stages: Sequence[Json]) -> list[str]:
    return [stage["name"] for stage in stages]


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")
    return figure, figure.add_subplot()


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Write a label before each row, the first one on top."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels], color=INK)
    axes.tick_params(length=0)


def _label_points(
    figure: Figure, axes: Axes, labels: Sequence[str], points: Sequence[Point]
) -> None:
    """Write each label near its point, where it covers no other label or point.

    Of such places the one is best that covers least of the line that joins the points. A label that
    had to go far gets a thin line to its point.
    """
    figure.draw_without_rendering()  # lays out, so that pixels are known
    frame, pixels = axes.get_window_extent(), axes.transData.transform(points)
    taken = [_box(pixel, 9, 9) for pixel in pixels]
    joined = [
        _box(start + (end - start) * step / 20, 2, 2)
        for start, end in pairwise(pixels)
        for step in range(21)
    ]

    def cost(box: Bbox) -> int:
        inside = (
            frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        )
        return 100 * box.count_overlaps(taken) + 50 * (not inside) + box.count_overlaps(joined)

    for label, point, (x, y) in zip(labels, points, pixels, strict=True):
        text = axes.annotate(_short(label), point, fontsize=9, ha="center", va="center")
        extent = text.get_window_extent()
        places = [
            (
                right * (extent.width / 2 + 7 * far),
                up * (extent.height / 2 + 7 * far),
                far,
            )
            for far in (1, 2, 4, 6)
            for right, up in (
                (1, 0),
                (-1, 0),
                (0, 1),
                (0, -1),
                (1, 1),
                (-1, 1),
                (1, -1),
                (-1, -1),
            )
        ]
        boxes = [_box((x + dx, y + dy), extent.width, extent.height) for dx, dy, _ in places]
        best = min(range(len(boxes)), key=lambda place: cost(boxes[place]))
        taken.append(boxes[best])
        dx, dy, far = places[best]
        place = tuple(axes.transData.inverted().transform((x + dx, y + dy)))
        text.set_position(place)
        if far > 1:
            line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 4}
            axes.annotate("", point, place, arrowprops=line)


def _box(centre: Sequence[float], width: float, height: float) -> Bbox:
    x, y = centre
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _short(text: str, longest: int = 14) -> str:
    """Return a text that fits, in the characters that the drawing's font is sure to have."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return plain if len(plain) <= longest else plain[: longest - 2] + ".."


def _inline(figure: Figure, name: str, alt: str) -> ET.Element:
    """Return the figure as an element for the page, described by `alt`."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    svg = ET.fromstring(text)  # noqa: S314 - our own drawing
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in [key for key in element.attrib if "}" in key]:  # xlink:href
            element.set(key.rpartition("}")[2], element.attrib.pop(key))
        for child in [child for child in element if child.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
    svg.attrib = {"viewBox": svg.attrib["viewBox"], "role": "img", "aria-label": alt}
    return svg
