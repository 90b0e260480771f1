"""A recipe with open values stands for the recipes that it says it does."""

import itertools

import pytest
import yaml
from test_recipe import GOOD

from pipeline import space
from pipeline.reading import RecipeError
from pipeline.recipe import Recipe
from pipeline.space import Choice, Range

OPEN_STEPS = [
    {"step": "prune", "heads": {"choose": [0.1, 0.2]}, "neurons": {"from": 0, "to": 0.5}},
    {"choose": [None, {"step": "finetune", "epochs": {"choose": [1, 2, 3]}}]},
    {"step": "quantize", "method": {"choose": ["int8-dynamic", "int8-static"]}},
    {"step": "export"},
]


def read(tmp_path, steps, **others):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"steps": steps} | others))
    return space.read(path)


def test_open_values_are_found_within_others(tmp_path):
    found, search = read(tmp_path, OPEN_STEPS, search={"trials": 3})
    assert search == {"trials": 3}
    assert found.open == {
        "steps.0.heads": Choice((0.1, 0.2)),
        "steps.0.neurons": Range(0, 0.5),
        "steps.1": Choice((None, {"step": "finetune", "epochs": {"choose": [1, 2, 3]}})),
        "steps.1.1.epochs": Choice((1, 2, 3)),
        "steps.2.method": Choice(("int8-dynamic", "int8-static")),
    }


def test_a_step_chosen_as_null_is_left_out(tmp_path):
    found, _ = read(tmp_path, OPEN_STEPS)
    without = found.recipe(lambda *_: 0)
    assert without.stage_names == ("prune", "quantize", "export")
    assert (without.steps[0].heads, without.steps[0].neurons) == (0.1, 0)
    other = found.recipe(lambda _, free: 1 if isinstance(free, Choice) else 0.25)
    assert other.stage_names == ("prune", "finetune", "quantize", "export")
    assert (other.steps[0].neurons, other.steps[1].epochs) == (0.25, 2)
    assert other.steps[2].method == "int8-static"


def test_a_grid_lists_every_recipe_once(tmp_path):
    steps = [dict(OPEN_STEPS[0], neurons={"from": 0.1, "to": 0.3, "step": 0.1}), *OPEN_STEPS[1:]]
    found, _ = read(tmp_path, steps)
    recipes = [found.recipe(lambda place, _, p=picked: p[place]) for picked in found]
    told = [
        (
            r.steps[0].heads,
            r.steps[0].neurons,
            r.steps[-2].method,
            getattr(r.steps[1], "epochs", None),
        )
        for r in recipes
    ]
    expected = itertools.product(
        (0.1, 0.2), (0.1, 0.2, 0.3), ("int8-dynamic", "int8-static"), (None, 1, 2, 3)
    )
    assert sorted(told, key=str) == sorted(expected, key=str)


def test_numbers_of_a_grid_have_no_digits_of_rounding():
    assert Range(0.1, 0.7, 0.1).grid() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert Range(1, 7, 2).grid() == [1, 3, 5, 7]
    assert Range(1, 7).value(3.7) == 3


def test_a_grid_needs_steps_and_an_end(tmp_path):
    found, _ = read(tmp_path, OPEN_STEPS)
    with pytest.raises(RecipeError, match=r"steps.0.neurons: found a range without `step`"):
        list(found)
    wide = [{"step": "prune", "heads": {"from": 0, "to": 0.9, "step": 0.00001}}, {"step": "export"}]
    found, _ = read(tmp_path, wide)
    with pytest.raises(RecipeError, match="found more than 10000 recipes, expected fewer"):
        list(found)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"choose": []}, r"steps.0.heads.choose: found \[\], expected a list of values"),
        ({"choose": [0.1], "from": 1}, r"found \['from'\] beside `choose`, expected it alone"),
        ({"from": 0.1}, r"steps.0.heads: found \['from'\], expected from and to"),
        ({"from": 0.1, "to": 0.2, "by": 1}, r"found \['by', 'from', 'to'\], expected from and to"),
        ({"from": 0.1, "to": "much"}, "steps.0.heads.to: found 'much', expected a number"),
        ({"from": 0.2, "to": 0.1}, "found from: 0.2 and to: 0.1, expected a smaller `from`"),
        ({"from": 0.1, "to": 0.2, "step": 1}, "heads.step: found 1, expected above 0 and at most"),
        ({"from": 0, "to": 0.2, "log": True}, "found log with a step or a number that is not"),
        ({"from": 0.1, "to": 0.2, "log": 3}, "heads.log: found 3, expected true or false"),
    ],
)
def test_an_open_value_that_is_none_is_refused(tmp_path, value, message):
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, [{"step": "prune", "heads": value}, {"step": "export"}])


def test_what_cannot_be_searched_for_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="search: found 3, expected a mapping"):
        read(tmp_path, OPEN_STEPS, search=3)


def test_every_choice_has_to_work_somewhere(tmp_path):
    read(tmp_path, OPEN_STEPS)[0].check()
    wrong = [*OPEN_STEPS[:2], {"step": "quantize", "method": {"choose": ["int8-dynamic", "int9"]}}]
    with pytest.raises(RecipeError, match=r"with int9 for steps.2.method: 1 mistake"):
        read(tmp_path, wrong)[0].check()
    inner = [OPEN_STEPS[0], {"choose": [None, {"step": "finetune", "epochs": {"choose": [1, -1]}}]}]
    with pytest.raises(
        RecipeError,
        match=r"with -1 for steps.1.1.epochs: 1 mistake\n.* Input should be greater than 0",
    ):
        read(tmp_path, inner)[0].check()


def test_a_choice_that_needs_another_works(tmp_path):
    """`algorithm: hqq` is of int4-weights alone."""
    steps = [
        {
            "step": "quantize",
            "method": {"choose": ["int8-dynamic", "int4-weights"]},
            "algorithm": {"choose": ["rtn", "hqq"]},
        }
    ]
    read(tmp_path, steps)[0].check()


def test_other_commands_say_what_an_open_value_is_for(tmp_path):
    read(tmp_path, OPEN_STEPS)
    with pytest.raises(RecipeError, match=r"values that are left open .*; use `secateur search`"):
        Recipe.from_yaml(tmp_path / "recipe.yaml")
