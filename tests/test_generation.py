"""ONNX Runtime generates what torch does, from models cut differently in every layer."""

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tiny_models import tiny
from transformers import AutoTokenizer

from exporters import ExportError
from exporters import onnx as exporter
from exporters.onnx.generation import open_generator, open_timed
from pipeline import prune_heads, prune_neurons, save_pretrained, units

ENDS = (5, 11, 17, 23)
"""Of 99 tokens: so many that some rows of sharp random models end early, and others do not."""


def texts(batch, sequence, *, left=False):
    """Return rows of different lengths, padded on one side."""
    generator = np.random.default_rng(batch * sequence)
    ids = generator.integers(3, 99, (batch, sequence))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
    return (
        {"input_ids": np.where(mask, ids, 0), "attention_mask": mask}
        if left
        else {
            "input_ids": np.where(mask, ids, 0)[:, ::-1].copy(),
            "attention_mask": mask[:, ::-1].copy(),
        }
    )


def cut(family):
    model = tiny(family)
    found = units(model)
    for at, path in enumerate(found.heads):
        prune_heads(model, {path: [at % 4, *([(at + 1) % 4] if at % 2 else [])]})
    for at, path in enumerate(found.neurons):
        prune_neurons(model, {path: range(at, at + 5 * at + 3)})
    assert len(set(units(model).heads.values())) > 1
    assert len(set(units(model).neurons.values())) > 1
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Give a function from a family to a cut model and the folder of its export, made once."""
    made = {}

    def get(family):
        if family not in made:
            folder, model = tmp_path_factory.mktemp(family), cut(family)
            (folder / exporter.MODEL).parent.mkdir()
            samples = [texts(2, 11), texts(3, 17)]
            if model.config.is_encoder_decoder:
                tokens = texts(3, 7)["input_ids"]
                samples = [
                    s | {"decoder_input_ids": tokens[: len(s["input_ids"])]} for s in samples
                ]
            exporter.export(
                model, samples, axes=("batch", "sequence"), path=folder / exporter.MODEL,
                fuse_for="cpu",
            )  # fmt: skip
            save_pretrained(model, folder)
            made[family] = model, folder
        return made[family]

    return get


def both(model, folder, inputs, many, **rules):
    """Return the tokens of ONNX Runtime and of torch, by the same rules."""
    kept = copy.deepcopy(model.generation_config)
    model.generation_config.update(**rules)
    model.generation_config.save_pretrained(folder)
    try:
        found = open_generator(folder, device="cpu", threads=1)(inputs, max_new_tokens=many)
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        expected = model.generate(**given, max_new_tokens=many, do_sample=False, num_beams=1)
    finally:
        model.generation_config = kept
        kept.save_pretrained(folder)
    return found.tolist(), expected.tolist()


@pytest.mark.parametrize("family", ["t5", "bart", "llama"])
def test_the_same_tokens_as_torch(family, written):
    model, folder = written(family)
    lengths = set()
    for batch, sequence, many in ((4, 13, 12), (3, 23, 20), (1, 5, 9)):
        inputs = texts(batch, sequence, left=not model.config.is_encoder_decoder)
        found, expected = both(model, folder, inputs, many, eos_token_id=[*ENDS])
        assert found == expected
        begins = 1 if model.config.is_encoder_decoder else sequence
        new = np.asarray(found)[:, begins:]
        lengths |= {len(row) - int(np.argmax(np.isin(row, ENDS)[::-1])) for row in new}
    assert len(lengths) > 1  # rows ended at different places


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_every_token_is_timed_whatever_would_end_the_text(family, written):
    model, folder = written(family)
    model.generation_config.eos_token_id = [*range(99)]
    model.generation_config.save_pretrained(folder)
    predict = open_timed(folder, device="cpu", threads=1)
    inputs = texts(2, 9, left=not model.config.is_encoder_decoder)
    stamps = predict(inputs | {"new_tokens": np.asarray(6)})["token_ns"]
    assert len(stamps) == 6
    assert stamps[0] > 0 < np.diff(stamps).min()


RULES = {
    "bad_words_ids": lambda first: {"bad_words_ids": [[first]]},
    "begin_suppress_tokens": lambda first: {"begin_suppress_tokens": [first, 9]},
    "behind a forced token": lambda first: {
        "forced_bos_token_id": 7,
        "begin_suppress_tokens": [first],
    },
    "forced_bos_token_id": lambda _: {"forced_bos_token_id": 7},
    "forced_eos_token_id": lambda _: {"forced_eos_token_id": 2},
    "min_length": lambda first: {"min_length": 26, "eos_token_id": first},
    "min_new_tokens": lambda first: {"min_new_tokens": 4, "eos_token_id": [first, 8]},
    "no_repeat_ngram_size": lambda _: {"no_repeat_ngram_size": 2},
    "repetition_penalty": lambda _: {"repetition_penalty": 1.7},
    "suppress_tokens": lambda first: {"suppress_tokens": [first]},
}


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("name", RULES)
def test_the_rules_of_a_generation_configuration(family, name, written):
    model, folder = written(family)
    inputs = texts(3, 23, left=not model.config.is_encoder_decoder)
    plain, _ = both(model, folder, inputs, 30, eos_token_id=None)
    first = plain[0][1 if model.config.is_encoder_decoder else 23]
    rule = {"eos_token_id": None} | RULES[name](first)
    found, expected = both(model, folder, inputs, 30, **rule)
    assert found == expected
    prompts = name == "forced_bos_token_id" and family == "llama"  # they begin with other tokens
    assert (found == plain) == prompts


def test_a_mask_may_be_left_out(written):
    model, folder = written("llama")
    inputs = {"input_ids": texts(1, 9)["input_ids"]}
    found, expected = both(model, folder, inputs, 5)
    assert found == expected


def test_the_same_text_from_a_real_model(shared, tmp_path):
    """A trained decoder, a quarter of its heads and neurons cut, goes on with the same words."""
    from pipeline import from_pretrained

    source = shared / "models" / "stories260k"
    model = from_pretrained(source)
    prune_heads(model, {0: [1, 3], 2: [0], 3: [2], 4: [3]})  # 5 of 20
    prune_neurons(model, {0: range(86), 1: range(43), 3: range(20, 63), 4: range(100, 143)})
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", pad_token="<unk>")
    prompts = ["Once upon a time", "The dog was", "Lily and her mom went to the park. They saw a"]
    inputs = dict(tokenizer(prompts, padding=True, return_tensors="np"))
    (tmp_path / exporter.MODEL).parent.mkdir()
    exporter.export(
        model, [inputs], axes=("batch", "sequence"), path=tmp_path / exporter.MODEL, fuse_for="cpu"
    )
    save_pretrained(model, tmp_path)
    found, expected = both(model, tmp_path, inputs, 60)
    assert tokenizer.batch_decode(found) == tokenizer.batch_decode(expected)
    said = tokenizer.batch_decode(found, skip_special_tokens=True)
    assert all(text.startswith(prompt) for text, prompt in zip(said, prompts, strict=True))
    assert len(set(found[0])) > 10


def test_another_models_tokens_are_told(written):
    (model, folder), samples = written("llama"), texts(2, 11)
    assert exporter.generated(model, samples, folder / exporter.MODEL) <= 1e-6
    with pytest.raises(ExportError, match="generates tokens whose logits lie"):
        exporter.generated(tiny("llama", seed=1), samples, folder / exporter.MODEL)


def no_cache(path):
    """Write a graph that gives logits, and nothing else."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["floats", "axis"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 1])],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [2])],
    )
    path.parent.mkdir(exist_ok=True)
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def test_what_cannot_generate_is_refused(tmp_path):
    options = {"device": "cpu", "threads": 1}
    no_cache(tmp_path / exporter.MODEL)
    with pytest.raises(ValueError, match="expected one; it says what ends a text"):
        open_generator(tmp_path, **options)
    (tmp_path / "config.json").write_text("{}")
    generate = open_generator(tmp_path, **options)
    with pytest.raises(ValueError, match=r"found the outputs \['logits'\], expected a cache"):
        generate(texts(2, 5, left=True), max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens: found 0, expected 1 or more"):
        generate(texts(2, 5, left=True), max_new_tokens=0)
    with pytest.raises(ValueError, match="found prompts with padding behind them"):
        generate(texts(2, 5), max_new_tokens=3)
    no_cache(exporter.encoder_file(tmp_path / exporter.MODEL))
    with pytest.raises(ValueError, match="found no decoder_start_token_id, expected one"):
        open_generator(tmp_path, **options)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ({"sequence_bias": [[[5], 2.0]]}, "sequence_bias"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"dola_layers": "high"}, "dola_layers"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size"),
        ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty"),
        ({"exponential_decay_length_penalty": [3, 1.1]}, "exponential_decay_length_penalty"),
        ({"force_words_ids": [[5]]}, "force_words_ids"),
        ({"stop_strings": ["."]}, "stop_strings"),
        ({"token_healing": True}, "token_healing"),
        ({"watermarking_config": {"bias": 2.0}}, "watermarking_config"),
        ({"bad_words_ids": [[5, 6]]}, "bad_words_ids of several tokens"),
    ],
)
def test_rules_that_are_not_known_are_refused(tmp_path, rule, name):
    (tmp_path / "generation_config.json").write_text(json.dumps(rule))
    with pytest.raises(ValueError, match=f"found {name}, expected no such rule for greedy"):
        open_generator(tmp_path, device="cpu", threads=1)
