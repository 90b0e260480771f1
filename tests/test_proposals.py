"""What is proposed depends on what was told alone, and comes to the best within the budget."""

import pytest
from test_space import OPEN_STEPS, read

from pipeline.proposals import Proposals


def told(space, count, seed=0):
    """Return proposals in a world where merit is the share of neurons cut, up to a half."""
    proposals, found = Proposals(space, count, seed), []
    for _ in range(count):
        picked = proposals.ask()
        found.append(picked)
        share = picked["steps.0.neurons"]
        if picked["steps.2.method"]:  # one of the methods fails always
            proposals.tell(None)
        else:
            proposals.tell(share, beyond=(share - 0.3) / 0.3)
    return found


def test_all_is_listed_where_there_is_little(tmp_path):
    steps = [{"step": "prune", "heads": {"choose": [0.1, 0.2]}}, {"step": "export"}]
    proposals = Proposals(read(tmp_path, steps)[0], 2, 0)
    assert [proposals.ask() for _ in range(3)] == [
        {"steps.0.heads": 0},
        {"steps.0.heads": 1},
        None,
    ]
    proposals.tell(1.0)


def test_the_same_told_gives_the_same_proposals(tmp_path):
    space, _ = read(tmp_path, OPEN_STEPS)
    first = told(space, 12)
    assert told(space, 12) == first
    assert told(space, 12, seed=1) != first


def test_values_that_a_choice_has_not_are_not_proposed(tmp_path):
    space, _ = read(tmp_path, OPEN_STEPS)
    for picked in told(space, 20):
        assert ("steps.1.1.epochs" in picked) == (picked["steps.1"] == 1)
        assert 0 <= picked["steps.0.neurons"] <= 0.5
        space.recipe(lambda place, _, p=picked: p[place])


def test_it_comes_near_to_the_best_within_the_budget(tmp_path):
    found = told(read(tmp_path, OPEN_STEPS)[0], 60)
    shares = [picked["steps.0.neurons"] for picked in found if not picked["steps.2.method"]]
    assert max(share for share in shares if share <= 0.3) == pytest.approx(0.3, abs=0.03)
    late = shares[-10:]
    assert sum(abs(share - 0.3) < 0.1 for share in late) >= 6  # by chance 4 of 10


def test_what_fails_is_proposed_less(tmp_path):
    found = told(read(tmp_path, OPEN_STEPS)[0], 60)
    failed = [picked["steps.2.method"] for picked in found]
    assert sum(failed[-20:]) <= 8  # by chance 10


def test_whole_numbers_and_steps(tmp_path):
    steps = [
        {"step": "finetune", "batch_size": {"from": 8, "to": 64, "step": 8},
         "epochs": {"from": 1, "to": 9}, "learning_rate": {"from": 1e-5, "to": 1e-3, "log": True}},
        {"step": "export"},
    ]  # fmt: skip
    space, _ = read(tmp_path, steps)
    proposals = Proposals(space, 10, 0)
    for _ in range(10):
        picked = proposals.ask()
        recipe = space.recipe(lambda place, _, p=picked: p[place])
        assert recipe.steps[0].batch_size % 8 == 0
        assert recipe.steps[0].epochs == int(recipe.steps[0].epochs)
        assert 1e-5 <= recipe.steps[0].learning_rate <= 1e-3
        proposals.tell(1.0)
