"""Tiny models that can tell right surgery from wrong.

With the library's own initialisation attention is uniform, and a wrongly cut head changes the
logits by 1e-7. Here weights are sharp, biases and norms are not 0 and 1, and the batch is padded;
`tiny` makes sure that the logits vary before any test relies on it.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SIZES),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 48,
            "vocab_size": 99,
            "max_position_embeddings": 64,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 48,
            "vocab_size": 99,
            "n_positions": 64,
        },
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4},
    ),
}


def tiny(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a small model of the family with sharp weights, whose logits vary."""
    class_name, config_name, sizes = (FAMILIES | HEADS)[family]
    config = getattr(transformers, config_name)(**sizes | {"pad_token_id": 0} | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.2
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * spread)
    model.eval()
    outputs = model(**batch())
    logits = outputs.logits if "logits" in outputs else outputs.start_logits
    assert (logits[0] - logits[1]).abs().max() > 0.1
    return model


def batch(length: int = 11) -> dict[str, torch.Tensor]:
    """Return two sequences, the second one padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, length - 3 :], mask[1, length - 3 :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


HEADS = {
    "bert-tokens": ("BertForTokenClassification", "BertConfig", SIZES),
    "bert-answers": ("BertForQuestionAnswering", "BertConfig", SIZES),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Give every family in turn."""
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
