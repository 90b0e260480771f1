"""The tables and the words of a report."""

import json
from pathlib import Path

from benchmarks.figures import Percentiles, Ratio
from benchmarks.outcomes import Fidelity
from pipeline.report import (
    SAME,
    Check,
    Load,
    Report,
    Score,
    Stage,
    Verdict,
    busy_note,
    check_line,
    dropped_note,
    json_schema,
    markdown,
    notes,
    shape,
    table,
)

LATENCY = Percentiles(p50=9.15, p90=9.6, p95=None, p99=None, samples=40)
SPEEDUP = Ratio(2.0, 1.9, 2.1)


def report() -> dict:
    load = Load(8, 128, LATENCY, 20.0, 874.3, SPEEDUP, SPEEDUP)
    stage = Stage(
        name="prune",
        step={"step": "prune"},
        format="torch",
        runtime="onnxruntime",
        folder="stages/prune",
        seconds=1.5,
        parameters=22_700_000,
        size_bytes=76_800_000,
        score=Score("accuracy", 0.91, 2000),
        fidelity=Fidelity(agreement=0.98, flips=None, kl_mean=0.01),
        loads=(load,),
        memory={"peak_rss_bytes": None, "import_floor_bytes": None, "device_peak_bytes": None},
        load_seconds=0.2,
        heads=(12,),
        neurons=(1536,),
        kept_heads=((0, 1),),
        gain_note="2.00x faster at 8x128",
    )
    check = Check("speedup at 8x128", 1.5, 2.0, 1.9, 2.1, "pass", at_least=True)
    made = Report(
        recipe={"target": {"threads": 2, "runtime": "onnxruntime", "device": "cpu"}},
        machine={"cpu": "a CPU", "cores": 4},
        data={"examples": {"gate": 2000}},
        baseline="prune",
        stages=(stage,),
        verdict=Verdict("pass", (check,)),
        artifact="out/artifact",
    )
    return json.loads(made.to_json())


def test_the_table_has_a_row_a_stage_and_a_dash_for_what_is_not_known():
    header, rows = table(report())
    assert header == ["stage", "accuracy", "flips", "MB", "peak MB", "ms 8x128", "speedup 8x128"]
    assert rows == [["prune", "0.9100", "-", "76.8", "-", "9.2", "2.00 (1.90-2.10)"]]
    assert table(report(), intervals=False)[1][0][-1] == "2.00"


def test_markdown_says_verdict_checks_and_machine():
    text = markdown(report())
    assert text.startswith("# secateur: pass\n")
    assert "speedup at 8x128: 2 (1.9 to 2.1), at least 1.5: pass" in text
    assert "| prune | 0.9100 |" in text
    assert "Against prune, prune has 100% of the size and a speed of 2.00\u00d7 at 8x128" in text
    assert "- prune: prune; 2.00x faster at 8x128" in text
    assert "flipped" not in text
    assert "a CPU, 2 of 4 cores, onnxruntime on cpu; 2000 examples judged." in text


def test_markdown_says_what_flipped_and_that_the_machine_was_busy():
    sample = report()
    sample["stages"][0]["fidelity"] |= {"flips": 30, "broken": 20, "mended": 10}
    sample["machine"]["cpu_stalled_before_and_after"] = [0.05, 0.4]
    assert "30 examples flipped, 20 of them to wrong.\n" in markdown(sample)
    assert "**the machine was busy while speed was measured" in markdown(sample)


def test_the_published_schema_is_that_of_the_dataclasses():
    published = Path(__file__).parents[1] / "pipeline" / "report.schema.json"
    assert published.read_text() == json_schema(), "make schema"


def test_a_check_says_what_is_allowed():
    check = {"what": "size", "allowed": 0.4, "estimate": 0.5, "low": 0.5, "high": 0.5,
             "outcome": "fail", "note": "", "at_least": False}  # fmt: skip
    assert check_line(check) == "size: 0.5 (0.5 to 0.5), at most 0.4: fail"


def test_a_busy_machine_is_said():
    quiet, busy = report(), report()
    quiet["machine"]["cpu_stalled_before_and_after"] = [None, 0.1]
    busy["machine"]["cpu_stalled_before_and_after"] = [0.05, 0.4]
    assert busy_note(quiet) == ""
    assert "tasks waited 40% of the time" in busy_note(busy)


def test_a_load_is_named_by_its_shape():
    assert shape({"batch": 8, "sequence": 128}) == "8x128"
    assert shape({"batch": 8, "sequence": None}) == "batch 8"


def test_what_a_quantization_changed_is_told_with_the_largest_part_first():
    details = {
        "quantized_nodes": 29,
        "reduce_range": True,
        "left": ["layer.3"],
        "bytes_by_part": {"attention": 2_400_000, "embeddings": 11_900_000, "rest": 100},
    }
    stage = {"gain_note": "size 0.25x", "details": details}
    assert notes(stage) == [
        "size 0.25x",
        "29 nodes quantized, weights of 7 bits, left as they were: layer.3",
        "embeddings 11.9 MB, attention 2.4 MB",
    ]
    assert notes(stage | {"gain_note": SAME}) == [SAME]


def test_dropped_examples_are_told_where_there_are_any():
    assert dropped_note({"train": 0, "gate": 0}) == ""
    assert dropped_note({"train": 1200, "gate": 0}).endswith("in another split, too: train 1,200")
