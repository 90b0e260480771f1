"""Two runs side by side: what differs is named, and what is not comparable is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import secateur
from reports import content, inconclusive, passed

from benchmarks.outcomes import Outcomes
from pipeline.comparison import compare, results, warnings
from pipeline.evidence import Evidence
from pipeline.gate import EvidenceError
from pipeline.judging import EVIDENCE, hashes, keep

EXAMPLES = 2000


def outcomes(wrong: range) -> Outcomes:
    predictions = np.zeros(EXAMPLES, np.int64)
    predictions[wrong.start : wrong.stop] = 1
    return Outcomes(
        ids=tuple(f"{at:064x}" for at in range(EXAMPLES)),
        columns={"prediction": predictions, "label": np.zeros(EXAMPLES, np.int64)},
        decisions=predictions,
        log_probabilities=None,
    )


def write(folder: Path, report: dict, wrong: range = range(200)) -> Path:
    """Write a report whose result is wrong in a range of the examples, and its evidence."""
    (folder / EVIDENCE).mkdir(parents=True)
    keep(folder / EVIDENCE, Evidence(outcomes(range(180)), outcomes(wrong), None, None))
    path = folder / "report.json"
    path.write_text(json.dumps(report | {"evidence": hashes(folder / EVIDENCE)}))
    return path


def test_a_run_against_itself_differs_in_nothing(tmp_path):
    found = compare(*(write(tmp_path / side, content(passed())) for side in "ab"))
    assert found.differences == []
    assert found.header[:4] == ["stage", "", "accuracy", "flips"]
    assert [row[:3] for row in found.rows[:2]] == [["original", "a", "0.9105"], ["", "b", "0.9105"]]
    score, decisions, size, *_ = results(found)
    assert score.startswith("accuracy: 0.9025 and 0.9025, drop 0 (-0.0013")
    assert score.endswith("): not told apart")
    assert decisions == "decisions: 1.0000 are equal, 0 broken and 0 mended"
    assert size == "size: 1x"
    assert warnings(found) == []


def test_what_differs_is_named_and_the_results_are_paired(tmp_path):
    first, second = content(passed()), content(passed())
    second["recipe"]["steps"][0]["heads"] = 0.7
    del second["recipe"]["steps"][1]
    del second["stages"][2]
    second["recipe"]["target"]["rounds"] = 99
    second["machine"]["versions"]["onnxruntime"] = "2.0"
    second["machine"]["cpu_stalled_before_and_after"] = [0.0, 0.5]
    second["data"]["fingerprints"]["train"] = "3" * 64
    second["stages"][-1]["size_bytes"] //= 2
    second["stages"][-1]["loads"][0]["speedup"] = {"value": 3.0, "low": 2.9, "high": 3.1}
    # The second is wrong in 50 where the first is right, and right in 10 where it is wrong.
    found = compare(write(tmp_path / "a", first), write(tmp_path / "b", second, range(10, 250)))
    assert found.differences == [
        ("recipe.steps.prune.heads", "0.4", "0.7"),
        ("recipe.steps.finetune", "finetune, epochs 1.0, teacher original", "-"),
        ("machine.versions.onnxruntime", "1.31.0", "2.0"),
        ("data.fingerprints.train", "111111111111..", "333333333333.."),
    ]
    assert [row[0] for row in found.rows if row[1] == "a"] == [
        *("original", "prune", "finetune", "quantize", "export")
    ]
    assert len([row for row in found.rows if row[1] == "b"]) == 4
    score, decisions, size, memory, *speeds = results(found)
    assert score.startswith("accuracy: 0.9025 and 0.9025, drop 0.02 (")
    assert score.endswith("): worse")
    assert decisions == "decisions: 0.9700 are equal, 50 broken and 10 mended"
    assert (size, memory) == ("size: 0.5x", "peak memory: 1x")
    assert [line.rpartition(": ")[2] for line in speeds] == ["faster", "not told apart"]
    assert warnings(found)[0].startswith("b: the machine was busy")


def test_a_stage_of_the_second_alone_stands_where_it_was_done(tmp_path):
    first, second = content(passed()), content(passed())
    del first["stages"][2]
    found = compare(write(tmp_path / "a", first), write(tmp_path / "b", second))
    names = [row[0] for row in found.rows if row[0]]
    assert names == ["original", "prune", "finetune", "quantize", "export"]


def test_without_the_outcomes_the_scores_are_not_paired(tmp_path):
    first = write(tmp_path / "a", content(passed()))
    alone = tmp_path / "alone.json"
    alone.write_text(first.read_text())
    found = compare(first, alone)
    assert results(found)[0].startswith("accuracy: 0.9025 and 0.9025; not paired")
    assert not any(line.startswith("decisions") for line in results(found))


def test_a_speedup_against_another_baseline_is_said_to_be_one(tmp_path):
    first, second = (write(tmp_path / side, content(passed())) for side in "ab")
    changed = json.loads(second.read_text())
    changed["evidence"]["baseline"] = "4" * 64
    second.write_text(json.dumps(changed))
    assert warnings(compare(first, second)) == [
        "the baselines differ: each speedup is against its run's own"
    ]


def test_what_is_not_comparable_is_refused_with_every_difference(tmp_path):
    other = content(passed())
    other["machine"]["cpu"] = "another"
    other["recipe"]["target"] |= {"threads": 8, "loads": [{"batch": 2, "sequence": 128}]}
    other["data"]["fingerprints"]["gate"] = "5" * 64
    paths = write(tmp_path / "a", content(passed())), write(tmp_path / "b", other)
    with pytest.raises(EvidenceError, match=r"not comparable with .*; expected the same") as told:
        compare(*paths)
    for name, one, two in (
        ("machine.cpu", "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "another"),
        ("recipe.target.threads", "2", "8"),
        ("data.fingerprints.gate", "222222222222..", "555555555555.."),
    ):
        assert f"{name}: found {one} and {two}" in str(told.value)
    assert "recipe.target.loads" in str(told.value)
    with pytest.raises(EvidenceError, match="metric: found accuracy and perplexity"):
        compare(paths[0], write(tmp_path / "c", content(inconclusive())))


def test_the_command_needs_no_torch_and_writes_markdown(tmp_path):
    for side in "ab":
        write(tmp_path / side, content(passed()))
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
        "from pipeline.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "compare", tmp_path / "a", tmp_path / "b" / "report.json",
         "--markdown", tmp_path / "c.md"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
        env=os.environ | {"COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the same recipe, data, machine and versions" in done.stdout
    assert "speedup at 8x128: 2.36 (2.27-2.46) and 2.36 (2.27-2.46)" in done.stdout
    text = (tmp_path / "c.md").read_text()
    assert "| original | a | 0.9105 |" in text
    assert "- size: 1x" in text


def test_the_command_refuses_in_a_line_with_status_2(tmp_path):
    other = content(passed())
    other["machine"]["cores"] = 64
    paths = write(tmp_path / "a", content(passed())), write(tmp_path / "b", other)
    done = secateur("compare", *paths)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "machine.cores: found 2 and 64" in done.stderr
    assert secateur("compare", tmp_path / "a", tmp_path / "no").returncode == 2
    no_recipe = write(tmp_path / "c", content(passed()) | {"recipe": {"model": "x"}})
    done = secateur("compare", paths[0], no_recipe)
    assert done.returncode == 2
    assert "not reports that can be compared: KeyError: 'steps'" in done.stderr
