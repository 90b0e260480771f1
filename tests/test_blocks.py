"""Block by block is as a whole: the same states, and refusals where it could not be."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import batch, tiny
from transformers import FNetConfig, FNetForSequenceClassification

from pipeline import calibration, save_pretrained, structure
from pipeline.blocks import open_blocks, walk
from pipeline.checkpoint import ModelError


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_moments_are_those_of_the_whole_model(tmp_path, where):
    model = tiny("gemma2", sliding_window=4)  # whose layers are given different masks
    save_pretrained(model, tmp_path)
    data = [batch(9), batch(12), batch(7)]
    groups = [group for group in structure.groups(model) if group.kind != "queries"]
    readers = {group.path: group.reader for group in groups}
    expected = calibration.moments(model, readers, data, total=3)
    blocks = open_blocks(tmp_path)
    own = [group for group in structure.groups(blocks.model) if group.path in readers]
    own = [group for group in own if group.kind != "queries"]
    found = {}
    folder = tmp_path / "states" if where == "disk" else None

    def of_block(path):
        return {each.path: each.reader for each in own if each.path.startswith(f"{path}.")}

    for path, seen in walk(blocks, of_block, lambda: data, folder, what=""):
        assert of_block(path).keys() == seen.keys()
        assert not any(tensor.is_meta for tensor in blocks.model.get_submodule(path).parameters())
        loaded = sum(not tensor.is_meta for tensor in blocks.model.parameters())
        assert loaded == len([*blocks.model.get_submodule(path).parameters()])
        found |= seen
    assert all(tensor.is_meta for tensor in blocks.model.parameters())
    assert found.keys() == expected.keys()
    for path, moments in expected.items():
        torch.testing.assert_close(found[path].fit, moments.fit)
        torch.testing.assert_close(found[path].held_out, moments.held_out)


def test_states_that_change_between_layers_are_refused(tmp_path):
    # DeBERTa's convolution stands between its first two layers.
    save_pretrained(tiny("deberta-v2", conv_kernel_size=3), tmp_path)
    blocks = open_blocks(tmp_path)
    with pytest.raises(ModelError, match="found states that change between the layers"):
        next(walk(blocks, lambda _: {}, lambda: [batch()], None, what=""))


def test_wrong_inputs_are_not_taken_for_that(tmp_path):
    save_pretrained(tiny("llama"), tmp_path)
    with pytest.raises(ValueError, match="input_ids"):
        next(walk(open_blocks(tmp_path), lambda _: {}, lambda: [{}], None, what=""))


@pytest.mark.parametrize("family", ["albert", "bart", "t5"])
def test_other_stacks_are_refused(tmp_path, family):
    save_pretrained(tiny(family), tmp_path)
    with pytest.raises(ModelError, match="expected one stack of layers with weights of their own"):
        open_blocks(tmp_path)


def test_families_that_are_not_known_are_refused(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 9}
    save_pretrained(FNetForSequenceClassification(FNetConfig(**sizes)), tmp_path / "fnet")
    with pytest.raises(ModelError, match="FNetForSequenceClassification, expected one of the fam"):
        open_blocks(tmp_path / "fnet")
    model = tiny("albert")
    model.config.inner_group_num = 2
    model.save_pretrained(tmp_path / "albert")
    with pytest.raises(ModelError, match="found inner_group_num 2, expected 1"):
        open_blocks(tmp_path / "albert")


def test_pickles_are_refused(tmp_path):
    model = tiny("bert")
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"found weights in pytorch_model\.bin alone, a pickle"):
        open_blocks(tmp_path)


def edited(folder, change):
    save_pretrained(tiny("bert"), folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("classifier.weight"), r"found no classifier\.weight, expected every"),
        (
            lambda t: t.update({"bert.encoder.layer.9.output.dense.bias": torch.zeros(2)}),
            r"found bert\.encoder\.layer\.9\.output\.dense\.bias, which BertFor",
        ),
        (
            lambda t: t.update({"classifier.weight": torch.zeros(2, 3)}),
            r"found classifier\.weight of the shape \(2, 3\), expected \(2, 32\)",
        ),
    ],
)
def test_files_of_another_model_are_refused(tmp_path, change, message):
    edited(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        open_blocks(tmp_path)


def test_what_is_no_folder_or_quantized_is_refused(tmp_path):
    with pytest.raises(ModelError, match="found no folder, expected one"):
        open_blocks(tmp_path / "none")
    model = tiny("bert")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(tmp_path)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="with quantized weights, expected floating point"):
        open_blocks(tmp_path)
