"""The page holds what the report says, asks for nothing from outside, and cannot be injected."""

import json
import re
from dataclasses import asdict, replace
from functools import cache
from html.parser import HTMLParser
from itertools import combinations
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks.machine import Machine
from pipeline import plots
from pipeline.page import layers, page
from pipeline.report import Check, Load, Report, Score, Stage, Verdict

VOID = {"meta", "br", "img", "link", "input", "hr"}
HEADS, NEURONS, LAYERS = 12, 1536, 6
FULL = (tuple(range(HEADS)),) * LAYERS
CUT = (
    (0, 1, 2, 5, 6, 8, 11),
    (1, 2, 3, 4, 7, 9),
    (0, 3),
    (0, 1, 4, 6, 7, 8, 9, 10, 11),
    (2, 5, 8),
    FULL[0],
)


class Tree(HTMLParser):
    """Reads a page: every element with its attributes, the text, and that all tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]


def ratio(value: float, spread: float = 0.04) -> dict[str, float]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def load(batch: int, sequence: int | None, ms: float, base: float, before: float) -> Load:
    latency = {"p50": ms, "p90": ms * 1.07, "p95": ms * 1.1, "p99": None, "samples": 60}
    speedup, gain = (ratio(other / ms, 0.04 * (other != ms)) for other in (base, before))
    return Load(batch, sequence, latency, ms * 9, batch * 1e3 / ms, speedup, gain)


def stages(
    names: list[str],
    metric: str,
    scores: list[float],
    times: list[float],
    shapes: list[tuple[int, int | None]],
) -> tuple[Stage, ...]:
    """Return stages of which those from the second on have lost heads and neurons."""
    found = []
    steps: dict[str, dict[str, Any]] = {
        "prune": {
            "step": "prune",
            "heads": 0.4,
            "neurons": 0.5,
            "criterion": "importance",
        },
        "finetune": {"step": "finetune", "epochs": 1.0, "teacher": "original"},
        "quantize": {"step": "quantize", "method": "int8-dynamic", "embeddings": False},
        "export": {"step": "export", "format": "onnx"},
    }
    for at, (name, score, ms) in enumerate(zip(names, scores, times, strict=True)):
        binary = metric == "accuracy"
        heads = CUT if at else FULL
        neurons = (700, 800, 400, 1100, 608, 1000) if at else (NEURONS,) * LAYERS
        found.append(
            Stage(
                name=name,
                step=steps.get(name.partition("-")[0]) if at else None,
                format="onnx" if at > 2 else "torch",
                runtime="onnxruntime",
                folder=f"runs/demo/{at}-{name}",
                seconds=12.5 * at,
                parameters=22_713_986 - 5_900_000 * bool(at),
                size_bytes=[90_868_376, 67_000_000, 67_000_000, 24_500_000, 24_100_000][at],
                score=Score(metric, score, 2000, metric != "perplexity"),
                fidelity={
                    "agreement": 1.0 - 0.013 * at,
                    "flips": 31 * at if binary else None,
                    "kl_mean": 0.01 * at if binary else None,
                },
                loads=tuple(
                    load(
                        b,
                        s,
                        ms * b**0.9,
                        times[0] * b**0.9,
                        times[max(at - 1, 0)] * b**0.9,
                    )
                    for b, s in shapes
                ),
                memory={
                    "peak_rss_bytes": 512_000_000 - 61_000_000 * at,
                    "import_floor_bytes": 190_000_000,
                    "device_peak_bytes": None,
                },
                load_seconds=0.4,
                heads=tuple(map(len, heads)),
                neurons=neurons,
                kept_heads=heads,
                gain_note=""
                if not at
                else "1.42 times as fast (1.36-1.48)"
                if at < 4
                else "does not pay: no gain in latency, memory or size",
            )
        )
    return tuple(found)


def report(
    checks: tuple[Check, ...], outcome: Any, found: tuple[Stage, ...], **budget: float
) -> Report:
    machine = Machine(
        system="Linux-6.1.0-x86_64-with-glibc2.36",
        cpu="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        cpu_flags=("avx2", "avx512f", "avx512_vnni", "amx_int8"),
        cores=2,
        memory_bytes=8_340_000_000,
        gpu=None,
        python="3.11.2",
        versions={"torch": "2.13.0", "transformers": "5.23.0", "onnxruntime": "1.31.0"},
    )
    recipe = {
        "model": {"source": "sentence-transformers/all-MiniLM-L6-v2", "revision": None},
        "task": {
            "kind": "text-classification",
            "data": "glue",
            "subset": "sst2",
            "splits": {"gate": "validation"},
        },
        "target": {
            "device": "cpu",
            "runtime": "onnxruntime",
            "threads": 2,
            "loads": [{"batch": 1, "sequence": 128}],
        },
        "steps": [stage.step for stage in found[1:]],
        "budget": budget,
    }
    data = {
        "source": "glue/sst2",
        "examples": {"train": 8000, "calibration": 512, "selection": 0, "gate": 2000},
    }
    verdict = Verdict(outcome, checks)
    return Report(recipe, asdict(machine), data, found[0].name, found, verdict, found[-1].folder)


def passed() -> Report:
    found = stages(
        ["original", "prune", "finetune", "quantize", "export"],
        "accuracy",
        [0.9105, 0.8710, 0.9060, 0.9025, 0.9025],
        [9.1, 6.2, 6.15, 3.9, 3.85],
        [(1, 128), (8, 128)],
    )
    checks = (
        Check("accuracy drop", 0.02, 0.008, 0.0021, 0.0142, "pass"),
        Check("speedup at 1x128", 1.5, 2.36, 2.21, 2.49, "pass", at_least=True),
        Check("speedup at 8x128", 1.5, 2.36, 2.25, 2.44, "pass", at_least=True),
        Check("size", 0.4, 0.265, 0.265, 0.265, "pass"),
    )
    return report(checks, "pass", found, max_drop=0.02, min_speedup=1.5, max_size=0.4)


def inconclusive() -> Report:
    found = stages(
        ["original", "prune", "finetune", "quantize"],
        "perplexity",
        [24.11, 31.7, 25.3, 25.4],
        [41, 30, 30.1, 22],
        [(1, 64), (4, 64), (16, 64)],
    )
    note = "about 412 more examples would decide, if the estimate holds"
    check = Check("perplexity ratio", 1.06, 1.0535, 1.041, 1.066, "inconclusive", note)
    return report((check,), "inconclusive", found, max_perplexity_ratio=1.06)


def failed() -> Report:
    found = stages(
        ["original", "prune", "quantize"],
        "accuracy",
        [0.81, 0.74, 0.72],
        [55, 40, 43],
        [(1, None)],
    )
    checks = (
        Check("accuracy drop", 0.01, 0.09, 0.071, 0.108, "fail"),
        Check("memory", 0.8, 0.761, 0.761, 0.761, "pass"),
    )
    found = tuple(
        replace(s, kept_heads=FULL, neurons=(NEURONS,) * LAYERS, heads=(HEADS,) * LAYERS)
        for s in found
    )
    return report(checks, "fail", found, max_drop=0.01)


def content(sample: Report) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sample.to_json())
    return found


SAMPLES = {"pass": passed, "inconclusive": inconclusive, "fail": failed}


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
    assert len(svgs) == len(SAMPLES[name]().stages[0].loads) + 4
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
    # p99 of every load; flips of every stage; the machine's gpu
    assert found.count("too few samples") == loads
    assert found.count("not measured") == len(sample["stages"]) + 1


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


def test_cells_show_which_heads_are_left_of_the_first_stage():
    tree = Tree(written("pass"))
    kept, cut = (
        [a["title"] for a in tree.of_class(state) if "title" in a] for state in ("kept", "cut")
    )
    assert len(kept) == sum(map(len, CUT)) == 39
    assert len(cut) == 6 * 12 - 39
    assert "layer 2, head 3: kept" in kept
    assert "layer 2, head 4: cut" in cut
    assert "39 of 72 heads, 4608 of 9216 neurons left." in tree.text


def test_cells_are_those_of_a_model_that_had_been_cut_before():
    sample = content(passed())
    for stage in sample["stages"]:
        stage["kept_heads"] = [[0, 5, 7]] * LAYERS
    sample["stages"][3]["kept_heads"] = [[0, 7]] * LAYERS
    sample["stages"][4]["kept_heads"] = [[0, 7]] * LAYERS
    found = layers(sample["stages"])
    tree = Tree("".join(ET.tostring(e, encoding="unicode", method="html") for e in found))
    cut = [a["title"] for a in tree.of_class("cut") if "title" in a]
    assert cut == [f"layer {layer}, head 5: cut" for layer in range(LAYERS)]
    # one picture for the neurons of prune, one for the heads of quantize
    assert len(tree.of_class("layers")) == 2


def test_nothing_cut_is_said_in_words():
    tree = Tree(written("fail"))
    assert "No stage cut heads or neurons." in tree.text
    assert not tree.of_class("layers")


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


def test_worse_is_red_whatever_the_direction():
    for sample, first in ((passed(), "fail"), (inconclusive(), "fail")):
        _, _, svg = plots.draw_changes(content(sample)["stages"])
        tones = re.findall(r"fill: var\(--(pass|fail)\)", ET.tostring(svg, encoding="unicode"))
        assert tones[:2] == [first, "pass"]  # prune costs, finetune mends
