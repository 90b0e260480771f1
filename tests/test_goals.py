"""A goal is reached, as counted by hand, with widths of their own and nothing left half done."""

import json

import onnx
import pytest
import torch
import yaml
from conftest import write_model, write_recipe
from tiny_models import inputs, tiny

from benchmarks.accuracy import silent
from exporters.onnx import MODEL
from pipeline import (
    costs,
    counting,
    from_pretrained,
    goals,
    levels,
    measuring,
    prices,
    structure,
    units,
)
from pipeline.checkpoint import ModelError
from pipeline.distillation import divergence
from pipeline.recipe import Recipe, RecipeError
from pipeline.runner import run
from pipeline.settings import Quantize
from pipeline.work import Work


def reach(
    model,
    share,
    *,
    kinds=("heads", "neurons"),
    searched=4,
    repair="least-squares",
    price=prices.parameters,
    criterion="magnitude",
    layers=False,
):
    def data():
        return iter([inputs(model, length) | labels(model, length) for length in range(8, 14)])

    return goals.reach(
        model, kinds, lambda dense: dense * share, price, criterion=criterion,
        repair=repair, searched=searched, layers=layers, data=data, held_out=list(data()), total=6,
    )  # fmt: skip


def labels(model, length):
    if "Classification" in type(model).__name__:
        return {"labels": torch.zeros(2, dtype=torch.long)}
    given = inputs(model, length)
    return {"labels": given.get("decoder_input_ids", given["input_ids"])}


@pytest.mark.parametrize("family", ["albert", "bert", "gpt2", "llama", "t5", "vit"])
def test_the_parameters_left_are_those_predicted(family):
    model = tiny(family)
    before = model.num_parameters()
    reached = reach(model, 0.75)
    assert reached.dense_cost == before
    assert model.num_parameters() == reached.predicted_cost
    assert model.num_parameters() <= 0.77 * before
    with torch.no_grad():
        assert torch.isfinite(model(**inputs(model)).logits).all()


@pytest.mark.parametrize("repair", ["none", "bias", "least-squares"])
def test_all_units_may_go(repair):
    model = tiny("bert")
    with pytest.raises(costs.OutOfReach) as refused:
        reach(tiny("bert"), 0.01)
    least = float(str(refused.value).split("found a cost of ")[1].split()[0])
    reached = reach(model, 1.001 * least / model.num_parameters(), repair=repair)
    assert reached.predicted_cost == pytest.approx(least, rel=1e-3)
    assert not any([*units(model).heads.values(), *units(model).neurons.values()])
    with torch.no_grad():
        assert torch.isfinite(model(**inputs(model)).logits).all()


def test_costs_that_do_not_add_up_are_put_right():
    def price(models):
        return {name: make().num_parameters() ** 0.5 for name, make in models.items()}

    model = tiny("bert")
    reached = reach(model, 0.9, price=price, searched=0)
    assert reached.predicted_cost == pytest.approx(model.num_parameters() ** 0.5, rel=0.02)
    assert reached.predicted_cost <= 0.9 * reached.dense_cost


def test_units_without_which_no_loss_changes_go_first():
    model = tiny("bert")
    silent = [g for g in structure.groups(model) if g.layer == 1]
    with torch.no_grad():
        for group in silent:
            group.reader.weight *= 1e-3  # all of it lost is still all of it, relatively
    share = 1 - 0.9 * sum(structure.by_unit(g).numel() for g in silent) / model.num_parameters()
    reached = reach(model, share, searched=0)
    assert set(reached.choice.removed) <= {group.path for group in silent}


def test_levels_are_weighed_in_parts_as_at_once(monkeypatch):
    whole = reach(tiny("bert"), 0.8, searched=0)
    monkeypatch.setattr(levels, "CHANGED_BYTES", 1)
    parts = reach(tiny("bert"), 0.8, searched=0)
    assert whole.choice.removed == parts.choice.removed


def test_data_without_labels_weigh_nothing():
    model = tiny("bert")
    data = [inputs(model, length) for length in range(8, 14)]
    with pytest.raises(ValueError, match="found no labels, expected labelled data"):
        goals.reach(
            model, ("heads",), lambda dense: dense, prices.parameters, criterion="magnitude",
            repair="none", data=lambda: iter(data), held_out=data, total=6,
        )  # fmt: skip


def test_what_was_cut_by_exchanges_too_is_what_is_told():
    model = tiny("bert")
    reached = reach(model, 0.8, criterion="fisher-full")
    assert model.num_parameters() == pytest.approx(reached.predicted_cost, rel=1e-6)


def test_a_layer_that_does_nothing_goes_as_a_whole():
    model, dense = tiny("llama"), tiny("llama")
    for of in (model, dense):
        with torch.no_grad():
            for group in structure.groups(of):
                if group.layer == 1:
                    group.reader.weight.zero_()
    layer = sum(p.numel() for p in model.model.layers[1].parameters())
    reached = reach(model, 1 - 0.999 * layer / model.num_parameters(), layers=True)
    assert reached.layers == ("layers.1",)
    assert not reached.choice.removed
    assert len(model.model.layers) == 2
    assert model.num_parameters() == reached.predicted_cost
    batches = [inputs(model, length) | labels(model, length) for length in range(8, 14)]
    assert divergence(model, dense, batches) < 1e-6


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_layers_heads_and_neurons_go_together(family):
    model, dense = tiny(family), tiny(family)
    reached = reach(model, 0.8, layers=True)
    assert model.num_parameters() == reached.predicted_cost <= 0.82 * dense.num_parameters()
    batches = [inputs(model, length) | labels(model, length) for length in range(8, 14)]
    assert divergence(model, dense, batches) == pytest.approx(min(reached.divergence), rel=1e-3)


def test_the_search_does_not_make_it_worse():
    first = reach(tiny("bert"), 0.7, searched=0)
    searched = reach(tiny("bert"), 0.7, searched=30)
    assert searched.divergence[0] == pytest.approx(first.divergence[0], rel=1e-4)
    assert searched.divergence[1] < searched.divergence[0]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_divergence_that_is_told_is_that_of_the_cut_model(family):
    model, dense = tiny(family), tiny(family)
    reached = reach(model, 0.8, searched=5)
    batches = [inputs(model, length) | labels(model, length) for length in range(8, 14)]
    assert divergence(model, dense, batches) == pytest.approx(reached.divergence[1], rel=1e-3)


def test_what_is_tried_leaves_no_trace():
    model = tiny("bert")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reached = reach(model, 0.95, kinds=("neurons",), repair="none")
    assert reached.choice.removed
    now, cut = model.state_dict(), {path.removesuffix(".") for path in reached.choice.removed}
    same = [name for name in dense if not any(name.startswith(path) for path in cut)]
    whole = [name for name in same if "output.dense" in name and "attention" not in name]
    assert whole, "an FFN is left whole"
    assert all(torch.equal(dense[name], now[name]) for name in same)


def test_a_model_in_bf16_can_be_cut_to_a_goal():
    model = tiny("bert").bfloat16()
    reach(model, 0.8)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_goal_that_is_too_far_says_how_far_one_can_go():
    with pytest.raises(
        costs.OutOfReach, match=r"with no units left, which is 0\.\d+ of the whole, expected at"
    ):
        reach(tiny("bert"), 0.01)


def recipe(folder, steps=(), **goal):
    path = write_recipe(folder)
    content = yaml.safe_load(path.read_text())
    content["baseline"] = "original"
    content["budget"] = {"max_drop": 0.99, "baseline_floor": -1.0}
    content["steps"] = [{"step": "prune", "goal": {"search": 3} | goal}, *steps]
    path.write_text(yaml.safe_dump(content))
    return path


def last(path, folder):
    return json.loads(run(path, folder).to_json())["stages"][-1]


def test_multiply_adds_of_a_recipe(tmp_path):
    stage = last(recipe(tmp_path, multiply_adds=0.7), tmp_path / "out")
    details = stage["details"]
    counted = counting.total(from_pretrained(stage["folder"]), 16)
    assert counted == pytest.approx(details["predicted_cost"], rel=0.03)
    assert counted <= 0.73 * details["dense_cost"]
    assert details["divergence_first_and_searched"][1] > 0


@pytest.mark.parametrize("runtime", ["torch", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_a_speedup_is_predicted_from_measured_times(tmp_path, runtime, monkeypatch):
    monkeypatch.setattr(costs, "PRICED", (0.5, 0.0))  # every model that is timed is a process
    path = recipe(tmp_path, speedup=1.3, units=["neurons"])
    # Nearly all of its time goes into FFN, so that no noise hides what a narrower one saves.
    write_model(tmp_path / "model", pad_token_id=0, intermediate_size=1024)
    content = yaml.safe_load(path.read_text())
    content["target"] |= {"runtime": runtime, "loads": [{"batch": 32, "sequence": 16}]}
    path.write_text(yaml.safe_dump(content))
    stage = last(path, tmp_path / "out")
    assert stage["details"]["predicted_cost"] * 1.1 <= stage["details"]["dense_cost"]
    assert sum(stage["neurons"]) < 0.99 * 3 * 1024
    ratio = stage["details"]["dense_cost"] / stage["details"]["predicted_cost"]
    assert stage["gain_note"].endswith(f" (predicted: {ratio:.2f}x faster)")


@pytest.mark.parametrize(
    ("method", "operator"),
    [
        ("int8-dynamic", "MatMulInteger"),
        ("int4-weights", "MatMulNBits"),
        ("fp16", "LayerNormalization"),  # fused, it would be another one
    ],
)
def test_models_are_timed_as_a_step_quantizes_them(tmp_path, monkeypatch, method, operator):
    step = {"step": "quantize", "method": method}
    path = recipe(tmp_path, steps=[step], speedup=1.3, quantized=True)
    work = Work(Recipe.from_yaml(path), tmp_path / "out", fresh=False, track=silent)
    models = dict.fromkeys(("dense", "other"), lambda: from_pretrained(tmp_path / "model"))
    opened = []
    open_worker = measuring.open_worker

    def opening(target, folder):
        opened.append({node.op_type for node in onnx.load(folder / MODEL).graph.node})
        return open_worker(target, folder)

    monkeypatch.setattr(measuring, "open_worker", opening)
    found = prices.latency_ms(models, work=work, load=0, first="0", quantize=Quantize(**step))
    assert all(value > 0 for value in found.values())
    assert len(opened) == len(models)
    assert all(operator in operators for operators in opened)


def test_a_goal_is_priced_as_the_recipe_quantizes(tmp_path, monkeypatch):
    steps = [{"step": "quantize", "method": "int8-weights", "block_size": 16}]
    path = recipe(tmp_path, steps=steps, speedup=1.2, quantized=True)
    asked = []

    def latency_ms(models, *, quantize, **_):
        asked.append(quantize)
        return prices.parameters(models)

    monkeypatch.setattr(prices, "latency_ms", latency_ms)
    stages = run(path, tmp_path / "out").stages
    assert {each.method for each in asked} == {"int8-weights"}
    assert {each.block_size for each in asked} == {16}
    assert "(predicted, of both models quantized: 1." in stages[1].gain_note
    # In other bits they cost something else, and nothing is taken from what was priced before.
    before = len(asked)
    content = yaml.safe_load(path.read_text())
    content["steps"][1]["block_size"] = 32
    path.write_text(yaml.safe_dump(content))
    run(path, tmp_path / "out")
    assert {each.block_size for each in asked[before:]} == {32}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "found no quantize step, expected one"),
        (
            [{"step": "quantize", "method": "int8-static"}],
            "found a quantize step that takes calibr",
        ),
        ([{"step": "quantize", "method": "bnb-nf4"}], "found a quantize step that gives a torch"),
    ],
)
def test_a_goal_that_cannot_be_priced_quantized_is_refused(tmp_path, steps, message):
    with pytest.raises(RecipeError, match=rf"steps\.0\.goal\.quantized: {message}"):
        Recipe.from_yaml(recipe(tmp_path, steps=steps, speedup=2, quantized=True))


def test_layers_of_a_recipe_go_beside_heads_and_neurons(tmp_path):
    path = recipe(tmp_path, multiply_adds=0.6, units=["heads", "neurons", "layers"])
    stage = last(path, tmp_path / "out")
    assert (
        counting.total(from_pretrained(stage["folder"]), 16) == stage["details"]["predicted_cost"]
    )
    assert stage["details"]["dropped_layers"] is not None


def test_a_goal_of_layers_that_have_to_stay_is_refused(tmp_path):
    path = recipe(tmp_path, parameters=0.9, units=["heads", "neurons", "layers"])
    write_model(tmp_path / "model", family="albert", pad_token_id=0)
    with pytest.raises(ModelError, match="leave `layers` out"):
        run(path, tmp_path / "out")


def test_a_recipe_with_a_goal_out_of_reach_is_refused(tmp_path):
    with pytest.raises(ModelError, match="goal: found a cost of"):
        run(recipe(tmp_path, parameters=0.01), tmp_path / "out")


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"speedup": 2, "parameters": 0.5}, "found .'speedup', 'parameters'., expected one of"),
        ({}, "found none, expected one of"),
        ({"speedup": 2, "units": ["layers"]}, "units: found layers alone, expected heads or"),
        ({"parameters": 0.5, "quantized": True}, "found .quantized. with parameters, expected"),
        ({"speedup": 2, "load": 3}, "goal.load: found 3, expected less than 1"),
    ],
)
def test_goals_that_say_nothing_or_too_much_are_refused(tmp_path, goal, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(recipe(tmp_path, **goal))


@pytest.mark.parametrize(
    ("beside", "found"),
    [
        ({"per_layer": True, "uniform": True}, "per_layer, uniform"),
        ({"rounds": 2}, "rounds"),
        ({"criterion": "movement"}, "movement"),
        ({"max_drop": 0.1}, "a limit"),
    ],
)
def test_what_cannot_stand_beside_a_goal_is_named(tmp_path, beside, found):
    path = recipe(tmp_path, parameters=0.8)
    content = yaml.safe_load(path.read_text())
    content["steps"][0] |= beside
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=f"found {found} beside a goal, expected none of them"):
        Recipe.from_yaml(path)
