"""GPTQ: folders whose codes mean, by the format's definition, what the model computes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import write_model, write_recipe
from safetensors.numpy import load_file
from tiny_models import batch, tiny

from exporters import MissingDependency
from pipeline import from_pretrained, gptq, prune_heads, prune_neurons, run, save_pretrained
from pipeline.quantization import QuantizationError
from pipeline.recipe import Recipe, RecipeError
from pipeline.runner import check_target

pytestmark = [  # GPTQModel 7.6 leaves a folder of its own to the garbage collector
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
WIDTHS = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
GPTQ = {"step": "quantize", "method": "gptq"}
BLOCK = 32


@pytest.fixture
def installed():
    """Skip a test where the libraries, which the default install leaves out, are not there."""
    pytest.importorskip("gptqmodel", reason="the extra `gptq` is not installed")


def batches(count=8, length=12):
    """Return inputs whose tokens are few, so that what matrices read is not spread evenly."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, 20, (4, length)) for _ in range(count)]
    return [{"input_ids": each, "attention_mask": np.ones_like(each)} for each in ids]


def logits(model, given=None):
    with torch.inference_mode():
        return model(**(given or batch())).logits.float().numpy()


def matrix(tensors, name):
    """Return the matrix `(outputs, inputs)` that codes stand for, as the format (v1) defines it.

    Eight codes a word, the first in the lowest bits; zero points are stored less one.
    """
    shifts = np.arange(0, 32, 4)
    words, zeros = (tensors[f"{name}.{kind}"].view(np.uint32) for kind in ("qweight", "qzeros"))
    codes = (words[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, words.shape[1])
    zeros = (zeros[:, :, None] >> shifts & 15).reshape(len(zeros), -1) + 1
    scales, groups = tensors[f"{name}.scales"].astype(np.float32), tensors[f"{name}.g_idx"]
    return (scales[groups] * (codes - zeros[groups].astype(np.float32))).T.astype(np.float32)


def rounded(weight):
    """Return a matrix rounded to the nearest of 16 steps, symmetric, a scale for 32 inputs."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scale = np.maximum(np.abs(blocks).max(-1, keepdims=True) / 7.5, 1e-9)
    codes = np.clip(np.round(blocks / scale), -8, 7)
    return (codes * scale).reshape(weight.shape)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_codes_mean_what_the_model_computes(tmp_path, installed, family):
    widths = WIDTHS | ({"num_key_value_heads": 2} if family == "llama" else {})
    model = tiny(family, **widths)
    prune_heads(model, {0: [1]})
    prune_neurons(model, {1: range(32), 2: range(40, 72)})
    save_pretrained(model, tmp_path / "whole")
    found = gptq.quantize(from_pretrained(tmp_path / "whole"), tmp_path / "few", batches(), BLOCK)
    of_layer = 6 if family == "bert" else 7
    assert found == {"quantized_layers": 3 * of_layer, "left_layers": 0}

    whole, opened = from_pretrained(tmp_path / "whole"), from_pretrained(tmp_path / "few")
    tensors = load_file(tmp_path / "few" / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(names) == 3 * of_layer
    seen = []
    first = whole.get_submodule(names[0])
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    inputs = {key: torch.from_numpy(array) for key, array in batches()[0].items()}
    logits(whole, inputs)
    before = first.weight.detach().numpy()
    for name in names:
        weight = whole.get_submodule(name).weight
        weight.data = torch.from_numpy(matrix(tensors, name))
    # What is computed on the CPU is in bf16, whose numbers have 8 bits.
    expected = logits(whole)
    np.testing.assert_allclose(logits(opened), expected, atol=0.05 * np.abs(expected).max())
    read = seen[0].numpy()
    errors = [
        np.square(read @ (after - before).T).sum()
        for after in (matrix(tensors, names[0]), rounded(before))
    ]
    assert errors[0] < errors[1]


def test_what_does_not_fit_is_left_and_named(tmp_path, installed):
    model = tiny("bert", **WIDTHS)
    prune_heads(model, {1: [0]})
    prune_neurons(model, {0: [5]})  # 95 of 96
    found = gptq.quantize(model, tmp_path, batches(), BLOCK)
    assert found == {"quantized_layers": 3 * 4, "left_layers": 3 * 2}
    assert np.isfinite(logits(from_pretrained(tmp_path))).all()
    tensors = load_file(tmp_path / "model.safetensors")
    # The names of both end alike.
    assert "bert.encoder.layer.0.attention.output.dense.qweight" in tensors
    assert tensors["bert.encoder.layer.0.output.dense.weight"].shape == (64, 95)
    assert tensors["bert.encoder.layer.2.output.dense.weight"].shape == (64, 96)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of optimum
def test_stock_transformers_opens_what_was_not_cut(tmp_path, installed):
    gptq.quantize(tiny("llama", **WIDTHS, num_key_value_heads=2), tmp_path, batches(), BLOCK)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(logits(stock.eval()), logits(from_pretrained(tmp_path)))


def test_a_recipe_ends_with_it(tmp_path, installed):
    path = recipe(tmp_path, [{"step": "prune", "neurons": 0.33, "multiple": 32}, GPTQ])
    write_model(tmp_path / "model", **WIDTHS)
    report = run(path, tmp_path / "out")
    stage = json.loads(report.to_json())["stages"][-1]
    assert (stage["format"], stage["runtime"]) == ("torch", "torch")
    assert stage["details"]["quantized_layers"] == 3 * 6
    folder = Path(stage["folder"])
    assert stage["size_bytes"] == (folder / "model.safetensors").stat().st_size
    assert sum(stage["details"]["bytes_by_part"].values()) < stage["size_bytes"]
    assert np.isfinite(logits(from_pretrained(tmp_path / "out" / "artifact"))).all()


def recipe(folder, steps, **target):
    path = write_recipe(
        folder, baseline="original", steps=steps, budget={"max_drop": 0.9, "baseline_floor": -1.0}
    )
    content = yaml.safe_load(path.read_text())
    content["target"] |= {"runtime": "torch"} | target
    content["task"]["splits"]["gate"] = "train[800:864]"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", ["gptqmodel", "optimum"])
def test_without_the_libraries_a_recipe_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "gptqmodel", gptq)  # any module with a spec
    monkeypatch.setitem(sys.modules, name, None)
    expected = rf"{name}: not installed; gptq needs the extra: pip install -e '.\[gptq\]'"
    with pytest.raises(MissingDependency, match=expected):
        check_target(Recipe.from_yaml(recipe(tmp_path, [GPTQ])))
    config = tiny("bert").config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path / "few")
    with pytest.raises(MissingDependency, match=expected):
        from_pretrained(tmp_path / "few", "AutoModelForSequenceClassification")


@pytest.mark.parametrize(
    ("steps", "target", "message"),
    [
        ([GPTQ, {"step": "prune", "heads": 0.1}], {}, "prune needs weights in .* of gptq; move"),
        ([GPTQ, {"step": "finetune"}], {}, "finetune needs weights in floating point"),
        ([GPTQ, {"step": "quantize", "method": "bnb-nf4"}], {}, "is quantized already by gptq"),
        ([GPTQ, {"step": "export"}], {}, r"steps\.1: nothing exports what gptq writes, found exp"),
        ([GPTQ, {"step": "export", "format": "tensorrt"}], {}, "nothing exports what gptq writes"),
        ([GPTQ], {"runtime": "onnxruntime"}, r"steps\.0: gptq is measured in torch on the CPU al"),
        ([GPTQ], {"device": "cuda"}, "expected torch and cpu; or quantize with int4-weights and"),
        ([GPTQ | {"symmetric": True}], {}, r"found \['symmetric'\] with gptq, expected none but"),
        ([GPTQ | {"max_drop": 0.1}], {}, r"found \['max_drop'\] with gptq"),
    ],
)
def test_an_order_that_cannot_work_is_refused(tmp_path, steps, target, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(recipe(tmp_path, steps, **target))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "seq2seq-lm"}, r"steps\.0: gptq takes a text and one stack of layers, found seq"),
        ({"splits": {"gate": "train"}}, "gptq with these settings needs examples to calibrate on"),
    ],
)
def test_a_task_that_cannot_work_is_refused(tmp_path, change, message):
    content = yaml.safe_load(recipe(tmp_path, [GPTQ]).read_text())
    content["task"] |= change
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(tmp_path / "recipe.yaml")


def test_a_model_without_a_matrix_that_fits_is_told(tmp_path):
    model = tiny("bert", hidden_size=48)
    with pytest.raises(QuantizationError, match=r"gptq: found no matrix in bert.encoder.layer who"):
        gptq.quantize(model, tmp_path, batches(), BLOCK)
    with pytest.raises(QuantizationError, match="gptq: found no list of layers in Linear"):
        gptq.quantize(torch.nn.Linear(2, 2), tmp_path, batches(), BLOCK)
