"""What tests share: fixtures, tiny recipes with their data, the command."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import io
import logging
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.worker import Worker
from pipeline.cli import main


@pytest.fixture(params=["bert", "roberta", "distilbert", "gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    """Give a family of each shape that text goes through, where all would take too long."""
    return str(request.param)


@pytest.fixture
def shared() -> Path:
    """Give the folder with real models and data, beside the checkout; skip where there is none."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"{folder} is not there: real models and data lie outside the project")
    return folder


WORDS = [
    "good",
    "great",
    "fine",
    "bad",
    "awful",
    "poor",
    "film",
    "plot",
    "actor",
    "scene",
    "the",
    "a",
]


def write_model(folder: Path, family: str = "bert", **changes: object) -> PreTrainedModel:
    """Write a tiny model with a tokenizer of the words above, and return it."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    table = {word: at for at, word in enumerate(vocabulary)}
    backend = Tokenizer(WordLevel(table, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    model = tiny(family, **changes)
    model.save_pretrained(folder)
    return model


def sentences(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Return texts whose label is whether good words outnumber bad ones, all different."""
    generator = random.Random(seed)
    found: dict[str, int] = {}
    while len(found) < count:
        words = generator.choices(WORDS, k=generator.randint(5, 12))
        balance = sum((word in WORDS[:3]) - (word in WORDS[3:6]) for word in words)
        if balance:
            found[" ".join(words)] = int(balance > 0)
    return list(found.items())


def write_rows(path: Path, rows: list[tuple[str, int]], header: str = "text,label") -> Path:
    """Write a CSV file."""
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n")
    return path


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
    """Run the command as a user does: in this process, or with options in one of its own.

    A process of its own costs 13 seconds of a core for imports alone.
    """
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    if options:
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)
    before, outputs = logging.root.manager.disable, (io.StringIO(), io.StringIO())
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(outputs[0]),
            contextlib.redirect_stderr(outputs[1]),
            pytest.raises(SystemExit) as ended,
        ):
            main(command[3:])
    finally:
        logging.disable(before)
    texts = [text.getvalue() for text in outputs]
    return subprocess.CompletedProcess(command, ended.value.code, *texts)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
        "budget": {"max_drop": 0.9, "baseline_floor": -1.0},
    }  # fmt: skip


def classified(wrong: int, mended: int, examples: int) -> tuple[dict, dict]:
    """Return columns of baseline and candidate that differ so; what is not said is right."""
    label = np.arange(examples) % 2
    baseline, candidate = label.copy(), label.copy()
    candidate[:wrong] = 1 - label[:wrong]
    lost = slice(wrong, wrong + mended)
    baseline[lost] = 1 - label[lost]
    return {"label": label, "prediction": baseline}, {"label": label, "prediction": candidate}


def multiplying(weight: np.ndarray) -> onnx.ModelProto:
    """Return the graph of x W."""
    rows, columns = weight.shape
    float_info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [float_info("x", TensorProto.FLOAT, ["n", rows])],
        [float_info("y", TensorProto.FLOAT, ["n", columns])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="session")
def built_ahead(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """Give a folder with a recipe that was run once without a GPU, and the report."""
    from pipeline import run

    folder = tmp_path_factory.mktemp("built")
    path = write_recipe(
        folder,
        baseline="original",
        steps=[
            {"step": "quantize", "method": "int8-static", "portable": True},
            {"step": "export", "format": "tensorrt", "compute_capabilities": [8.6]},
        ],
        budget={"max_drop": 0.9, "baseline_floor": -1.0},
    )
    return folder, run(path, folder / "out")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    """Give a function that opens a worker on one of the known predictors."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    started: list[Worker] = []

    def open_(name: str, folder: str = "x") -> Worker:
        worker = Worker(f"known_predictors:{name}", Path(folder), device="cpu", threads=1)
        started.append(worker)
        return worker

    yield open_
    for worker in started:
        worker.close()
