"""Recipes, models and data that are wrong: one error, exit code 2, no traceback, no artifact."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import edit_weights, secateur, write_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Give a folder with a recipe, its model and its data, all of them good."""
    folder = tmp_path_factory.mktemp("good")
    write_recipe(folder)
    (folder / "recipe.yaml").rename(folder / "original.yaml")
    return folder


def refused(folder, path, code=2):
    """Assert that a recipe is refused as it should be, and return what is said."""
    done = secateur("check", path)
    assert done.returncode == code, done.stdout + done.stderr
    assert not (folder / "runs").exists()
    return told(done)


def told(done):
    """Return what a command says on its last line, or lines, as it should be said."""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("secateur: ") == 1, done.stderr
    return done.stderr.partition("secateur: ")[2]


def recipe_of(folder):
    return yaml.safe_load((folder / "original.yaml").read_text())


def put(where, value):
    """Return what changes a recipe at a path such as `task.splits.gate`."""

    def change(recipe):
        *parts, last = where.split(".")
        held = recipe
        for part in parts:
            held = held[int(part) if part.isdigit() else part]
        held[int(last) if last.isdigit() else last] = value

    return change


TEXTS = {
    "empty": "",
    "a list": "- model",
    "a number": "3",
    "not YAML": "model: [",
    "tabs": "model:\n\tsource: x",
    "two documents": "model: {}\n---\nmodel: {}",
    "an unknown anchor": "model: *no",
    "a cycle": "&a model: &b [*b]\ntask: *b",
    "nested": "model: " + "[" * 3000,
    "bytes": b"\xff\xfe\x00model",
    "a control character": "model: \x07",
    "a wrong date": "model: 2020-99-99",
    "a merge": "<<: 3",
    "a bomb": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))
    + "model: *i\nsteps: *i\n",
    "keys that are lists": "? [a, b]\n: 3",
}
VALUES = {
    "no source": ("model.source", ""),
    "a source that is too long": ("model.source", "/" + "x" * 5000),
    "data of a zero byte": ("task.data", "data\0.csv"),
    "data that are too long": ("task.data", "x" * 5000 + ".csv"),
    "a source that is a list": ("model.source", ["a"]),
    "a kind": ("task.kind", "classify"),
    "a kind that is null": ("task.kind", None),
    "a split that is a number": ("task.splits.gate", 3),
    "a length": ("task.max_length", -1),
    "an infinite length": ("task.max_length", float("inf")),
    "a role": ("task.columns", {"words": "text"}),
    "a metric": ("task.metric", "bleu"),
    "no loads": ("target.loads", []),
    "a batch": ("target.loads.0.batch", 0),
    "a batch that is a text": ("target.loads.0.batch", "two"),
    "threads": ("target.threads", 0.5),
    "no steps": ("steps", []),
    "a step": ("steps.1", "prune"),
    "a step without a name": ("steps.1", {"heads": 0.5}),
    "all heads": ("steps.1.heads", 1.0),
    "NaN heads": ("steps.1.heads", float("nan")),
    "a teacher": ("steps.2.teacher", "nobody"),
    "no limit": ("budget", {}),
    "a drop": ("budget.max_drop", "much"),
    "a baseline": ("baseline", "export"),
    "a seed": ("seed", -1),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_no_recipe_is_refused(tmp_path, name):
    text, path = TEXTS[name], tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path, path)


@pytest.mark.parametrize("name", VALUES)
def test_a_recipe_with_a_wrong_value_is_refused(tmp_path, good, name):
    where, value = VALUES[name]
    recipe = recipe_of(good)
    put(where, value)(recipe)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    refused(tmp_path, tmp_path / "recipe.yaml")


def config(**changes):
    def change(folder):
        held = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(held | changes))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


MODELS = {
    "empty config": write("config.json", b""),
    "config that is text": write("config.json", b'"bert"'),
    "config that is not UTF-8": write("config.json", b"\xff{}"),
    "no family": config(model_type=None),
    "a family that is none": config(model_type="../bert"),
    "a family that is a list": config(model_type=["bert"]),
    "another task": config(model_type="vit"),
    "layers in words": config(num_hidden_layers="two"),
    "a width of another kind": config(hidden_size={"a": 1}),
    "labels that are a list": config(id2label=["a", "b"]),
    "quantized": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "positions": config(max_position_embeddings=8),
    "empty tokenizer": write("tokenizer.json", b"{}"),
    "tokenizer that is no JSON": write("tokenizer.json", b"\x00\x01"),
    "tokenizer config that is a list": write("tokenizer_config.json", b"[]"),
}


def with_model(folder, good, change):
    """Copy what is good, change its model, and return the path of its recipe."""
    shutil.copytree(good, folder, dirs_exist_ok=True)
    change(folder / "model")
    recipe = recipe_of(folder)
    recipe["model"]["source"] = str(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_wrong_is_refused(tmp_path, good, name):
    refused(tmp_path, with_model(tmp_path, good, MODELS[name]))


BUILT = {
    "no heads": config(num_attention_heads=0),
    "heads that do not divide": config(num_attention_heads=5),
    "a width below 0": config(hidden_size=-32),
    "an activation": config(hidden_act="__import__('os')"),
    "a pruning of nothing": config(pruning={"heads": {"nowhere": [1]}}),
    "a pruning that is a list": config(pruning=["heads"]),
    "heads that are a number": config(pruning={"heads": 3}),
    "heads of words": config(pruning={"heads": {"bert.encoder.layer.0.attention": {"kept": "a"}}}),
    "empty": write("model.safetensors", b""),
    "a header that is too long": write("model.safetensors", b"\xff" * 64),
    "a header that is no JSON": write("model.safetensors", b"\x04" + b"\0" * 7 + b"{{{{"),
    "HTML": write("model.safetensors", b"<html>not found</html>" * 9),
    "a tensor of another shape": lambda folder: edit_weights(
        folder,
        lambda tensors: tensors.update({"classifier.weight": tensors["classifier.bias"] + 0}),
    ),
}


@pytest.mark.parametrize("name", BUILT)
def test_a_model_that_cannot_be_built_is_refused(tmp_path, good, name):
    path = with_model(tmp_path, good, BUILT[name])
    done = secateur("run", path, "--output", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert [
        p for p in (tmp_path / "out").rglob("*") if p.name in {"artifact", "manifest.json"}
    ] == []


DATA = {
    "empty": ("data.csv", b""),
    "a header alone": ("data.csv", b"text,label\n"),
    "another header": ("data.csv", b"review,stars\nx,1\n" * 900),
    "too few rows": ("data.csv", b"text,label\nx,1\n"),
    "rows of other lengths": ("data.csv", b"text,label\na,1\nb,1,2,3\n"),
    "a quote that never ends": ("data.csv", b'text,label\n"a,1\n' + b"b,1\n" * 9),
    "bytes": ("data.csv", bytes(range(256)) * 4),
    "another encoding": ("data.csv", "text,label\né,1\n".encode("utf-16")),
    "empty values": ("data.csv", b"text,label\n,1\n" * 900),
    "not JSON": ("data.jsonl", b"{text: 1}\n"),
    "a JSON number": ("data.json", b"3"),
    "JSON of other columns": ("data.jsonl", b'{"a": 1}\n{"b": 2}\n'),
    "JSON of other kinds": ("data.jsonl", b'{"text": "a", "label": 1}\n{"text": 1, "label": {}}\n'),
    "no parquet": ("data.parquet", b"PAR1 no PAR1"),
    "no gzip": ("data.csv.gz", b"text,label\na,1\n"),
    "no suffix": ("data", b"text,label\na,1\n"),
    "a suffix that is not known": ("data.xlsx", b"PK"),
    "labels that the model has not": (
        "data.csv", b"text,label\n" + b"".join(b"word %d,%d\n" % (at, at) for at in range(1400)),
    ),
    "one text again and again": ("data.csv", b"text,label\n" + b"good film,1\n" * 1400),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_that_are_wrong_are_refused(tmp_path, good, name):
    file, content = DATA[name]
    (tmp_path / file).write_bytes(content)
    recipe = recipe_of(good)
    recipe["task"]["data"] = str(tmp_path / file)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    refused(tmp_path, tmp_path / "recipe.yaml")


def test_there_are_sixty_and_more():
    assert len(TEXTS) + len(VALUES) + len(MODELS) + len(BUILT) + len(DATA) >= 60


KEYS = ["model", "source", "task", "kind", "steps", "step", "heads", "budget", "max_drop", "goal"]
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([*KEYS, "prune", "finetune", "quantize", "int8-static", "train[:9]"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(value, path=()):
    """Return the path of everything in a recipe."""
    yield path
    for key, held in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, list) else ())
    ):
        yield from places(held, (*path, key))


@st.composite
def fuzzed(draw, recipe):
    """Draw the text of a recipe in which a few things were changed, dropped, added or torn."""
    recipe = json.loads(json.dumps(recipe))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(list(places(recipe))[1:] or [("model",)]))
        held = recipe
        for key in parents:
            held = held[key]
        match draw(st.sampled_from(["change", "drop", "rename"])):
            case "change":
                held[last] = draw(VALUE)
            case "drop":
                del held[last]
            case "rename" if isinstance(held, dict):
                held[draw(st.sampled_from(KEYS) | st.text(max_size=4))] = held.pop(last)
    text = yaml.safe_dump(recipe, allow_unicode=True)
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.text(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    return text


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_fuzzed_recipe_gets_through_or_crashes(tmp_path, good, count):
    """Its model is nowhere, so that even a recipe that is still good is refused."""
    recipe = recipe_of(good)
    recipe["model"]["source"] = str(tmp_path / "nowhere")
    path = tmp_path / "recipe.yaml"

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(fuzzed(recipe))
    def check(text):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        done = secateur("check", path)
        assert done.returncode in {2, 4}, done.stderr
        assert told(done)

    check()
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]
    assert not Path("runs").exists()
