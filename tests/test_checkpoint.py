"""Folders and hub ids: what loads, and what is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_weights, write_model
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, batch, tiny
from transformers import BertConfig, BertForPreTraining

from benchmarks.machine import Unavailable
from exporters import MissingDependency
from pipeline import from_pretrained, prune_heads, save_pretrained, sources
from pipeline.checkpoint import ModelError, load, open_predictor
from pipeline.manifest import file_hash


def test_a_pruned_backbone_takes_another_head(tmp_path):
    model = tiny("bert")
    prune_heads(model, {0: [1]})
    save_pretrained(model, tmp_path)
    from_pretrained(tmp_path, "AutoModel")  # it leaves the classifier behind
    model.bert.save_pretrained(tmp_path)
    other, missing = load(tmp_path, "AutoModelForSequenceClassification")
    assert missing == ["classifier.bias", "classifier.weight"]
    with torch.no_grad():
        states = [m.bert(**batch()).last_hidden_state for m in (model, other)]
    assert torch.equal(*states)
    with pytest.raises(
        ModelError, match=r"found no classifier\.bias, classifier\.weight, expected"
    ):
        from_pretrained(tmp_path, "AutoModelForSequenceClassification")


def test_an_unknown_class_is_refused(tmp_path):
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MyModel"]}))
    with pytest.raises(ModelError, match=r"found architectures \['MyModel'\]"):
        from_pretrained(tmp_path)


def test_what_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="found neither as a folder here nor on the hub") as caught:
        from_pretrained("secateur-test/no-such-model")
    assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: "):
        from_pretrained(tmp_path)


def test_a_predictor_gives_the_model_s_outputs(tmp_path):
    model = tiny("bert")
    save_pretrained(model, tmp_path)
    arrays = {name: tensor.numpy() for name, tensor in batch().items()}
    found = open_predictor(tmp_path, device="cpu", threads=torch.get_num_threads())(arrays)
    with torch.no_grad():
        np.testing.assert_array_equal(found["logits"], model(**batch()).logits.numpy())


def test_a_device_that_is_not_here_is_said(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(Unavailable, match=r"target\.device: found no CUDA device"):
        open_predictor(tmp_path, device="cuda", threads=1)


def test_minilm_is_the_published_one():
    folder = sources.resolve("builtin:minilm")
    assert file_hash(Path(folder, "model.safetensors")) == sources.MINILM_SHA256


def test_other_built_in_models_and_weights_are_refused(monkeypatch):
    with pytest.raises(ModelError, match="builtin:gpt: no such built-in model"):
        sources.resolve("builtin:gpt")
    monkeypatch.setattr(sources, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"found weights with sha256 53aa5117.*expected 0000"):
        sources.resolve("builtin:minilm")
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match=r"install the extra `demo`"):
        sources.resolve("builtin:minilm")


def test_a_folder_is_known_by_its_content(tmp_path):
    write_model(tmp_path)
    before = sources.identity(str(tmp_path), None)
    assert sources.identity(str(tmp_path), None) == before
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    assert sources.identity(str(tmp_path), None) != before


def test_a_processor_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ModelError, match="found no tokenizer or processor, expected one of"):
        sources.processor(str(tmp_path), "AutoTokenizer", None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its AutoTokenizer cannot be loaded"):
        sources.processor(str(tmp_path), "AutoTokenizer", None)


def test_a_backbone_may_leave_its_old_head_behind_but_no_layer(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"cls.predictions.bias": torch.zeros(99)}
    tensors = {name: t for name, t in tensors.items() if not name.startswith("classifier")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, missing = load(tmp_path, "AutoModelForSequenceClassification")
    assert missing == ["classifier.bias", "classifier.weight"]
    tensors |= {"bert.encoder.layer.3.output.dense.bias": torch.zeros(32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"found bert\.encoder\.layer\.3\.output\.dense\.bias"):
        load(tmp_path, "AutoModelForSequenceClassification")


@pytest.mark.parametrize("name", ["bert", "roberta", "vit", "gpt2"])
def test_what_the_stock_class_leaves_behind_is_left_behind(name, tmp_path):
    if name == "bert":  # as bert-base-uncased is
        model, ending = BertForPreTraining(BertConfig(**SIZES)), "ForMaskedLM"
        model.save_pretrained(tmp_path)
        change = {"architectures": ["BertForMaskedLM"]}
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | change))
    else:
        model, ending = tiny(name), {"gpt2": "LMHeadModel"}.get(name, "Classification")
        model.save_pretrained(tmp_path)
        left = {"pooler.dense.weight": torch.zeros(32, 32)}
        if name == "gpt2":
            left = {f"transformer.h.{n}.attn.masked_bias": torch.zeros(()) for n in range(3)}
        edit_weights(tmp_path, lambda tensors: tensors.update(left))
    assert type(from_pretrained(tmp_path)).__name__.endswith(ending)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    wrong = {"classifier.weight": torch.zeros(3, 32)}
    edit_weights(tmp_path, lambda tensors: tensors.update(wrong))
    with pytest.raises(
        ModelError, match=r"found classifier\.weight of the shape \(3, 32\), expected \(2, 32\)"
    ):
        from_pretrained(tmp_path)


def test_a_model_may_lie_on_disk_in_part(tmp_path):
    model = tiny("bert")
    prune_heads(model, {1: [0]})
    save_pretrained(model, tmp_path)
    parts = ["embeddings", *(f"encoder.layer.{n}" for n in range(3)), "pooler"]
    places = {f"bert.{part}": "cpu" for part in parts} | {"classifier": "cpu"}
    places["bert.encoder.layer.1"] = "disk"
    loaded = from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "disk")
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_options_reach_the_configuration_too_or_are_refused(tmp_path):
    model = tiny("bert")
    prune_heads(model, {0: [1]})
    save_pretrained(model, tmp_path / "inside")
    assert from_pretrained(tmp_path, subfolder="inside", num_labels=2).config.num_labels == 2
    with pytest.raises(
        ModelError, match=r"found classifier\.bias of the shape \(2,\), exp.* \(5,\)"
    ):
        from_pretrained(tmp_path, subfolder="inside", num_labels=5)
    with pytest.raises(ModelError, match=r"found an option that cannot be given here: .*layers"):
        from_pretrained(tmp_path, subfolder="inside", num_hidden_layers=2)
    with pytest.raises(ModelError, match="found neither as a folder here nor on the hub"):
        from_pretrained("secateur-test/no-such-model", cache_dir=tmp_path, token="x")
