"""A recipe is read once, and all that is wrong with it is said at once."""

from contextlib import suppress
from copy import deepcopy

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.recipe import Recipe, RecipeError

GOOD = {
    "model": {"source": "folder"},
    "task": {
        "kind": "text-classification",
        "data": "data.csv",
        "splits": {"train": "train[:80%]", "calibration": "train[80%:90%]", "gate": "train[90%:]"},
    },
    "steps": [
        {"step": "prune", "heads": 0.25},
        {"step": "finetune", "teacher": "original"},
        {"step": "quantize"},
        {"step": "export"},
    ],
    "budget": {"max_drop": 0.01},
}


def read(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return Recipe.from_yaml(path)


def changed(*path_and_value):
    """Return the good recipe with one value changed, or with `...` taken out."""
    *path, key, value = path_and_value
    recipe = deepcopy(GOOD)
    place = recipe
    for part in path:
        place = place[part]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return recipe


def test_a_good_recipe_has_its_defaults(tmp_path):
    recipe = read(tmp_path, GOOD)
    assert recipe.stage_names == ("prune", "finetune", "quantize", "export")
    assert (recipe.target.runtime, recipe.target.device) == ("onnxruntime", "cpu")
    assert recipe.budget.confidence == 0.95
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_repeated_steps_are_numbered(tmp_path):
    steps = [{"step": "finetune"}, {"step": "prune", "heads": 0.1}, {"step": "finetune"}]
    recipe = read(tmp_path, changed("steps", steps) | {"baseline": "finetune"})
    assert recipe.stage_names == ("finetune", "prune", "finetune-2")
    assert recipe.baseline_at == 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (changed("modle", {}), "modle: unknown key; did you mean 'model'"),
        (changed("model", ...), "model: Field required"),
        (changed("task", "kind", "text-clasification"), "did you mean 'text-classification'"),
        (
            changed("task", "metric", "perplexity"),
            "task: metric: found 'perplexity', expected one of",
        ),
        (
            changed("task", "columns", {"txt": "x"}),
            "columns: found 'txt', expected one of.*did you mean 'text'",
        ),
        (changed("task", "splits", "gate", ...), r"task\.splits\.gate: Field required"),
        (
            changed("steps", 0, "step", "prun"),
            r"steps\.0: step: found 'prun'.*did you mean 'prune'",
        ),
        (changed("steps", 0, {}), r"steps\.0: step: found none, expected one of"),
        (
            changed("steps", 0, "criterion", "importnace"),
            r"steps\.0\.criterion: found 'importnace'.*did you mean 'importance'",
        ),
        (
            changed("steps", 0, "heads", 1.0),
            r"steps\.0\.heads: Input should be less than 1, found 1",
        ),
        (
            changed("steps", 0, {"step": "prune"}),
            r"steps\.0: expected a share of `heads`, `neurons`, `layers` or `sublayers` above 0",
        ),
        (
            changed("steps", 1, "teacher", "orginal"),
            r"steps\.1\.teacher: found 'orginal'.*did you mean 'original'",
        ),
        (
            changed("steps", 3, "format", "onxx"),
            r"steps\.3\.format: found 'onxx'.*did you mean 'onnx'",
        ),
        (changed("steps", []), "steps: "),
        (changed("baseline", "finetune-2"), "baseline: found 'finetune-2', expected one of"),
        (
            changed("budget", {"max_perplexity_ratio": 1.1}),
            "budget.max_perplexity_ratio: text-classification has no",
        ),
        (changed("task", "splits", "train", ...), r"steps\.1: finetune needs examples to train on"),
        (
            changed("task", "splits", "calibration", ...),
            r"steps\.0: prune needs examples to score on",
        ),
        (
            changed("target", {"runtime": "torch"}),
            r"steps\.2: quantize gives ONNX, expected target\.runtime",
        ),
        (changed("target", {"device": "tpu"}), r"target\.device: .*found 'tpu'"),
        (
            changed("steps", [{"step": "quantize"}, {"step": "prune", "heads": 0.1}]),
            r"steps\.1: prune needs a torch model, found ONNX after quantize",
        ),
        (
            changed("steps", [{"step": "quantize"}, {"step": "quantize"}]),
            r"steps\.1: the model is quantized already by quantize",
        ),
        (changed("budget", {}), "budget: found no limit, expected at least one"),
        (
            changed("budget", "max_p95_ms", 9.0),
            r"budget\.max_p95_ms: holds on a target that nothing else runs on, expected",
        ),
        (
            changed("budget", {"max_p99_ms": 9.0}),
            r"budget\.max_p99_ms: found target\.rounds: 30, expected 184 at least",
        ),
        (
            changed("budget", {"max_p95_ms": 9.0}),
            r"budget\.max_p95_ms: found target\.rounds: 30, expected 36 at least",
        ),
        (
            changed("budget", {"min_speedup": 1.1, "confidence": 0.99}),
            r"budget: confidence: found 0\.99, expected at most 0\.975 with min_speedup",
        ),
        (changed("budget", "regression", {"report": "x"}), r"budget\.regression: found no limit"),
        (
            changed("budget", "slices", {"column": "genre", "max_perplexity_ratio": 1.1}),
            r"budget\.slices\.max_perplexity_ratio: text-classification has no",
        ),
        (changed("budget", "slices", {"column": "genre"}), r"budget\.slices: found no limit"),
        (
            changed("budget", "slices", {"colum": "genre", "max_drop": 0.1}),
            r"budget\.slices\.colum: unknown key; did you mean 'column'",
        ),
        (
            changed("budget", "regression", {"report": "x", "max_perplexity_ratio": 1.1}),
            r"budget\.regression\.max_perplexity_ratio: text-classification has no",
        ),
        ("", "found an empty file, expected a mapping"),
        ("- 1", "found list, expected a mapping"),
        ("model: {", "not YAML"),
        ("a: !!python/object/apply:os.system [true]", "not YAML"),
    ],
)
def test_a_mistake_is_said_with_its_place(tmp_path, recipe, message):
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, recipe)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("max_relative_drop", "perplexity grows"),
        ("max_flips", "perplexity does not call an example right or wrong"),
        ("max_kl", "causal-lm has no class probabilities"),
    ],
)
def test_a_limit_that_the_metric_cannot_have_is_told(tmp_path, limit, message):
    recipe = GOOD | {"task": GOOD["task"] | {"kind": "causal-lm"}, "budget": {limit: 0.1}}
    with pytest.raises(RecipeError, match=rf"budget\.{limit}: {message}"):
        read(tmp_path, recipe)


def test_numbers_do_not_agree_or_disagree(tmp_path):
    recipe = GOOD | {"task": GOOD["task"] | {"kind": "text-regression"}}
    with pytest.raises(RecipeError, match=r"budget.min_agreement: text-regression decides nothing"):
        read(tmp_path, recipe | {"budget": {"min_agreement": 0.9}})


def test_perplexity_has_no_drop(tmp_path):
    task = GOOD["task"] | {"kind": "causal-lm"}
    with pytest.raises(RecipeError, match=r"budget\.max_drop: perplexity grows"):
        read(tmp_path, GOOD | {"task": task})
    with pytest.raises(
        RecipeError, match=r"steps\.0\.max_perplexity_ratio: text-classification has"
    ):
        read(tmp_path, changed("steps", 0, "max_perplexity_ratio", 1.1))


def test_all_mistakes_are_said_at_once(tmp_path):
    recipe = changed("steps", 0, "heads", -1) | {"budgett": {}, "seed": -3}
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, recipe)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("recipe.yaml: 3 mistakes")
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        "steps.0.heads",
        "seed",
        "budgett",
    }


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such file"):
        Recipe.from_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_yaml(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_recipe_with_anything_in_it_is_read_or_refused(data, tmp_path_factory):
    recipe = deepcopy(GOOD)
    place = recipe
    while True:
        key = data.draw(
            st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place))))
        )
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(values)
            break
        place = place[key]
    path = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with suppress(RecipeError):
        assert isinstance(Recipe.from_yaml(path), Recipe)


ENGINE = {"step": "export", "format": "tensorrt"}
ON_GPU = {"device": "cuda", "runtime": "tensorrt"}


def quantized(method, **options):
    return [{"step": "quantize", "method": method, **options}, ENGINE]


TO_ENGINE = GOOD | {"steps": quantized("fp16")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target": ON_GPU},
        {
            "steps": [
                {"step": "prune", "heads": 0.1},
                ENGINE | {"compute_capabilities": [8.6, 12.0]},
            ]
        },
        {"steps": quantized("int8-static", portable=True, embeddings=True)},
        {"steps": quantized("int8-weights", portable=True)},
        {"steps": quantized("int4-weights", portable=True, symmetric=True)},
        {"steps": quantized("bf16"), "target": ON_GPU},
        {"steps": quantized("bf16"), "target": {"device": "cuda"}},
        {
            "steps": [
                ENGINE | {"version_compatible": True, "timing_cache": "c", "workspace_bytes": 1}
            ]
        },
    ],
)
def test_orders_that_an_engine_can_follow_are_taken(changes):
    recipe = Recipe.model_validate(TO_ENGINE | changes)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"steps": quantized("int8-dynamic")},
            r"steps\.1: TensorRT cannot read steps\.0: found int8-dynamic, .*expected fp16 or bf16",
        ),
        (
            {"steps": quantized("int8-static")},
            r"steps\.1: TensorRT cannot read steps\.0: found int8-static as .*`portable: true`",
        ),
        ({"steps": quantized("int4-weights")}, "found int4-weights as ONNX Runtime alone reads it"),
        (
            {"steps": quantized("int4-weights", portable=True, symmetric=False)},
            "found int4-weights with zero points, expected no `symmetric: false`",
        ),
        (
            {"steps": [{"step": "export"}, ENGINE]},
            r"steps\.1: an engine starts from a graph of standard operators, found .*leave that",
        ),
        (
            {"steps": [ENGINE, {"step": "quantize"}]},
            r"steps\.0: nothing starts from an engine, found quantize after it; move it before",
        ),
        (
            {"steps": [{"step": "export", "compute_capabilities": [8.6], "workspace_bytes": 9}]},
            r"found \['workspace_bytes', 'compute_capabilities'\] with format onnx, expected",
        ),
        (
            {"steps": [ENGINE | {"compute_capabilities": [8.6], "version_compatible": True}]},
            "found `compute_capabilities`, of TensorRT for RTX, and `version_compatible`",
        ),
        ({"steps": quantized("bf16")}, r"steps\.0: ONNX Runtime has no bf16 products on the CPU"),
        (
            {
                "steps": quantized("int8-dynamic", max_perplexity_ratio=1.1),
                "task": GOOD["task"] | {"kind": "seq2seq-lm"},
                "budget": {"max_perplexity_ratio": 1.1},
            },
            r"steps\.0: its limit chooses among the layers of one graph, found seq2seq-lm",
        ),
        (
            {"steps": quantized("bf16", max_drop=0.1), "target": ON_GPU},
            r"steps\.0: its limit is measured on the CPU, expected none with bf16",
        ),
        (
            {"target": {"runtime": "tensorrt"}},
            r"target\.device: found cpu, expected cuda, where engines run; with runtime: onnxrunt",
        ),
        (
            {"target": ON_GPU, "steps": [{"step": "prune", "heads": 0.1}]},
            r"target\.runtime: found tensorrt, expected `export` with format: tensorrt as last",
        ),
        (
            {"target": ON_GPU, "steps": [{"step": "prune", "goal": {"speedup": 2}}, ENGINE]},
            r"steps\.0\.goal: found a goal of time, which would need an engine",
        ),
        (
            {
                "task": GOOD["task"] | {"kind": "causal-lm"},
                "budget": {"max_perplexity_ratio": 1.1},
            },
            r"steps\.1: causal-lm gives a graph with a key-value cache, .*expected format: onnx",
        ),
    ],
)
def test_orders_that_an_engine_cannot_follow_are_refused(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, TO_ENGINE | changes)
