"""The page holds what the report says, asks for nothing from outside, and cannot be injected."""

import re
from functools import cache

import pytest
from html_tree import Tree
from reports import SAMPLES, content, failed, inconclusive, passed

from pipeline.page import page


@cache
def written(name: str) -> str:
    """Return the page of a sample, made once."""
    return page(content(SAMPLES[name]()))


@pytest.fixture(params=SAMPLES)
def name(request: pytest.FixtureRequest) -> str:
    """Give the name of each sample in turn."""
    return str(request.param)


def test_page_is_balanced_html_with_every_stage_and_check(name):
    sample, tree = content(SAMPLES[name]()), Tree(written(name))
    for stage in sample["stages"]:
        assert stage["name"] in tree.text
        assert stage["gain_note"] in tree.text
    for check in sample["verdict"]["checks"]:
        assert check["what"] in tree.text
        assert check["note"] in tree.text
    for known in (sample["machine"]["cpu"], sample["data"]["source"], "gate 2000"):
        assert known in tree.text
    banner = tree.of_class("banner")
    assert [sample["verdict"]["outcome"] in b["class"].split() for b in banner] == [True]
    assert sample["verdict"]["outcome"].title() in tree.text


def test_page_is_the_same_every_time(name):
    assert page(content(SAMPLES[name]())) == written(name)


def test_page_asks_for_nothing_from_outside(name):
    text = written(name)
    for element, attributes in Tree(text).elements:
        assert element not in {"script", "link", "iframe", "object", "embed", "base", "img"}
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in {"src", "href", "srcset", "data", "action", "xlink:href"}:
                assert value.startswith("#")
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert all(part.startswith("#") for part in text.split("url(")[1:])


def test_ids_are_unique_and_every_reference_has_its_target(name):
    text = written(name)
    ids = [a["id"] for _, a in Tree(text).elements if "id" in a]
    assert ids
    assert len(ids) == len(set(ids))
    references = [part.split(")")[0] for part in text.split("url(#")[1:]]
    references += [part.split('"')[0] for part in text.split('href="#')[1:]]
    assert references
    assert set(references) <= set(ids)


def test_drawings_take_their_colours_from_the_page(name):
    svgs = written(name).split("<svg")[1:]
    assert len(svgs) == 2 * len(SAMPLES[name]().stages[0].loads) + 4
    for svg in svgs:
        drawing = svg.split("</svg>")[0]
        assert "var(--ink)" in drawing
        assert not re.search(r":\s*#[0-9a-f]{3,6}", drawing)
        assert 'role="img"' in drawing
        assert "aria-label=" in drawing


def test_what_comes_from_the_report_cannot_become_markup():
    hostile = "<script>alert('$x$ & \u00e9 \u4e2d')</script>"
    sample = content(failed())
    sample["recipe"]["model"]["source"] = hostile
    sample["data"]["source"] = hostile
    sample["machine"]["versions"] = {hostile: hostile}
    sample["artifact"] = f'"><img src=x onerror=1>{hostile}'
    sample["baseline"] = hostile
    sample["stages"][0]["name"] = hostile
    sample["stages"][1]["gain_note"] = hostile
    sample["stages"][1]["step"] = {"step": hostile, hostile: "</style></title>"}
    sample["verdict"]["checks"][0] |= {"what": hostile, "note": hostile}
    tree = Tree(page(sample))
    known = {element for element, _ in Tree(written("fail")).elements}
    assert {element for element, _ in tree.elements} == known
    assert tree.text.count(hostile) >= 9


def test_null_is_a_dash_with_its_reason():
    sample = content(inconclusive())
    found = [a["title"] for a in Tree(written("inconclusive")).of_class("null")]
    loads = sum(len(stage["loads"]) for stage in sample["stages"])
    # p99 of every load; flips of every stage; the machine's gpu, its driver, governor and quota
    assert found.count("too few samples") == loads
    assert "5 to 95 %" in Tree(written("inconclusive")).text
    assert found.count("not measured") == len(sample["stages"]) + 4


def test_unknown_memory_is_neither_zero_nor_drawn():
    sample = content(failed())
    for stage in sample["stages"]:
        stage["memory"] = {"peak_rss_bytes": None, "device_peak_bytes": None}
    sample["stages"][0]["memory"]["device_peak_bytes"] = 77_000_000
    text = page(sample)
    assert "77 on device" in text
    assert "Peak memory of the process" not in text
    assert "Peak memory of the device" in text
    assert "prune: not measured" in text


def test_times_without_copies_have_a_column_of_their_own():
    sample = content(failed())
    assert "without copies" not in page(sample)
    for stage in sample["stages"]:
        for load in stage["loads"]:
            load["resident_ms"] = 77.25
    text = Tree(page(sample)).text
    assert "without copies" in text
    assert text.count("77.2") >= len(sample["stages"])


def test_where_nothing_is_decided_the_page_says_so():
    sample = content(failed())
    for stage in sample["stages"]:
        stage["fidelity"] = dict.fromkeys(stage["fidelity"])
    assert "Nothing is decided: the answers are numbers." in Tree(page(sample)).text


def test_a_score_of_zero_is_drawn_like_any_other():
    sample = content(failed())
    for stage in sample["stages"]:
        stage["score"]["value"] = 0.0
    assert "accuracy stayed at 0.000" in Tree(page(sample)).text


def test_decisions_are_told_in_the_words_of_the_task():
    text = Tree(written("pass")).text
    assert "broken" in text
    assert "perplexity" not in text
    text = Tree(written("inconclusive")).text
    assert "broken" not in text
    assert "1.315" in text  # the ratio of the median document, 31.7 / 24.11


def test_a_busy_machine_is_said_on_the_page():
    sample = content(passed())
    sample["machine"]["cpu_stalled_before_and_after"] = [0.05, 0.4]
    assert "tasks waited 40% of the time" in Tree(page(sample)).text
    assert not Tree(written("pass")).of_class("busy")


def test_result_in_words():
    text = Tree(written("pass")).text
    assert (
        "export has 27% of the size and a speed of 2.36\u00d7 at 1x128, 2.36\u00d7 at 8x128" in text
    )
    assert "accuracy fell by 0.008, from 0.9105 to 0.9025." in text
    text = Tree(written("inconclusive")).text
    assert "perplexity rose by 1.29, from 24.11 to 25.40." in text
    assert "batch 1;" in Tree(written("fail")).text


def test_interval_lies_on_the_side_of_the_limit_that_the_outcome_says():
    tree = Tree(written("pass"))
    places = [re.findall(r"[\d.]+", a["style"]) for a in tree.of_class("range")]
    limits = [re.findall(r"[\d.]+", a["style"]) for a in tree.of_class("limit")]
    drop, speedup = places[:2]
    assert float(drop[0]) + float(drop[1]) < float(limits[0][0])
    assert float(speedup[0]) > float(limits[1][0])
