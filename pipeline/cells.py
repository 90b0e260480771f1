"""Heads and neurons of every layer as pictures: what is left of them, and what heads scored."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree as ET

from pipeline.markup import figure, table_head, tag

Json = Mapping[str, Any]


def layers(stages: Sequence[Json]) -> Iterable[ET.Element]:
    """Yield what is left of each layer, for every stage that changed it, and what heads scored."""
    first, keys = stages[0], ("kept_heads", "neurons")
    shown = [
        layer_table(first, stage)
        for before, stage in pairwise(stages)
        if any(stage[key] != before[key] for key in keys)
    ]
    shown += [score_map(stage) for stage in stages if stage["details"].get("scored")]
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
        width = f"width:{100 * rest / neurons if neurons else 0:.1f}%"
        rows.append(
            tag(
                "tr",
                tag("th", str(index), scope="row"),
                tag("td", tag("span", *cells, class_="heads", style=_columns(len(heads), 12))),
                tag("td", f"{len(left)}/{len(heads)}", class_="number"),
                tag("td", tag("span", tag("i", style=width), class_="neurons")),
                tag("td", f"{rest}/{neurons}", class_="number"),
            )
        )
    total, kept = (sum(map(len, part["kept_heads"])) for part in (first, stage))
    neurons, rest = (sum(part["neurons"]) for part in (first, stage))
    share = f"{kept} of {total} heads, {rest} of {neurons} neurons left."
    head = table_head(("", "heads", "", "neurons", ""))
    return figure(stage["name"], share, tag("table", head, tag("tbody", *rows), class_="layers"))


def score_map(stage: Json) -> ET.Element:
    """Return layer x head as cells, coloured by the rank of the score among all of the stage's.

    A rank, since the lowest scores of all layers are what is cut, and a few high ones would leave
    no colour to the others.
    """
    details = stage["details"]
    ranked = sorted(score for of_path in details["scores"].values() for score in of_path)
    patterns: dict[str, list[ET.Element]] = {}
    for path, scores in details["scores"].items():
        layer = (re.findall(r"\.(\d+)\.", path) or [""])[0]
        removed, cells = details["removed"].get(path, ()), []
        for head, score in zip(details["scored"][path], scores, strict=True):
            rank = bisect_left(ranked, score) / max(len(ranked) - 1, 1)
            title = f"layer {layer}, head {head}: {score:.4g}{', cut' * (head in removed)}"
            state = "score gone" if head in removed else "score"
            cells.append(tag("i", class_=state, title=title, style=f"--rank:{100 * rank:.0f}%"))
        row = tag(
            "tr",
            tag("th", layer, scope="row", title=path),
            tag("td", tag("span", *cells, class_="heads", style=_columns(len(cells), 18))),
        )
        patterns.setdefault(re.sub(r"\.\d+\.", ".N.", path, count=1), []).append(row)
    table = tag("table", class_="layers scores")
    for pattern, rows in patterns.items():
        table.append(tag("tbody", tag("tr", tag("th", pattern, colspan="2", class_="path")), *rows))
    caption = (
        f"{stage['step']['criterion']}, from {ranked[0]:.3g} to {ranked[-1]:.3g}: the stronger the"
        " colour, the higher the rank among all heads. Struck through: cut."
    )
    return figure(f"{stage['name']}: scores of the heads", caption, table)


def _columns(count: int, widest: int) -> str:
    return f"grid-template-columns:repeat({min(count, 16)},minmax(5px,{widest}px))"
