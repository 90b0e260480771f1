"""The whole pipeline on a tiny trained model: what a run leaves, and what it does again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROWS, edit_weights, secateur, write_recipe
from transformers import AutoTokenizer

from benchmarks import energy, speed
from benchmarks.figures import Ratio
from benchmarks.machine import Unavailable
from benchmarks.outcomes import Outcomes
from pipeline import Recipe, from_pretrained, run, units
from pipeline.manifest import seal
from pipeline.store import verify


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Give a folder with a recipe that was run once, and the report."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(write_recipe(folder), folder / "out")


def test_a_run_leaves_artifact_and_reports(finished):
    folder, report = finished
    assert report.verdict.outcome == "pass"
    assert [stage.name for stage in report.stages] == [
        "finetune", "prune", "finetune-2", "quantize", "export",
    ]  # fmt: skip
    assert report.stages[0].score.value > 0.9
    written = json.loads((folder / "out" / "report.json").read_text())
    assert written["verdict"]["outcome"] == "pass"
    assert written["schema"] == 3
    for stage in written["stages"]:
        figures = stage["memory"] | stage["loads"][0]
        nulls = {name for name in ("device_peak_bytes", "resident_ms", "joules")
                 if figures[name] is None}  # fmt: skip
        assert nulls == written["not_measured"].keys()
    for name in ("report.md", "report.html"):
        assert "finetune-2" in (folder / "out" / name).read_text()
    artifact = verify(folder / "out" / "artifact")
    assert artifact is not None
    assert artifact.about["verdict"]["outcome"] == "pass"
    assert (artifact.folder / "onnx" / "model.onnx").is_file()
    assert (artifact.folder / "tokenizer.json").is_file()


def test_the_artifact_gives_the_reported_score(finished):
    import onnxruntime

    folder, report = finished
    artifact = folder / "out" / "artifact"
    session = onnxruntime.InferenceSession(str(artifact / "onnx" / "model.onnx"))
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    right = 0
    for text, label in ROWS[800:]:
        encoded = tokenizer(text, truncation=True, max_length=16, return_tensors="np")
        inputs = {i.name: encoded[i.name].astype(np.int64) for i in session.get_inputs()}
        right += int(np.argmax(session.run(["logits"], inputs)[0]) == label)
    # Batches are padded where these are not, which moves int8 ranges a little.
    assert right / 600 == pytest.approx(report.stages[-1].score.value, abs=0.01)


def test_the_report_counts_what_was_cut(finished):
    _, report = finished
    dense, pruned = report.stages[0], report.stages[1]
    assert (sum(dense.heads), sum(pruned.heads)) == (12, 9)
    assert (sum(dense.neurons), sum(pruned.neurons)) == (144, 108)
    assert [len(kept) for kept in pruned.kept_heads] == list(pruned.heads)
    told = pruned.details
    for path, kept in zip(told["scored"], pruned.kept_heads, strict=True):
        assert len(told["scores"][path]) == len(told["scored"][path]) == 4
        assert {*told["scored"][path]} - {*told["removed"].get(path, ())} == {*kept}
    # A head: 3 x 8 x 33 + 8 x 32; a neuron: 32 + 1 + 32.
    assert dense.parameters - pruned.parameters == 3 * (3 * 8 * 33 + 8 * 32) + 36 * 65
    model = from_pretrained(pruned.folder)
    assert tuple(units(model).heads.values()) == pruned.heads
    assert pruned.size_bytes == (Path(pruned.folder) / "model.safetensors").stat().st_size


def test_the_untrained_speeds_are_ratios_of_one_interleaved_run(finished):
    _, report = finished
    first = report.stages[0].loads[0]
    assert first.speedup == Ratio(1.0, 1.0, 1.0)
    for stage in report.stages:
        (load,) = stage.loads
        assert load.latency_ms.samples == 12
        assert load.latency_ms.p90 is None
        assert load.speedup.low <= load.speedup.value <= load.speedup.high
    assert report.stages[3].loads[0].speedup == report.stages[4].loads[0].speedup


def test_a_second_run_is_served_from_the_store(finished):
    folder, report = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "stages").rglob("*.json")}
    again = run(folder / "recipe.yaml", folder / "out")
    after = {path: path.stat().st_mtime_ns for path in (folder / "out" / "stages").rglob("*.json")}
    assert after == before
    assert again == report


def test_a_changed_step_redoes_only_what_follows(finished, tmp_path):
    folder, report = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["steps"][1]["heads"] = 0.5
    names = {path.name for path in (tmp_path / "out" / "stages").iterdir()}
    again = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert sum(again.stages[1].heads) == 6
    assert again.stages[0].folder.endswith(Path(report.stages[0].folder).name)
    new = {path.name for path in (tmp_path / "out" / "stages").iterdir()} - names
    kinds = sorted(name.rpartition("-")[0] for name in new)
    assert kinds == ["finetune", "measured", "measured", "measured", "onnx", "onnx", "prune",
                     "quantize", "timed"]  # fmt: skip


def test_a_model_with_a_zeroed_layer_fails_the_gate(finished, tmp_path):
    """Break the retrained model in the store, seal it again, and go on from there."""
    folder, report = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    stage = tmp_path / "out" / "stages" / Path(report.stages[2].folder).name
    about = verify(stage).about

    def zero(tensors) -> None:
        for name in tensors:
            if "encoder.layer.1." in name and "weight" in name:
                tensors[name].zero_()

    edit_weights(stage, zero)
    seal(stage, about)
    done = secateur("run", folder / "recipe.yaml", "--output", tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert "fail against finetune" in done.stdout
    assert not (tmp_path / "out" / "artifact").exists()
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [check["outcome"] for check in written["verdict"]["checks"]] == ["fail", "pass"]


def test_outcomes_are_kept_for_every_example(finished):
    folder, report = finished
    (some,) = list((folder / "out" / "stages").glob("measured-*/outcomes.safetensors"))[:1]
    outcomes = Outcomes.load(some)
    assert len(outcomes.ids) == report.stages[0].score.examples == 600
    assert len(set(outcomes.ids)) == 600


def test_energy_is_judged_where_there_is_a_sensor(finished, tmp_path, monkeypatch):
    folder, _ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = write_recipe(tmp_path, budget={"max_energy": 5.0})
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    with pytest.raises(Unavailable, match=r"budget.max_energy: this machine has no energy counter"):
        run(path, tmp_path / "out")

    def one_watt():
        return time.monotonic_ns() // 1000

    monkeypatch.setattr(speed, "WINDOW_SECONDS", 0.05)
    monkeypatch.setattr(energy, "counters", lambda _: ([energy.Counter(one_watt, 1 << 63)], ""))
    report = run(path, tmp_path / "out")
    loads = report.stages[-1].loads
    checks = [check for check in report.verdict.checks if check.what.startswith("energy at ")]
    assert [(c.estimate, c.outcome) for c in checks] == [(x.energy.value, "pass") for x in loads]
    for load, before in zip(loads, report.stages[0].loads, strict=True):
        # As long as the calls, and what it takes to ask for them.
        assert load.joules > 0.5 * load.latency_ms.p50 / 1e3
        assert before.energy.value == 1
    assert "joules" in (tmp_path / "out" / "report.html").read_text()


KILLED = {"runtime": "torch", "loads": [{"batch": 2, "sequence": 8}], "rounds": 6, "threads": 1}


@pytest.mark.parametrize("wait_for", ["prune-*", "measured-*"])
def test_a_killed_run_goes_on_where_it_was(tmp_path, wait_for):
    steps = [
        {"step": "finetune", "epochs": 20, "learning_rate": 2e-3},
        {"step": "prune", "heads": 0.25},
    ]
    path = write_recipe(tmp_path, target=KILLED, steps=steps, budget={"max_size": 1.0})
    stages = tmp_path / "out" / "stages"
    command = [sys.executable, "-m", "pipeline", "run", path, "--output", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(stages.glob(wait_for)):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in stages.glob("*/manifest.json")}
    done = secateur("run", path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in finished} == finished


def test_a_torch_target_needs_no_onnx(tmp_path):
    steps = [{"step": "prune", "heads": 0.25, "criterion": "magnitude", "repair": "none"}]
    path = write_recipe(
        tmp_path,
        steps=steps,
        baseline="original",
        target={"runtime": "torch", "loads": [{"batch": 2, "sequence": 8}], "rounds": 6},
        budget={"max_drop": 0.9, "baseline_floor": -1.0},
    )
    report = run(path, tmp_path / "out")
    assert [stage.runtime for stage in report.stages] == ["torch", "torch"]
    assert (tmp_path / "out" / "artifact" / "model.safetensors").is_file()
    assert list((tmp_path / "out" / "stages").glob("onnx-*")) == []


@pytest.mark.slow
def test_the_reference_classifier_on_sst2(shared, tmp_path):
    recipe = {
        "model": {"source": str(shared / "models" / "minilm-sst2")},
        "task": {"kind": "text-classification", "data": str(shared / "data" / "sst2"),
                 "columns": {"text": "sentence"}, "max_length": 64, "overlap": "drop",
                 "splits": {"train": "train[2000:8000]", "calibration": "train[:512]",
                            "gate": "validation"}},
        "target": {"loads": [{"batch": 1, "sequence": 128}, {"batch": 8, "sequence": 128}]},
        "steps": [{"step": "prune", "heads": 0.33, "neurons": 0.33},
                  {"step": "finetune", "teacher": "original"},
                  {"step": "quantize", "embeddings": True}, {"step": "export"}],
        "budget": {"max_drop": 0.03, "min_speedup": 1.5, "max_size": 0.4},
    }  # fmt: skip
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert report.stages[0].score.value == pytest.approx(0.8979, abs=1e-4)  # its README's accuracy
    assert report.verdict.outcome == "pass"
