"""A model quantized block by block is what its matrices come to one by one, in memory."""

import importlib.metadata
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROWS, secateur, write_model
from safetensors.numpy import load_file
from test_gptq import BLOCK, WIDTHS, batches, logits, matrix, rounded
from tiny_models import tiny
from torch import nn

from pipeline import (
    from_pretrained,
    prune_heads,
    prune_neurons,
    quantize_by_blocks,
    save_pretrained,
    weight_only,
)
from pipeline.checkpoint import ModelError


def data():
    return [{name: torch.from_numpy(x) for name, x in each.items()} for each in batches()]


def matrices(model):
    """Return the linear modules within the layers, by path."""
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, nn.Linear) and re.search(r"\.\d+\.", n)}


def widths(family):
    return WIDTHS | ({"num_key_value_heads": 2} if family == "llama" else {})


def grams(model, modules):
    """Return the second moments of all rows that modules read."""
    found = {name: np.zeros((m.in_features, m.in_features)) for name, m in modules.items()}

    def see(name, states):
        rows = states.double().flatten(0, -2).numpy()
        found[name] += rows.T @ rows

    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
        for name, module in modules.items()
    ]
    for each in data():
        logits(model, each)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("family", "activations"),
    # DeBERTa's projections read a table of positions, too.
    [("bert", "disk"), ("llama", "memory"), ("deberta-v2", "disk")],
)
def test_it_is_what_is_quantized_in_memory(tmp_path, family, activations):
    model = tiny(family, **widths(family))
    prune_heads(model, {0: [1]})
    prune_neurons(model, {1: range(32), 2: range(40, 72)})
    save_pretrained(model.bfloat16(), tmp_path / "whole")
    found = quantize_by_blocks(
        tmp_path / "whole", tmp_path / "few", data=data, block_size=BLOCK, activations=activations
    )
    whole = nn.Module.float(from_pretrained(tmp_path / "whole"))
    modules = matrices(whole)
    assert found == {"quantized_layers": len(modules), "left_layers": 0}
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "few"))
    seen = grams(whole, modules)
    for name, module in modules.items():
        weight = module.weight.detach().numpy()
        codes, scales, zeros = weight_only.gptq(weight.T, seen[name], BLOCK, symmetric=True)
        groups = np.arange(len(codes)) // BLOCK
        expected = (scales[groups] * (codes - zeros[groups].astype(np.float32))).T
        decoded = matrix(after, name)
        np.testing.assert_allclose(decoded, expected, rtol=1e-3, atol=1e-7)  # scales in fp16
        errors = [w - weight for w in (decoded, rounded(weight))]
        lost = [np.trace(error @ seen[name] @ error.T) for error in errors]
        assert lost[0] < lost[1]
    left = {name for name in before if name.removesuffix(".weight") not in modules}
    assert left == {name for name in after if name.split(".")[-1] in {"weight", "bias"}}
    assert all(before[name].tobytes() == after[name].tobytes() for name in left)
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    told = config["quantization_config"]
    assert told == json.loads((tmp_path / "few" / "quantize_config.json").read_text())
    assert (told["quant_method"], told["bits"], told["group_size"]) == ("gptq", 4, BLOCK)
    assert (told["sym"], told["desc_act"], told["format"]) == (True, False, "gptq")


def test_what_does_not_fit_is_left_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: 1 / 0)  # optimum is not needed
    model = tiny("bert", **WIDTHS)
    prune_neurons(model, {0: [5]})  # 95 of 96
    save_pretrained(model, tmp_path / "whole")
    found = quantize_by_blocks(tmp_path / "whole", tmp_path / "few", data=data, block_size=BLOCK)
    assert found == {"quantized_layers": 3 * 4, "left_layers": 3 * 2}
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    (named,) = config["quantization_config"]["modules_in_block_to_quantize"]
    assert "bert.encoder.layer.0.attention.output.dense" in named
    assert "bert.encoder.layer.0.output.dense" not in named


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_library_opens_it(tmp_path, family):
    pytest.importorskip("gptqmodel", reason="the extra `gptq` is not installed")
    model = tiny(family, **widths(family))
    save_pretrained(model, tmp_path / "whole")
    quantize_by_blocks(tmp_path / "whole", tmp_path / "few", data=data, block_size=BLOCK)
    opened = from_pretrained(tmp_path / "few")
    tensors = load_file(tmp_path / "few" / "model.safetensors")
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        model.get_submodule(name).weight.data = torch.from_numpy(matrix(tensors, name))
    # What is computed on the CPU is in bf16, whose numbers have 8 bits.
    expected = logits(model)
    np.testing.assert_allclose(logits(opened), expected, atol=0.05 * np.abs(expected).max())


def test_the_command_writes_a_folder_once(tmp_path):
    write_model(tmp_path / "model", **WIDTHS)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentence for sentence, _ in ROWS[:40]))
    command = ("quantize", tmp_path / "model", tmp_path / "few", "--text", text)
    command += ("--max-length", "16", "--block-size", "32")
    done = secateur(*command)
    assert done.returncode == 0, done.stderr
    assert "18 matrices in 4 bits, 0 as they were" in done.stdout
    assert (tmp_path / "few" / "tokenizer.json").is_file()
    assert sorted(path.name for path in (tmp_path / "few").glob(".*")) == []
    again = secateur(*command)
    assert again.returncode == 2
    assert "few: there already, expected a new folder" in again.stderr


def test_what_cannot_be_done_is_refused(tmp_path):
    save_pretrained(tiny("llama"), tmp_path / "odd")
    with pytest.raises(ModelError, match="multiples of 224, or take a smaller block size"):
        quantize_by_blocks(tmp_path / "odd", tmp_path / "few", data=data, block_size=7)
    save_pretrained(tiny("gpt2", n_embd=64, n_head=2), tmp_path / "gpt2")
    with pytest.raises(
        ModelError, match="whose matrices transformers does not open in this format"
    ):
        quantize_by_blocks(tmp_path / "gpt2", tmp_path / "few", data=data, block_size=BLOCK)
    with pytest.raises(ModelError, match="there already, expected a new folder"):
        quantize_by_blocks(tmp_path / "odd", tmp_path, data=data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "odd"]
