"""What can go wrong, and how the command says it: one line, an exit code, nothing half-written."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import edit_weights, other_task, secateur, sentences, write_recipe
from transformers import (
    FNetConfig,
    FNetForSequenceClassification,
)

from pipeline import Recipe, from_pretrained, run
from pipeline.checkpoint import ModelError
from pipeline.statuses import guarded


def test_torch_without_memory_is_told_in_one_line(capsys):
    assert guarded(lambda: torch.empty(1 << 50, dtype=torch.uint8).sum().item()) == 5
    assert capsys.readouterr().err == "secateur: out of memory; choose a smaller batch or model\n"


def test_an_interrupt_ends_with_130(tmp_path):
    path = write_recipe(tmp_path)
    command = [sys.executable, "-m", "pipeline", "run", path, "--output", tmp_path / "out"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore interrupts, and so does what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    while not list((tmp_path / "out" / "stages").glob("original-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "interrupted; run the same command again" in stderr


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


REFUSED_CUTS = {
    "a bias that is not there": (
        "causal-lm", "llama", {"heads": 0.25, "repair": "bias"}, "repair: found no bias in model",
    ),
    "a bias that is not there, to a goal": (
        "causal-lm", "llama", {"goal": {"parameters": 0.8}, "repair": "bias"},
        "repair: found no bias in model",
    ),
    "a bias that is not there, by sublayers": (
        "causal-lm", "llama", {"sublayers": 0.25, "repair": "bias"},
        "repair: found no bias in model",
    ),
    "nothing": (
        "text-classification", "bert", {"neurons": 0.25, "multiple": 5000}, "found nothing to cut",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_CUTS)
def test_a_cut_that_cannot_be_done_is_refused(tmp_path, name):
    kind, family, cut, message = REFUSED_CUTS[name]
    recipe = other_task(tmp_path, kind, family)
    rows = [{"text": text, "label": label} for text, label in sentences(120)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe["steps"] = [{"step": "prune", **cut}]
    recipe["budget"] = {"max_size": 2.0}
    with pytest.raises(ModelError, match=message):
        run(Recipe.model_validate(recipe), tmp_path / "out")
    assert not (tmp_path / "out" / "artifact").exists()


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


def test_optimum_cli_compresses_too(tmp_path):
    command = [Path(sys.executable).with_name("optimum-cli"), "compress", tmp_path / "none.yaml"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.strip().endswith("none.yaml: no such file")
