"""A model's parts, counted from its configuration alone."""

import re

import pytest
import torch
from tiny_models import FAMILIES, tiny
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from pipeline import prune_heads, prune_layers, prune_neurons, save_pretrained, units
from pipeline.checkpoint import ModelError
from pipeline.cli import main
from pipeline.inspection import draw, head_scores, inspect
from pipeline.recipe import Recipe


@pytest.mark.parametrize("every", FAMILIES)
def test_parts_add_up_to_the_model(every, tmp_path):
    model = tiny(every)
    prune_neurons(model, {path: [0, 1] for path in units(model).neurons})
    save_pretrained(model, tmp_path)
    found = inspect(tmp_path, sequence=8)
    assert sum(found.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert found.parameters["attention"] > 0
    assert found.parameters["ffn"] > 0
    assert found.multiply_adds["attention"] > 0
    # Neither norms nor look-ups multiply matrices.
    assert (found.multiply_adds["embeddings"], found.multiply_adds["rest of the layers"]) == (0, 0)
    assert min(found.multiply_adds.values()) >= 0
    assert not found.uncounted
    assert not found.refusal


def test_multiply_adds_are_those_counted_by_hand(tmp_path):
    model = tiny("bert")
    prune_heads(model, {0: [1], 1: [0, 1, 2, 3]})
    save_pretrained(model, tmp_path)
    found = inspect(tmp_path, sequence=16)
    tokens, width, heads = 16, 8, 3 + 0 + 4
    projections = 4 * tokens * 32 * heads * width
    products = 2 * tokens * tokens * heads * width
    assert found.multiply_adds["attention"] == projections + products
    assert found.multiply_adds["ffn"] == 3 * 2 * tokens * 32 * 48
    # The pooler and the classifier see one token.
    assert found.multiply_adds["head and rest"] == 32 * 32 + 32 * 2
    assert [x.heads for x in found.layers if x.heads] == [(3, 4), (0, 4), (4, 4)]
    left = units(model)
    assert {x.name for x in found.layers if x.neurons} == {*left.neurons}
    assert {x.name for x in found.layers if x.heads} == {*left.heads}


def test_the_command_shows_what_is_left(tmp_path, capsys):
    model = tiny("llama")
    prune_heads(model, {1: [0]})
    save_pretrained(model, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tmp_path)])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(r"model\.layers\.1\.self_attn +3 of 4 +6 of 8", shown)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in shown


def test_the_command_shows_layers_and_which_have_to_stay(tmp_path, capsys):
    model = tiny("t5")
    prune_layers(model, ["decoder.block.1"])
    save_pretrained(model, tmp_path / "t5")
    save_pretrained(tiny("albert"), tmp_path / "albert")
    for name in ("t5", "albert"):
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(tmp_path / name)])
        assert ended.value.code == 0
    shown = capsys.readouterr().out
    reason = "layer 0 stays: it holds the position bias of all layers"
    assert f"encoder.block: 2 of 2 layers; {reason}" in shown
    assert f"decoder.block: 1 of 2 layers; {reason}" in shown
    assert "1 of 1 layers; all stay: layers that share their weights" in shown


def test_what_cannot_be_counted_is_said(tmp_path, capsys):
    config = Wav2Vec2Config(vocab_size=9, hidden_size=16, num_hidden_layers=1, intermediate_size=8,
                            num_attention_heads=2, conv_dim=(8,), conv_kernel=(3,),
                            conv_stride=(2,), num_conv_pos_embeddings=4,
                            num_conv_pos_embedding_groups=2)  # fmt: skip
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.multiply_adds is None
    assert "the input 'input_values' is not one that can be made up" in found.uncounted
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tmp_path)])
    assert ended.value.code == 0
    assert "multiply-adds not counted: the input 'input_values'" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        inspect(tmp_path / "nowhere")


def test_no_weights_are_read(tmp_path):
    save_pretrained(tiny("bert"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert inspect(tmp_path).family == "bert"
    assert torch.get_default_device().type == "cpu"


def test_scores_of_heads_are_drawn(shared, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{source: {shared}/models/minilm-sst2}}\n"
        "task:\n"
        "  kind: text-classification\n"
        f"  data: {shared}/data/sst2\n"
        "  columns: {text: sentence}\n"
        "  splits: {calibration: 'train[:48]', gate: 'validation[:48]'}\n"
        "steps: [{step: prune, heads: 0.25}]\nbudget: {max_drop: 0.1}\n"
    )
    scores = head_scores(Recipe.from_yaml(recipe))
    assert [len(of_layer) for of_layer in scores.values()] == [12] * 6
    assert len({score for of_layer in scores.values() for score in of_layer}) > 60
    draw(scores, tmp_path / "scores.svg")
    shown = (tmp_path / "scores.svg").read_text()
    assert "<svg" in shown
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(shared / "models/minilm-sst2"), "--scores", "x.svg"])
    assert ended.value.code == 2


def test_a_file_in_no_folder_is_refused_before_the_work(tmp_path, capsys):
    save_pretrained(tiny("llama"), tmp_path)
    target = tmp_path / "nowhere" / "config.json"
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tmp_path), "--per-layer-config", str(target)])
    assert ended.value.code == 2
    assert f"--per-layer-config: found no folder {target.parent}" in capsys.readouterr().err
