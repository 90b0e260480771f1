"""Tiny models that can tell right surgery from wrong.

With the library's own initialisation attention is uniform, and a wrongly cut head changes the
logits by 1e-7. Here weights are sharp, biases and norms are not 0 and 1, and the batch is padded;
`tiny` makes sure that the logits vary before any test relies on it.
"""

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
import transformers
import yaml
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.worker import Worker
from pipeline.cli import main

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
SHARING = SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4}
GROUPED = SHARING | {"head_dim": 8}
BOTH_SIDES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 99,
    "decoder_start_token_id": 0,
}
IMAGES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}
TYPED = ["sliding_attention", "full_attention", "sliding_attention"]
FALCON = SIZES | {"alibi": False}
# Family, and after a dash what is special about this one -> class before `For...`, task, sizes.
FAMILIES = {
    "albert": ("Albert", "SequenceClassification", SIZES | {"embedding_size": 16}),
    "bart": ("Bart", "ConditionalGeneration", BOTH_SIDES),
    "bert": ("Bert", "SequenceClassification", SIZES),
    "bloom": (
        "Bloom",
        "CausalLM",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99},
    ),
    "camembert": ("Camembert", "SequenceClassification", SIZES),
    "deberta-v2": (
        "DebertaV2",
        "SequenceClassification",
        SIZES
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "share_att_key": True,
        },
    ),
    "deberta-v2 own keys": (
        "DebertaV2",
        "SequenceClassification",
        SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "deit": ("DeiT", "ImageClassification", IMAGES),
    "distilbert": (
        "DistilBert",
        "SequenceClassification",
        {
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 48,
            "vocab_size": 99,
            "max_position_embeddings": 64,
        },
    ),
    "electra": ("Electra", "SequenceClassification", SIZES | {"embedding_size": 16}),
    "falcon": ("Falcon", "CausalLM", FALCON | {"multi_query": False}),
    "falcon multi-query": ("Falcon", "CausalLM", FALCON | {"multi_query": True}),
    "falcon grouped": (
        "Falcon",
        "CausalLM",
        FALCON | {"new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 4},
    ),
    "falcon alibi": ("Falcon", "CausalLM", FALCON | {"multi_query": False, "alibi": True}),
    "gemma": ("Gemma", "CausalLM", GROUPED),
    "gemma2": ("Gemma2", "CausalLM", GROUPED | {"sliding_window": 6, "layer_types": TYPED}),
    "gemma3_text": (
        "Gemma3",
        "CausalLM",
        GROUPED | {"sliding_window": 6, "layer_types": TYPED},
    ),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 48,
            "vocab_size": 99,
            "n_positions": 64,
        },
    ),
    "gpt_neox": ("GPTNeoX", "CausalLM", SIZES),
    "llama": ("Llama", "CausalLM", SHARING),
    "marian": ("Marian", "MTModel", BOTH_SIDES | {"decoder_vocab_size": 99}),
    "mbart": ("MBart", "ConditionalGeneration", BOTH_SIDES),
    "mistral": ("Mistral", "CausalLM", GROUPED | {"sliding_window": 6}),
    "modernbert": (
        "ModernBert",
        "SequenceClassification",
        SIZES | {"global_attn_every_n_layers": 2, "local_attention": 8},
    ),
    "mpnet": ("MPNet", "SequenceClassification", SIZES),
    "mt5": (
        "MT5",
        "ConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "opt": (
        "OPT",
        "CausalLM",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "vocab_size": 99,
            "max_position_embeddings": 64,
        },
    ),
    "pegasus": ("Pegasus", "ConditionalGeneration", BOTH_SIDES),
    "phi": ("Phi", "CausalLM", SIZES),
    "phi3": ("Phi3", "CausalLM", SHARING),
    "qwen2": ("Qwen2", "CausalLM", SHARING),
    "qwen3": ("Qwen3", "CausalLM", GROUPED),
    "roberta": ("Roberta", "SequenceClassification", SIZES),
    "smollm3": ("SmolLM3", "CausalLM", SHARING),
    "t5": ("T5", "ConditionalGeneration", T5),
    "vit": ("ViT", "ImageClassification", IMAGES),
    "whisper": (
        "Whisper",
        "ConditionalGeneration",
        BOTH_SIDES | {"max_source_positions": 11, "max_target_positions": 64, "num_mel_bins": 8},
    ),
    "xlm-roberta": ("XLMRoberta", "SequenceClassification", SIZES),
}
SHARED = ["gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3"]
SHARED += ["smollm3"]
HEADS = {
    "bert-tokens": ("Bert", "TokenClassification", SIZES),
    "bert-answers": ("Bert", "QuestionAnswering", SIZES),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS |= {"cls_token_id": 1, "sep_token_id": 2}


def tiny(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a small model of the family with sharp weights, whose logits vary."""
    name, task, sizes = (FAMILIES | HEADS)[family]
    ending = task if task.endswith("Model") else f"For{task}"
    kind = getattr(transformers, CONFIGS.get(name, f"{name}Config"))
    torch.manual_seed(seed)
    model = getattr(transformers, name + ending)(kind(**sizes | TOKENS | changes))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # sinusoids are computed, and not saved
                continue
            spread = 0.3 if parameter.dim() > 1 else 0.2
            if "norm" in parameter_name.lower() or "ln_" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * spread)
    model.eval()
    with torch.no_grad():
        outputs = model(**inputs(model))
    logits = outputs.logits if "logits" in outputs else outputs.start_logits
    assert (logits[0] - logits[1]).abs().max() > 0.1
    return model


def grouped(family: str) -> PreTrainedModel:
    """Return a tiny model whose query heads share key/value heads, where the family has such."""
    sharing = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return tiny(family, **sharing if family == "phi" else {})


def batch(length: int = 11) -> dict[str, torch.Tensor]:
    """Return two sequences, the second one padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, length - 3 :], mask[1, length - 3 :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs(model: PreTrainedModel, length: int = 11) -> dict[str, torch.Tensor]:
    """Return two inputs of what the model takes: text, one of them padded, images or sound."""
    generator = torch.Generator().manual_seed(2)
    decoded = {"decoder_input_ids": torch.randint(3, 99, (2, length - 4), generator=generator)}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 22, generator=generator)} | decoded
    return batch(length) | (decoded if model.config.is_encoder_decoder else {})


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
        "budget": {"max_drop": 0.9},
    }  # fmt: skip


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
        budget={"max_drop": 0.9},
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
