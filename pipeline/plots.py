"""The plots of report.html, drawn from its JSON."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree as ET

from matplotlib import style

from pipeline.drawing import (
    ACCENT,
    BAD,
    GOOD,
    INK,
    LOOK,
    MUTED,
    SERIES,
    canvas,
    inline,
    label_points,
    name_rows,
)
from pipeline.report import baseline, shape

Json = Mapping[str, Any]
Plot = tuple[str, str, ET.Element]
"""Title, caption and drawing."""


def spent(report: Json) -> float | None:
    """Return the score at which the budget is spent, if there is a budget for it."""
    allowed, value = report["recipe"]["budget"], baseline(report)["score"]["value"]
    if allowed.get("max_perplexity_ratio") is not None:
        return float(value * allowed["max_perplexity_ratio"])
    least = []
    if allowed.get("max_drop") is not None:
        least.append(float(value - allowed["max_drop"]))
    if allowed.get("max_relative_drop") is not None:
        least.append(float(value * (1 - allowed["max_relative_drop"])))
    return max(least, default=None)


def draw_trade_offs(report: Json) -> Iterable[Plot]:
    """Yield score against latency for every load."""
    for index, load in enumerate(report["stages"][0]["loads"]):
        yield draw_trade_off(report, index, load)


def draw_trade_off(report: Json, index: int, load: Json) -> Plot:
    """Return score against latency at the load with this index."""
    stages, metric, limit = report["stages"], baseline(report)["score"]["metric"], spent(report)
    names = _names(stages)
    svg = trade_off(
        f"trade{index}",
        names,
        [stage["loads"][index]["latency_ms"]["p50"] for stage in stages],
        [stage["score"]["value"] for stage in stages],
        [_interval(stage["loads"][index]["latency_ms"]) for stage in stages],
        metric=metric.replace("_", " "),
        higher_is_better=baseline(report)["score"]["higher_is_better"],
        baseline=names.index(report["baseline"]),
        limit=limit,
    )
    dashed = "" if limit is None else " Dashed: the budget."
    caption = (
        "Up is better, left is faster; p50 with its interval. Hollow, dotted: the baseline. Green:"
        f" the Pareto front; no stage is faster and as good.{dashed}"
    )
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


def draw_latencies(stages: Sequence[Json]) -> Iterable[Plot]:
    """Yield how the latencies of every load are spread, where quantiles are known."""
    for index, load in enumerate(stages[0]["loads"]):
        found = [stage["loads"][index]["latency_ms"]["quantiles"] for stage in stages]
        if all(found):
            title = f"Latencies at {shape(load)}"
            caption = "Bands hold the middle 20, 40, 60, 80 and 90 % of the calls; the line is p50."
            yield title, caption, strips(f"spread{index}", _names(stages), found)


def draw_amounts(stages: Sequence[Json]) -> Iterable[Plot]:
    """Yield sizes and peak memories, as far as they are known."""
    amounts = {
        "Size on disk": [stage["size_bytes"] for stage in stages],
        "Peak memory of the process": [stage["memory"]["peak_rss_bytes"] for stage in stages],
        "Peak memory of the device": [stage["memory"].get("device_peak_bytes") for stage in stages],
    }
    for index, (title, counts) in enumerate(amounts.items()):
        if any(count is not None for count in counts):
            texts = ["not measured" if count is None else _megabytes(count) for count in counts]
            colours = [ACCENT] * len(stages)
            svg = bars(f"amount{index}", _names(stages), counts, texts=texts, colours=colours)
            yield title, "In MB.", svg


def trade_off(
    name: str,
    stages: Sequence[str],
    latencies_ms: Sequence[float],
    scores: Sequence[float],
    intervals_ms: Sequence[tuple[float, float]],
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
        intervals_ms: of the latencies.
        metric: what the scores are.
        higher_is_better: else the axis is turned over.
        baseline: the place of the stage that is drawn hollow.
        limit: the score at which the budget is spent, if there is one.
    """
    with style.context(["default", LOOK]):
        figure, axes = canvas(2.9)
        axes.grid(visible=True)
        axes.axhline(scores[baseline], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        if limit is not None:
            axes.axhline(limit, color=BAD, linewidth=1, linestyle=(0, (5, 3)))
        axes.plot(latencies_ms, scores, color=ACCENT, linewidth=1, alpha=0.35)
        best = front(latencies_ms, scores, higher_is_better=higher_is_better)
        steps = [[of_each[place] for place in best] for of_each in (latencies_ms, scores)]
        axes.plot(*steps, color=GOOD, linewidth=2, alpha=0.8, drawstyle="steps-post")
        for place, (latency, score) in enumerate(zip(latencies_ms, scores, strict=True)):
            axes.plot(intervals_ms[place], (score, score), color=ACCENT, linewidth=1.4, zorder=3)
            axes.plot(
                *(latency, score), "o", color=ACCENT, markersize=7, markeredgewidth=1.8, zorder=3,
                fillstyle="none" if place == baseline else "full",
            )  # fmt: skip
        axes.margins(0.1)
        axes.set_xlim(0, max(high for _, high in intervals_ms) * 1.05)
        if not higher_is_better:
            axes.invert_yaxis()
        axes.set_xlabel("p50 latency, ms")
        axes.set_ylabel(metric)
        label_points(figure, axes, stages, list(zip(latencies_ms, scores, strict=True)))
        points = zip(stages, scores, latencies_ms, strict=True)
        alt = "; ".join(f"{stage}: {score:.4g} at {ms:.3g} ms" for stage, score, ms in points)
        return inline(figure, name, f"{metric} against latency. {alt}")


def front(
    latencies_ms: Sequence[float], scores: Sequence[float], *, higher_is_better: bool
) -> list[int]:
    """Return the places that no other one beats in both, or in one at equal other, fastest first.

    Of equal ones the first is named.
    """
    sign = -1 if higher_is_better else 1
    found: list[int] = []
    for place in sorted(range(len(scores)), key=lambda at: (latencies_ms[at], sign * scores[at])):
        if not found or sign * scores[place] < sign * scores[found[-1]]:
            found.append(place)
    return found


def strips(name: str, labels: Sequence[str], quantiles: Sequence[Sequence[float]]) -> ET.Element:
    """Return a strip for each label, the darker the more calls lie there.

    Args:
        name: the plot's, unique in its page.
        labels: one a row.
        quantiles: of each row, in milliseconds, at 0, 5, ..., 100 %.
    """
    with style.context(["default", LOOK]):
        figure, axes = canvas(0.6 + 0.36 * len(labels))
        axes.grid(visible=True, axis="x")
        for row, values in enumerate(quantiles):
            for low in (1, 2, 4, 6, 8):
                left, right = values[low], values[20 - low]
                axes.barh(row, right - left, 0.62, left, color=ACCENT, alpha=0.2, linewidth=0)
            axes.plot((values[10],) * 2, (row - 0.31, row + 0.31), color=INK, linewidth=1.6)
        axes.set_xlim(0, max(values[19] for values in quantiles) * 1.06)
        name_rows(axes, labels)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("ms")
        rows = [
            f"{label}: {values[10]:.3g} ms, 90 % of the calls from {values[1]:.3g} to"
            f" {values[19]:.3g}, the slowest {values[20]:.3g}"
            for label, values in zip(labels, quantiles, strict=True)
        ]
        return inline(figure, name, "; ".join(rows))


def _megabytes(count: int) -> str:
    size = count / 1e6
    return f"{size:.0f}" if size >= 100 else f"{size:.3g}"  # noqa: PLR2004 - three digits


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
        figure, axes = canvas(0.3 + 0.31 * len(labels))
        places = range(len(labels))
        drawn = axes.barh(places, [value or 0.0 for value in values], 0.62, color=colours)
        axes.bar_label(drawn, labels=list(texts), padding=4, fontsize=9)
        below = any(value is not None and value < 0 for value in values)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.margins(x=0.3 if below else 0.22)
        if not below:
            axes.set_xlim(left=0)
        name_rows(axes, labels)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        alt = "; ".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))
        return inline(figure, name, alt)


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
        figure, axes = canvas(0.95 + len(labels) * max(0.31, 0.16 * len(series)))
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
        name_rows(axes, labels)
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
        return inline(figure, name, f"{what}. {'; '.join(rows)}")


def _interval(latency: Json) -> tuple[float, float]:
    """Return the interval of p50, or where it is not known the value alone."""
    low, high = latency["intervals"].get("p50", (None, None))
    value = latency["p50"]
    return value if low is None else low, value if high is None else high


def _names(stages: Sequence[Json]) -> list[str]:
    return [stage["name"] for stage in stages]
