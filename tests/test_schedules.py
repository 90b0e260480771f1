"""Rounds, learned criteria and several processes give what a recipe asks for."""

import json
import os
import socket
import subprocess
import sys

import pytest
import yaml
from conftest import ROWS, other_task, secateur, write_recipe
from safetensors.torch import load_file

from pipeline import training
from pipeline.checkpoint import ModelError
from pipeline.recipe import Recipe, RecipeError
from pipeline.runner import run

TRAINING = {"epochs": 2, "learning_rate": 1e-3, "teacher": "finetune"}
SPLITS = {"train": "train[:600]", "calibration": "train[600:700]",
          "selection": "train[700:900]", "gate": "train[900:]"}  # fmt: skip


def recipe(folder, **prune):
    path = write_recipe(folder)
    content = yaml.safe_load(path.read_text())
    content["task"]["splits"] = SPLITS
    content["target"]["runtime"] = "torch"
    content["budget"] = {"max_drop": 0.9, "baseline_floor": -1.0}
    content["steps"] = [
        {"step": "finetune", "epochs": 6, "learning_rate": 2e-3},
        {"step": "prune", "finetune": TRAINING, **prune},
    ]
    path.write_text(yaml.safe_dump(content))
    return path


def last(report):
    return json.loads(report.to_json())["stages"][-1]


def test_every_round_sees_windows_of_its_own(tmp_path, monkeypatch):
    seeds, train = [], training.finetune

    def finetune(*arguments, **options):
        seeds.append(options["seed"])
        return train(*arguments, **options)

    monkeypatch.setattr(training, "finetune", finetune)
    run(recipe(tmp_path, heads=0.5, rounds=2), tmp_path / "out")
    assert len(set(seeds[1:])) == 2  # the first is that of the finetune step


def test_rounds_reach_the_share_and_are_told(tmp_path):
    path = recipe(tmp_path, heads=0.5, neurons=0.5, rounds=3)
    stage = last(run(path, tmp_path / "out"))
    assert sum(stage["heads"]) == 6
    assert sum(stage["neurons"]) == 72
    rounds = stage["details"]["rounds"]
    assert [found["neurons"] for found in rounds] == [120, 96, 72]
    removed = stage["details"]["removed"].values()
    assert sum(len(units) for units in removed) == 6


def test_layers_and_sublayers_of_a_recipe(tmp_path):
    path = recipe(tmp_path, layers=0.34, sublayers=0.25, heads=0.5, finetune=None)
    stage = last(run(path, tmp_path / "out"))
    assert len(stage["details"]["dropped_layers"]) == 1
    assert len(stage["details"]["dropped_sublayers"]) == 1
    # Of the layer that is gone nothing is left, and of the two others every attention keeps a head.
    assert stage["heads"].count(0) >= 1
    assert len(stage["heads"]) == len(stage["neurons"]) == 3


@pytest.mark.parametrize("what", ["layers", "sublayers"])
def test_depth_alone_is_cut_and_trained(tmp_path, what):
    path = recipe(tmp_path, **{what: 0.34})
    stage = last(run(path, tmp_path / "out"))
    assert stage["details"][f"dropped_{what}"]
    assert len(stage["details"]["rounds"]) == 1


def test_a_round_that_costs_too_much_is_taken_back(tmp_path):
    path = recipe(tmp_path, heads=0.75, neurons=0.98, rounds=4, max_drop=0.01,
                  criterion="random", repair="none", finetune=None)  # fmt: skip
    stage = last(run(path, tmp_path / "out"))
    rounds, before = stage["details"]["rounds"], stage["details"]["selection_before"]
    assert not rounds[-1]["kept"]
    assert before - rounds[-1]["selection"] > 0.01
    assert all(found["kept"] for found in rounds[:-1])
    kept = rounds[-2]["heads"] if len(rounds) > 1 else 12
    assert sum(stage["heads"]) == kept


def test_rounds_of_a_language_model_end_before_its_perplexity_grows(tmp_path):
    rows = [{"text": text} for text, _ in ROWS[:120]]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = other_task(tmp_path, "causal-lm", "llama")
    content["task"]["splits"]["selection"] = "train[100:]"
    content["task"]["splits"]["gate"] = "train[60:100]"
    prune = {"step": "prune", "neurons": 0.9, "rounds": 3, "repair": "none"}
    content["steps"] = [prune | {"max_perplexity_ratio": 1.001}]
    content["budget"] = {"max_perplexity_ratio": 100.0}
    content["target"]["runtime"] = "torch"
    stage = last(run(Recipe.model_validate(content), tmp_path / "out"))
    rounds, before = stage["details"]["rounds"], stage["details"]["selection_before"]
    for found in rounds:
        assert found["kept"] == (found["selection"] <= 1.001 * before)
    kept = [found["neurons"] for found in rounds if found["kept"]]
    assert sum(stage["neurons"]) == (kept[-1] if kept else 144)


@pytest.mark.parametrize("criterion", ["movement", "hard-concrete", "exact-k"])
def test_a_criterion_that_learns_cuts_the_share(tmp_path, criterion):
    path = recipe(tmp_path, heads=0.5, neurons=0.25, criterion=criterion)
    stage = last(run(path, tmp_path / "out"))
    assert sum(stage["heads"]) == 6
    assert sum(stage["neurons"]) == 108
    assert stage["score"]["value"] > 0.6


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"criterion": "movement", "finetune": None}, "learns while the model trains, expected"),
        ({"criterion": "exact-k", "rounds": 2}, "expected no `rounds` and no limit"),
        ({"criterion": "exact-k", "finetune": {"patience": 2}}, "expected no `patience`"),
        ({"uniform": True, "rounds": 2}, "found `uniform` and `rounds`"),
        ({"layers": 0.5, "rounds": 2}, "layers and sublayers go at once, found rounds: 2"),
        ({"sublayers": 0.5, "uniform": True}, "found `sublayers` and `uniform`"),
        ({"finetune": {"teacher": "nobody"}}, r"steps.1.finetune.teacher: found .nobody."),
    ],
)
def test_what_cannot_be_learnt_is_refused(tmp_path, prune, message):
    path = recipe(tmp_path, heads=0.5, **prune)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(path)


@pytest.mark.parametrize("key", ["its limit", "patience"])
def test_choosing_needs_a_selection_split(tmp_path, key):
    path = recipe(tmp_path, heads=0.5, max_drop=0.1)
    content = yaml.safe_load(path.read_text())
    del content["task"]["splits"]["selection"]
    if key == "patience":
        content["steps"][1] = {"step": "finetune", "patience": 2}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=f"{key} needs examples to choose on"):
        Recipe.from_yaml(path)


TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2", "--master-port"]
ACCELERATE = ["accelerate.commands.launch", "--num_processes=2", "--use_fsdp", "--fsdp_version=2",
              "--main_process_port"]  # fmt: skip


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(TORCHRUN, id="torchrun"),
        pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_to_the_weights_of_one(tmp_path, launch):
    path = write_recipe(tmp_path)
    content = yaml.safe_load(path.read_text())
    config = tmp_path / "model" / "config.json"
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | without))
    content["target"]["runtime"] = "torch"
    content["baseline"] = "original"
    content["budget"] = {"max_drop": 0.9, "baseline_floor": -1.0}
    training = {"epochs": 1, "batch_size": 31, "learning_rate": 1e-4}
    content["steps"] = [
        {"step": "prune", "heads": 0.25, "neurons": 0.25},
        {"step": "finetune", **training},
    ]
    path.write_text(yaml.safe_dump(content))
    alone = secateur("run", path, "--output", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *launch, port, "-m", "pipeline", "run", path,
               "--output", tmp_path / "both"]  # fmt: skip
    both = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("report:") == 1
    one, two = (
        load_file(tmp_path / name / "artifact" / "model.safetensors") for name in ("alone", "both")
    )
    start = load_file(tmp_path / "model" / "model.safetensors")
    assert one.keys() == two.keys()
    name = "classifier.weight"
    assert (one[name] - start[name]).abs().max() > 1e-4
    for name, tensor in one.items():
        if name.endswith("key.bias"):  # it changes no softmax: its gradient is rounding alone
            continue
        assert (tensor - two[name]).abs().max() < 1e-6, name


def test_a_teacher_whose_head_is_random_is_refused(tmp_path):
    path = recipe(tmp_path, heads=0.5, finetune=TRAINING | {"teacher": "original"})
    config = tmp_path / "model" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"architectures": ["BertForMaskedLM"]})
    )
    with pytest.raises(ModelError, match=r"the teacher 'original', whose head .* is random"):
        run(path, tmp_path / "out")
