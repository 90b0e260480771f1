"""bitsandbytes: folders that open again bit for bit, and codes that ONNX files hold unchanged."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
import yaml
from conftest import write_recipe
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from tiny_models import batch, tiny
from torch import nn
from transformers import BitsAndBytesConfig

from exporters import MissingDependency
from exporters import onnx as exporter
from pipeline import bnb, from_pretrained, prune_heads, prune_neurons, run, save_pretrained
from pipeline.checkpoint import ModelError
from pipeline.quantization import QuantizationError
from pipeline.recipe import Recipe, RecipeError
from pipeline.runner import check, check_target

CASES = [(family, method) for family in ("bert", "llama") for method in bnb.METHODS]
HEADS = {"bert": "classifier.weight", "llama": "lm_head.weight"}


def arrays(rows: int, length: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(length).integers(3, 99, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def logits(model) -> np.ndarray:
    with torch.inference_mode():
        return model(**batch()).logits.numpy()


def tensors(folder) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", "np") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Give a function that returns a folder in fewer bits, with another width in every layer."""
    made = {}

    def get(family: str, method: str, *, cut: bool = True) -> Path:
        if (family, method, cut) not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny(family)
            if cut:
                prune_heads(model, {0: [1], 1: [0, 2]})
                prune_neurons(model, {1: [*range(21)]})
            save_pretrained(model, folder / "whole")
            asked = {"quantization_config": bnb.configuration(method, model)}
            save_pretrained(from_pretrained(folder / "whole", **asked), folder / "fewer")
            made[family, method, cut] = folder / "fewer"
        return made[family, method, cut]

    return get


@pytest.mark.parametrize(("family", "method"), CASES)
def test_it_opens_again_bit_for_bit(saved, family, method):
    folder = saved(family, method)
    whole = from_pretrained(folder.parent / "whole")
    linears = [m for m in whole.base_model.modules() if isinstance(m, nn.Linear)]
    asked = {"quantization_config": bnb.configuration(method, whole)}
    made = from_pretrained(folder.parent / "whole", **asked)
    model = from_pretrained(folder)
    assert len(bnb.layers(model)) == bnb.count(model, method) == len(linears)
    assert not np.array_equal(logits(model), logits(whole))
    np.testing.assert_array_equal(logits(model), logits(made))
    head = HEADS[family]
    before = tensors(folder.parent / "whole")
    np.testing.assert_array_equal(tensors(folder)[head], before[head])
    with pytest.raises(ValueError, match="found quantized weights, expected floating point"):
        prune_heads(model, {0: [0]})


@pytest.mark.parametrize("method", bnb.METHODS)
def test_stock_transformers_opens_what_was_not_cut(tmp_path, method):
    # The library's kernels for AVX512 need rows of whole blocks, see `bnb.settle`.
    model = tiny("bert", hidden_size=64, intermediate_size=128)
    save_pretrained(model, tmp_path / "whole")
    asked = {"quantization_config": bnb.configuration(method, model)}
    folder = tmp_path / "fewer"
    save_pretrained(from_pretrained(tmp_path / "whole", **asked), folder)
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, device_map={"": "cpu"}
    )
    np.testing.assert_array_equal(logits(stock.eval()), logits(from_pretrained(folder)))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Give a folder in NF4 with rows of whole blocks, and with others; in panels, and not."""
    folder = tmp_path_factory.mktemp("wide")
    model = tiny("bert", hidden_size=64, intermediate_size=128)
    prune_heads(model, {0: [1]})
    prune_neurons(model, {1: [*range(24)]})
    save_pretrained(model, folder / "whole")
    asked = {"quantization_config": bnb.configuration("bnb-nf4", model)}
    save_pretrained(from_pretrained(folder / "whole", **asked), folder / "fewer")
    shapes = {
        tuple(m.weight.quant_state.shape)
        for m in bnb.layers(from_pretrained(folder / "fewer")).values()
    }
    assert shapes == {(64, 64), (48, 64), (64, 48), (128, 64), (64, 128), (104, 64), (64, 104)}
    return folder / "fewer"


@pytest.mark.parametrize("family", ["narrow", "wide"])
def test_layers_stand_for_what_their_codes_say(saved, wide, family):
    folder = saved("bert", "bnb-nf4") if family == "narrow" else wide
    on_disk = tensors(folder)
    model = from_pretrained(folder)
    for name, layer in bnb.layers(model).items():
        codes = on_disk[f"{name}.weight"].ravel()
        book = on_disk[f"{name}.weight.quant_map"]
        levels = book[np.stack([codes >> 4, codes & 15], axis=1).ravel()]
        scales = np.repeat(on_disk[f"{name}.weight.absmax"], 64)[: levels.size]
        matrix = (levels * scales).reshape(layer.out_features, -1)
        x = torch.randn(3, matrix.shape[1])
        expected = x.numpy() @ matrix.T + layer.bias.detach().numpy()
        with torch.inference_mode():
            found = layer(x).numpy()
        in_bf16 = layer.weight.quant_state.absmax.dtype == torch.bfloat16  # on some CPUs
        np.testing.assert_allclose(found, expected, atol=0.05 if in_bf16 else 2e-5)


def test_scales_that_the_library_has_rounded_are_not_saved(tmp_path, wide):
    model = from_pretrained(wide)
    name, layer = next(
        (name, m) for name, m in bnb.layers(model).items() if m.weight.quant_state.shape == (64, 64)
    )
    pack = pytest.importorskip("bitsandbytes.functional")._convert_weight_packed_for_cpu
    with torch.no_grad():  # as a call does on a CPU with AVX512-BF16
        layer.weight.data, _ = pack(layer.weight.data, layer.weight.quant_state)
    model.state_dict()  # it unpacks the codes, and leaves the scales as they are
    with pytest.raises(QuantizationError, match=f"{name}: found scales that bitsandbytes has"):
        save_pretrained(model, tmp_path / "after")
    with pytest.raises(QuantizationError, match="open the folder again"):
        bnb.plain(model)
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize("fuse_for", ["cpu", None])
@pytest.mark.parametrize(("family", "method"), CASES)
def test_codes_are_carried_over(tmp_path, saved, family, method, fuse_for):
    folder, path = saved(family, method), tmp_path / "carried" / "plain.onnx"
    path.parent.mkdir()
    model = from_pretrained(folder)
    names = list(bnb.layers(model))
    held = bnb.plain(model)
    samples = [arrays(2, 11), arrays(3, 17)]
    exporter.export(
        model,
        samples,
        axes=("batch", "sequence"),
        path=tmp_path / "plain.onnx",
        fuse_for=fuse_for,
    )
    assert bnb.carry_over([tmp_path / "plain.onnx"], path.parent, held) == len(names)

    graph = onnx.load(path).graph
    constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    operator = {"bnb-int8": "DequantizeLinear", "bnb-nf4": "MatMulBnb4"}[method]
    assert sum(node.op_type == operator for node in graph.node) == len(names)
    on_disk = tensors(folder)
    for name in names:
        codes, scales = constants[f"{name}.codes"], constants[f"{name}.scales"]
        if method == "bnb-int8":
            np.testing.assert_array_equal(codes.T, on_disk[f"{name}.weight"])
            np.testing.assert_allclose(scales, on_disk[f"{name}.SCB"] / 127, rtol=1e-6)
        else:
            np.testing.assert_array_equal(codes, on_disk[f"{name}.weight"].ravel())
            np.testing.assert_array_equal(scales, on_disk[f"{name}.weight.absmax"])

    # torch rounds the activations of int8 too, and ONNX Runtime does so in its own way; with whole
    # activations both give what the codes stand for.
    quantized = from_pretrained(folder)
    expected = logits(quantized.dequantize() if method == "bnb-int8" else quantized)
    given = {name: tensor.numpy() for name, tensor in batch().items()}
    if method == "bnb-int8":
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        fed = exporter.session.feeder({x.name: x.shape for x in session.get_inputs()})
        found = session.run(["logits"], fed(given))[0]
    else:
        found = exporter.predictor(path, device="cpu", threads=1)(given)["logits"]
    if (
        found.ndim == 3
    ):  # at padding, which is behind the tokens here, positions are the graph's own
        seen = given["attention_mask"].astype(bool)
        found, expected = found[seen], expected[seen]
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


def packed(folder, *matrices: np.ndarray) -> Path:
    """Write the graph of a product with matrices `(O, I)` that were packed into one."""
    joined = np.concatenate(matrices)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", joined.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", len(joined)])],
        [numpy_helper.from_array(np.ascontiguousarray(joined.T), "w")],
    )
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "packed.onnx")
    return folder / "packed.onnx"


def test_codes_are_carried_over_to_both_graphs_of_an_encoder_decoder(tmp_path, saved):
    model = from_pretrained(saved("t5", "bnb-int8", cut=False))
    names = list(bnb.layers(model))
    held = bnb.plain(model)
    samples = [arrays(2, size) | {"decoder_input_ids": arrays(2, size - 4)["input_ids"]}
               for size in (11, 17)]  # fmt: skip
    (tmp_path / "plain").mkdir(), (tmp_path / "carried").mkdir()
    path = tmp_path / "plain" / "model.onnx"
    exporter.export(model, samples, axes=("batch", "sequence"), path=path, fuse_for=None)
    assert bnb.carry_over(exporter.files(path), tmp_path / "carried", held) >= len(names)
    kept = {x.name for file in (tmp_path / "carried").iterdir()
            for x in onnx.load(file).graph.initializer if x.name.endswith(".codes")}  # fmt: skip
    assert kept == {f"{name}.codes" for name in names}


def nf4(rows: int, columns: int) -> bnb.Codes:
    """Return a random matrix in nf4, quantized by the library itself."""
    functional = bnb.library().functional
    generator = torch.Generator().manual_seed(rows)
    codes, state = functional.quantize_4bit(
        torch.randn(rows, columns, generator=generator), blocksize=64, quant_type="nf4"
    )
    matrix = functional.dequantize_4bit(codes, state).numpy()
    return bnb.Codes(codes.numpy().ravel(), state.absmax.numpy(), matrix, 64)


def test_blocks_may_lie_across_the_border_of_two_layers(tmp_path):
    held = {"a": nf4(3, 50), "b": nf4(7, 50)}  # 150 and 350 weights: no multiple of 64
    path = packed(tmp_path, *(codes.matrix for codes in held.values()))
    (tmp_path / "q").mkdir()
    assert bnb.carry_over([path], tmp_path / "q", held) == 2
    x = np.random.default_rng(0).normal(size=(5, 50)).astype(np.float32)
    expected = exporter.predictor(path, device="cpu", threads=1)({"x": x})["y"]
    found = exporter.predictor(tmp_path / "q" / path.name, device="cpu", threads=1)({"x": x})["y"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_layer_that_is_not_in_the_graph_is_an_error(tmp_path):
    path = packed(tmp_path, nf4(3, 50).matrix)
    (tmp_path / "q").mkdir()
    with pytest.raises(QuantizationError, match=r"packed\.onnx: found no matrix of b and 0 more"):
        bnb.carry_over([path], tmp_path / "q", {"a": nf4(3, 50), "b": nf4(7, 50)})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "found fp4, expected nf4"),
        (
            {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "found nf4 with quantized scales, expected nf4",
        ),
    ],
)
def test_other_formats_of_the_library_are_not_carried_over(saved, keys, message):
    config = BitsAndBytesConfig(load_in_4bit=True, **keys)
    whole = saved("bert", "bnb-nf4").parent / "whole"
    with pytest.raises(QuantizationError, match=message):
        bnb.plain(from_pretrained(whole, quantization_config=config))


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(QuantizationError, match="bnb-nf4: found no layer of FalconForCausalLM"):
        bnb.count(tiny("falcon"), "bnb-nf4")


def test_layers_that_do_not_fit_panels_are_not_packed(wide, monkeypatch):
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    packs = {
        tuple(layer.weight.quant_state.shape)
        for layer in bnb.layers(from_pretrained(wide)).values()
        if layer.support_avx512bf16_for_cpu and "forward" not in vars(layer)
    }
    assert packs == {(64, 64), (128, 64), (64, 128)}


def test_the_library_fetches_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", ModuleType("kernels"))
    with bnb._hidden("kernels"), pytest.raises(ImportError):
        import_module("kernels")
    assert import_module("kernels") is sys.modules["kernels"]


def recipe(folder, steps, **target):
    path = write_recipe(
        folder, baseline="original", steps=steps, budget={"max_drop": 0.9, "baseline_floor": -1.0}
    )
    content = yaml.safe_load(path.read_text())
    content["target"] |= target
    content["task"]["splits"]["gate"] = "train[800:864]"
    path.write_text(yaml.safe_dump(content))
    return path


NF4, INT8 = ({"step": "quantize", "method": method} for method in ("bnb-nf4", "bnb-int8"))


def test_without_the_library_a_recipe_says_what_to_install(tmp_path, saved, monkeypatch):
    folder = saved("bert", "bnb-int8")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependency, match="bitsandbytes: not installed; it comes with both"):
        check_target(Recipe.from_yaml(recipe(tmp_path, [NF4])))
    with pytest.raises(MissingDependency, match="bitsandbytes: not installed"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("steps", "target", "message"),
    [
        ([NF4, {"step": "prune", "heads": 0.1}], {}, "prune needs weights in .*bnb-nf4; move"),
        ([INT8, {"step": "finetune"}], {}, "finetune needs weights in floating point"),
        ([INT8, {"step": "quantize"}], {}, "the model is quantized already by bnb-int8"),
        ([{"step": "quantize"}, INT8], {}, "the model is quantized already by quantize"),
        ([{"step": "export"}, INT8], {}, "bnb-int8 needs a torch model, found ONNX after export"),
        ([NF4, {"step": "export"}], {"runtime": "torch"}, r"steps\.1: export gives ONNX"),
        ([NF4 | {"embeddings": True}], {}, r"found \['embeddings'\] with bnb-nf4"),
        ([NF4 | {"max_drop": 0.1}], {}, r"found \['max_drop'\] with bnb-nf4"),
    ],
)  # fmt: skip
def test_an_order_that_cannot_work_is_refused(tmp_path, steps, target, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(recipe(tmp_path, steps, **target))


def test_a_source_in_fewer_bits_is_refused(tmp_path, saved):
    content = yaml.safe_load(recipe(tmp_path, [{"step": "quantize"}]).read_text())
    content["model"]["source"] = str(saved("bert", "bnb-nf4"))
    with pytest.raises(ModelError, match="found quantized weights, expected floating point"):
        check(Recipe.model_validate(content))


def test_nf4_does_not_go_to_tensorrt(tmp_path):
    steps = [NF4, {"step": "export", "format": "tensorrt"}]
    with pytest.raises(RecipeError, match=r"steps\.1: TensorRT cannot read steps\.0: found nf4"):
        Recipe.from_yaml(recipe(tmp_path, steps))
    Recipe.from_yaml(recipe(tmp_path, [{"step": "quantize", "method": "bnb-int8"}, steps[1]]))


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_a_recipe_runs_on_both_runtimes(tmp_path, runtime):
    steps = [NF4] if runtime == "torch" else [NF4, {"step": "export"}]
    report = run(recipe(tmp_path, steps, runtime=runtime), tmp_path / "out")
    before, stage, *rest = json.loads(report.to_json())["stages"]
    folder = Path(stage["folder"])
    assert (stage["format"], stage["runtime"]) == ("torch", runtime)
    assert stage["parameters"] == before["parameters"]
    assert stage["heads"] == [4, 4, 4]
    assert stage["details"]["quantized_layers"] == 3 * 6 + 1
    assert stage["size_bytes"] == (folder / "model.safetensors").stat().st_size
    on_disk, sizes = tensors(folder), stage["details"]["bytes_by_part"]
    assert sum(sizes.values()) == sum(array.nbytes for array in on_disk.values())
    assert sizes["embeddings"] == before["details"]["bytes_by_part"]["embeddings"]
    of_attention = [array for name, array in on_disk.items() if ".attention." in name]
    assert sizes["attention"] == sum(array.nbytes for array in of_attention)
    assert not any(path.suffix == ".onnx" for path in folder.rglob("*"))
    for exported in rest:
        assert exported["format"] == "onnx"
        assert exported["details"]["quantized_nodes"] == 3 * 6 + 1
        assert exported["size_bytes"] < 0.75 * before["size_bytes"]
        assert exported["score"] == stage["score"]
        kept = exported["details"]["bytes_by_part"]
        assert kept["ffn"] < 0.3 * before["details"]["bytes_by_part"]["ffn"]
