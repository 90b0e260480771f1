"""The whole pipeline on a tiny trained model: what a user does, and what can go wrong."""

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
import torch
import yaml
from conftest import WORDS, sentences, write_model, write_rows
from PIL import Image
from transformers import (
    AutoTokenizer,
    FNetConfig,
    FNetForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from benchmarks.accuracy import Outcomes
from pipeline import Recipe, from_pretrained, run, units
from pipeline.checkpoint import ModelError
from pipeline.store import seal, verify

ROWS = sentences(1400)


def write_recipe(folder: Path, **changes: object) -> Path:
    """Write a tiny model, its data and a recipe, and return the recipe's path."""
    write_model(folder / "model", pad_token_id=0)
    write_rows(folder / "data.csv", ROWS)
    recipe = {
        "model": {"source": str(folder / "model")},
        "task": {
            "kind": "text-classification",
            "data": str(folder / "data.csv"),
            "max_length": 16,
            "splits": {
                "train": "train[:700]",
                "calibration": "train[700:800]",
                "gate": "train[800:]",
            },
        },
        "target": {"loads": [{"batch": 2, "sequence": 16}], "rounds": 6, "threads": 1},
        "baseline": "finetune",
        "steps": [
            {"step": "finetune", "epochs": 20, "learning_rate": 2e-3},
            {"step": "prune", "heads": 0.25, "neurons": 0.25},
            {"step": "finetune", "epochs": 4, "learning_rate": 1e-3, "teacher": "finetune"},
            {"step": "quantize", "embeddings": True},
            {"step": "export"},
        ],
        "budget": {"max_drop": 0.2, "max_size": 2.0},
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def secateur(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


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
    assert written["schema"] == 1
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
    # A head: 3 x 8 x 33 + 8 x 32; a neuron: 32 + 1 + 32.
    assert dense.parameters - pruned.parameters == 3 * (3 * 8 * 33 + 8 * 32) + 36 * 65
    model = from_pretrained(pruned.folder)
    assert tuple(units(model).heads.values()) == pruned.heads
    assert pruned.size_bytes == (Path(pruned.folder) / "model.safetensors").stat().st_size


def test_the_untrained_speeds_are_ratios_of_one_interleaved_run(finished):
    _, report = finished
    first = report.stages[0].loads[0]
    assert first.speedup == {"value": 1.0, "low": 1.0, "high": 1.0}
    for stage in report.stages:
        (load,) = stage.loads
        assert load.latency_ms["samples"] == 12
        assert load.latency_ms["p90"] is None
        assert load.speedup["low"] <= load.speedup["value"] <= load.speedup["high"]
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


def test_an_interrupt_ends_with_130(tmp_path):
    path = write_recipe(tmp_path)
    command = [sys.executable, "-m", "pipeline", "run", path, "--output", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out" / "stages").glob("original-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "interrupted; run the same command again" in stderr


def test_a_torch_target_needs_no_onnx(tmp_path):
    steps = [{"step": "prune", "heads": 0.25, "criterion": "magnitude", "repair": "none"}]
    path = write_recipe(
        tmp_path,
        steps=steps,
        baseline="original",
        target={"runtime": "torch", "loads": [{"batch": 2, "sequence": 8}], "rounds": 6},
        budget={"max_drop": 0.9},
    )
    report = run(path, tmp_path / "out")
    assert [stage.runtime for stage in report.stages] == ["torch", "torch"]
    assert (tmp_path / "out" / "artifact" / "model.safetensors").is_file()
    assert list((tmp_path / "out" / "stages").glob("onnx-*")) == []


def edit_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop(tensors) -> None:
    del tensors["classifier.weight"]


def poison(tensors) -> None:
    tensors["bert.encoder.layer.1.output.dense.weight"][0, 0] = torch.nan


def add(tensors) -> None:
    tensors["bert.encoder.layer.9.output.dense.weight"] = torch.zeros(2)


BROKEN = {
    "a missing tensor": (drop, "found no classifier.weight"),
    "a NaN": (poison, "found NaN or infinity in bert.encoder.layer.1.output.dense.weight"),
    "an extra tensor": (add, "found bert.encoder.layer.9.output.dense.weight, which"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_model_is_refused(tmp_path, name):
    change, message = BROKEN[name]
    path = write_recipe(tmp_path)
    edit_weights(tmp_path / "model", change)
    done = secateur("run", path, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").glob("stages/*")) == [] or not list(
        (tmp_path / "out" / "stages").glob("original-*")
    )


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def swap_task(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))


FOLDERS = {
    "no config": (remove("config.json"), "found no config.json, expected a Hugging Face model"),
    "no weights": (remove("model.safetensors"), "cannot be loaded"),
    "truncated weights": (truncate, "model: "),
    "no tokenizer": (remove("tokenizer.json"), "found no tokenizer"),
    "another family": (swap_task, "model, which has no AutoModelForSequenceClassification"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_the_model_is_refused(tmp_path, name):
    change, message = FOLDERS[name]
    path = write_recipe(tmp_path)
    change(tmp_path / "model")
    done = secateur("run", path, "--output", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_without_a_head_asks_for_training(tmp_path):
    path = write_recipe(
        tmp_path,
        steps=[{"step": "prune", "heads": 0.25}],
        baseline="original",
        target={"runtime": "torch", "loads": [{"batch": 2, "sequence": 8}]},
    )
    from_pretrained(tmp_path / "model").bert.save_pretrained(tmp_path / "model")
    done = secateur("run", path, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "found BertModel, expected a model trained for text-classification" in done.stderr


def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: no file may grow past 20 kB."""
    path = write_recipe(tmp_path)
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from pipeline.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", limited, "run", str(path), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out" / "stages").glob("*-*")) == []


def test_wrong_arguments_and_recipes_are_exit_2(tmp_path):
    assert secateur("run").returncode == 2
    done = secateur("run", tmp_path / "nowhere.yaml")
    assert (done.returncode, done.stderr.strip()) == (
        2, f"secateur: {tmp_path}/nowhere.yaml: no such file",
    )  # fmt: skip
    (tmp_path / "bad.yaml").write_text("modle: {}\nsteps: [{step: prun}]\n")
    done = secateur("check", tmp_path / "bad.yaml")
    assert done.returncode == 2
    assert "did you mean 'model'" in done.stderr
    assert "did you mean 'prune'" in done.stderr


def test_a_target_that_is_not_here_is_exit_4(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    path = write_recipe(tmp_path, target={"device": "cuda"})
    done = secateur("run", path, "--output", tmp_path / "out")
    assert done.returncode == 4
    assert "target.device: found" in done.stderr


def test_check_resolves_model_and_data_without_running(tmp_path):
    path = write_recipe(tmp_path)
    done = secateur("check", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "examples: train 700, calibration 100, gate 600" in done.stdout
    assert not (tmp_path / "runs").exists()
    (tmp_path / "data.csv").unlink()
    done = secateur("check", path, tmp_path / "nowhere.yaml")
    assert done.returncode == 2
    assert "data.csv: no such file or folder" in done.stderr
    assert "nowhere.yaml: no such file" in done.stderr


def test_a_family_that_cannot_be_cut_is_refused_before_the_first_step(tmp_path):
    recipe = other_task(tmp_path, "text-classification", "bert")
    config = FNetConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, intermediate_size=48)
    FNetForSequenceClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="found the family 'fnet', which cannot be cut: its layer"):
        run(Recipe.model_validate(recipe), tmp_path / "out")


def test_a_uniform_cut_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    recipe = other_task(tmp_path, "text-classification", "bert")
    recipe["steps"] = [{"step": "prune", "heads": 0.25, "uniform": True}]
    with pytest.raises(ModelError, match="the configuration of bert cannot say what was cut"):
        run(Recipe.model_validate(recipe), tmp_path / "out")


def test_outputs_that_are_not_numbers_are_exit_5(tmp_path):
    path = write_recipe(
        tmp_path,
        steps=[{"step": "prune", "heads": 0.25, "criterion": "magnitude", "repair": "none"}],
        baseline="original",
        target={"runtime": "torch", "loads": [{"batch": 2, "sequence": 8}], "rounds": 6},
    )
    edit_weights(tmp_path / "model", lambda tensors: tensors["classifier.weight"].fill_(3e38))
    done = secateur("run", path, "--output", tmp_path / "out")
    assert done.returncode == 5
    assert "evaluating: found NaN or infinity in the output 'logits'" in done.stderr
    assert not (tmp_path / "out" / "artifact").exists()


def test_more_threads_than_cores_are_exit_4(tmp_path):
    path = write_recipe(tmp_path, target={"threads": 4096})
    done = secateur("check", path)
    assert done.returncode == 4
    assert "target.threads: found 4096, expected at most" in done.stderr


def test_doctor_says_what_is_here():
    done = secateur("doctor")
    assert done.returncode == 0
    assert "ONNX Runtime" in done.stdout


def other_task(folder: Path, kind: str, family: str, **changes: object) -> dict[str, object]:
    """Return the parts of a recipe that every task shares."""
    write_model(folder / "model", family, **changes)
    return {
        "model": {"source": str(folder / "model")},
        "task": {"kind": kind, "data": str(folder / "data.jsonl"), "max_length": 16,
                 "splits": {"train": "train[:40]", "calibration": "train[40:60]",
                            "gate": "train[60:]"}},
        "target": {"loads": [{"batch": 2, "sequence": 16}], "rounds": 6, "threads": 1},
        "steps": [{"step": "prune", "heads": 0.25, "neurons": 0.25},
                  {"step": "finetune", "teacher": "original", "hidden_weight": 0.1},
                  {"step": "quantize"}],
        "budget": {"max_drop": 0.9},
    }  # fmt: skip


def texts(count: int) -> list[list[str]]:
    return [text.split() for text, _ in sentences(count, seed=5)]


def test_token_classification_runs(tmp_path):
    names = ["O", "B-mood", "B-thing"]
    recipe = other_task(
        tmp_path, "token-classification", "bert-tokens",
        id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
    )  # fmt: skip
    recipe["target"]["runtime"] = "torch"
    del recipe["steps"][2]
    rows = [
        {"tokens": words, "ner_tags": ["B-mood" if w in WORDS[:6] else "O" for w in words]}
        for words in texts(120)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert report.stages[0].score.metric == "entity_f1"
    assert report.verdict.checks[0].what == "entity_f1 drop"
    assert report.stages[0].fidelity["flips"] is None
    assert report.stages[-1].fidelity["agreement"] > 0.5


def test_question_answering_runs(tmp_path):
    recipe = other_task(tmp_path, "question-answering", "bert-answers")
    del recipe["steps"][1]
    rows = []
    for words in texts(120):
        context = " ".join(words * 3)  # longer than a window
        answers = {"text": [words[1]], "answer_start": [context.index(words[1])]}
        rows.append({"question": words[0], "context": context, "answers": answers})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert report.stages[0].score.metric == "answer_f1"
    assert report.verdict.checks[0].what == "answer_f1 drop"
    assert 0 <= report.stages[-1].score.value <= 1


def test_causal_lm_runs_and_is_judged_by_perplexity(tmp_path):
    recipe = other_task(tmp_path, "causal-lm", "llama")
    del recipe["steps"][1]
    recipe["budget"] = {"max_perplexity_ratio": 10.0}
    rows = [{"text": " ".join(words)} for words in texts(120)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert report.stages[0].score.metric == "perplexity"
    assert report.verdict.checks[0].what == "perplexity ratio"
    ratio = report.stages[-1].score.value / report.stages[0].score.value
    assert report.verdict.checks[0].estimate == pytest.approx(ratio)
    # Not by our own code: the dense model's own loss, a text at a time.
    model = from_pretrained(tmp_path / "model", "AutoModelForCausalLM")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    total, tokens = 0.0, 0
    for row in rows[60:]:
        ids = tokenizer(row["text"], return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert report.stages[0].score.value == pytest.approx(np.exp(total / tokens), rel=1e-3)


def test_image_classification_runs(tmp_path):
    images = tmp_path / "images"
    generator = np.random.default_rng(0)
    for name, base in (("dark", 40), ("light", 200)):
        (images / "train" / name).mkdir(parents=True)
        for at in range(40):
            pixels = generator.integers(base - 40, base + 40, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / "train" / name / f"{at}.png")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = ViTConfig(**sizes, id2label={0: "dark", 1: "light"}, label2id={"dark": 0, "light": 1})
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    recipe = {
        "model": {"source": str(tmp_path / "model")},
        "task": {"kind": "image-classification", "data": str(images),
                 "splits": {"train": "train[:30]+train[50:]", "gate": "train[30:50]"}},
        "target": {"loads": [{"batch": 2}], "rounds": 6, "threads": 1},
        "steps": [{"step": "finetune", "epochs": 3, "learning_rate": 1e-3}, {"step": "quantize"}],
        "budget": {"max_size": 2.0},
    }  # fmt: skip
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert report.verdict.outcome == "pass"
    assert report.stages[-1].loads[0].sequence is None
    assert report.stages[1].score.value > 0.9


def test_the_tiny_llama_on_stories(shared, tmp_path):
    """A real decoder: prune by key/value group, int8, ONNX, perplexity."""
    recipe = {
        "model": {"source": str(shared / "models" / "stories260k")},
        "task": {"kind": "causal-lm", "data": str(shared / "data/tinystories/validation.txt.gz"),
                 "max_length": 256, "overlap": "drop",
                 "splits": {"train": "train[:2000]", "calibration": "train[2000:2200]",
                            "gate": "train[3000:3600]"}},
        "target": {"loads": [{"batch": 1, "sequence": 128}], "rounds": 6},
        "steps": [{"step": "prune", "heads": 0.1, "neurons": 0.1},
                  {"step": "finetune", "learning_rate": 3e-4, "teacher": "original"},
                  {"step": "quantize"}, {"step": "export"}],
        "budget": {"max_perplexity_ratio": 1.25},
    }  # fmt: skip
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert sum(report.stages[1].heads) == 18  # of 5 layers x 4 groups
    # Its README: 5.3 for all of the text as stored, in other windows.
    assert 4 < report.stages[0].score.value < 7
    assert report.verdict.outcome == "pass"


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
