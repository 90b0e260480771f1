"""Plots show what the numbers say."""

import re
from itertools import combinations
from xml.etree import ElementTree as ET

import pytest
from reports import content, inconclusive, passed

from pipeline import plots


def texts_of(svg: ET.Element) -> dict[str, tuple[float, float]]:
    """Return every text of a drawing with its place."""
    found = {}
    for element in svg.iter("text"):
        found[element.text or ""] = (float(element.attrib["x"]), float(element.attrib["y"]))
    return found


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_up_is_better_and_labels_do_not_overlap(higher_is_better):
    names = ["first", "second", "third", "fourth", "fifth"]
    svg = plots.trade_off(
        "name",
        names,
        [9.0, 4.0, 4.01, 4.0, 4.02],
        [0.9, 0.8, 0.8, 0.801, 0.7999],
        [(9.0, 9.0), (4.0, 4.0), (4.0, 4.1), (4.0, 4.0), (4.0, 4.1)],
        metric="score",
        higher_is_better=higher_is_better,
        baseline=0,
        limit=None,
    )
    texts = texts_of(svg)
    # y grows downwards
    assert (texts["0.90"][1] < texts["0.80"][1]) == higher_is_better
    for one, other in combinations(names, 2):
        (x1, y1), (x2, y2) = texts[one], texts[other]
        assert abs(y1 - y2) > 8 or abs(x1 - x2) > 30


def test_the_front_is_what_no_other_stage_beats():
    latencies, scores = [9, 4, 5, 4, 6, 9], [0.9, 0.7, 0.8, 0.7, 0.75, 0.85]
    assert plots.front(latencies, scores, higher_is_better=True) == [1, 2, 0]
    assert plots.front(latencies, scores, higher_is_better=False) == [1]


def test_a_strip_is_as_wide_as_the_calls_are_apart():
    steady, wide = [10.0] * 21, [float(at) for at in range(21)]
    svg = plots.strips("name", ["steady", "wide"], [steady, wide])
    assert (
        "steady: 10 ms, 90 % of the calls from 10 to 10, the slowest 10" in svg.attrib["aria-label"]
    )
    assert "wide: 10 ms, 90 % of the calls from 1 to 19, the slowest 20" in svg.attrib["aria-label"]
    boxes = [p.attrib["d"].split() for p in svg.iter("path") if "opacity" in p.attrib["style"]]
    widths = [float(places[4]) - float(places[1]) for places in boxes]
    assert widths[:5] == [0] * 5
    shares = [width / widths[5] for width in widths[5:]]
    assert shares == pytest.approx([1, 16 / 18, 12 / 18, 8 / 18, 4 / 18], abs=1e-4)


def test_worse_is_red_whatever_the_direction():
    for sample, first in ((passed(), "fail"), (inconclusive(), "fail")):
        _, _, svg = plots.draw_changes(content(sample)["stages"])
        tones = re.findall(r"fill: var\(--(pass|fail)\)", ET.tostring(svg, encoding="unicode"))
        assert tones[:2] == [first, "pass"]  # prune costs, finetune mends
