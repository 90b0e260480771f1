"""Which candidates are left, which are best, and who meets the gate."""

import pytest
from test_recipe import GOOD

from pipeline import front
from pipeline.front import Candidate
from pipeline.recipe import Recipe
from pipeline.report import Check
from pipeline.trials import Foreseen, Measured, Screened, untrained


def recipe(*steps):
    return Recipe.model_validate(GOOD | {"steps": [*steps, {"step": "export"}]})


CUT, CUT_MORE = {"step": "prune", "heads": 0.1}, {"step": "prune", "heads": 0.5}
TRAIN = {"step": "finetune", "teacher": "original"}


def candidate(number, speed, lost=None, *, steps=(CUT, TRAIN), outcome="pass", distance=None,
              size=0.5, part=None, allowed=0.02):  # fmt: skip
    check = Check("accuracy drop", allowed, lost or 0.0, 0.0, 0.1, outcome)
    speedups = ((speed, speed, speed),)
    return Candidate(
        number,
        {},
        recipe(*steps),
        foreseen=Foreseen(speedups, size, distance, 1.0),
        screened=None if part is None else Screened(part, (check,), 2.0),
        measured=None if lost is None else Measured(0.9, lost, (check,), speedups, size, 3.0),
    )


def test_the_front_has_what_no_other_one_beats():
    found = [candidate(1, 1.0, 0.0), candidate(2, 2.0, 0.01), candidate(3, 1.5, 0.02),
             candidate(4, 3.0, 0.05), candidate(5, 4.0), candidate(6, 2.0, 0.01)]  # fmt: skip
    assert [c.number for c in front.pareto(found, "speed")] == [4, 2, 1]


def test_merit_is_the_geometric_mean_of_the_loads_or_the_size():
    measured = Measured(0.9, 0.0, (), ((2.0, 1.9, 2.1), (8.0, 7.0, 9.0)), 0.25, 1.0)
    found = Candidate(1, {}, recipe(CUT), measured=measured)
    assert found.merit("speed") == pytest.approx(4.0)
    assert found.merit("size") == 4.0
    assert Candidate(2, {}, recipe(CUT)).merit("speed") == 0.0


def test_those_that_pass_come_first_then_the_estimates_within():
    found = [candidate(1, 3.0, 0.019, outcome="inconclusive"), candidate(2, 2.0, 0.01),
             candidate(3, 4.0, 0.03, outcome="inconclusive"), candidate(4, 1.5, 0.0),
             candidate(5, 9.0)]  # fmt: skip
    assert [c.number for c in front.finalists(found, "speed")] == [2, 4, 1]


def test_a_candidate_is_dominated_by_one_that_differs_in_what_is_cut_alone():
    better = candidate(1, 2.0, distance=0.1, steps=(CUT, TRAIN))
    worse = candidate(2, 1.5, distance=0.2, steps=(CUT_MORE, TRAIN))
    other = candidate(3, 1.5, distance=0.2, steps=(CUT_MORE,))
    unknown = candidate(4, 1.5, steps=(CUT_MORE, TRAIN))
    nearer = candidate(5, 1.5, distance=0.05, steps=(CUT_MORE, TRAIN))
    assert front.dominated(worse, [better], "speed") is better
    for left in (other, unknown, nearer):
        assert front.dominated(left, [better], "speed") is None
    assert front.dominated(better, [worse], "speed") is None


def test_a_candidate_is_beaten_by_a_better_one_that_lost_no_more_on_the_part():
    fast = candidate(1, 2.0, 0.01, part=0.01)
    assert front.beaten(candidate(2, 1.5, part=0.01), [fast], "speed") is fast
    assert front.beaten(candidate(3, 1.5, part=0.0), [fast], "speed") is None
    assert front.beaten(candidate(4, 2.5, part=0.05), [fast], "speed") is None
    assert (
        front.beaten(candidate(5, 1.5, part=0.01), [candidate(6, 2.0, part=0.0)], "speed") is None
    )
    beyond = candidate(7, 2.0, 0.03, part=0.0)
    assert front.beaten(candidate(8, 1.5, part=0.01), [beyond], "speed") is None


def test_how_far_beyond_the_budget():
    assert candidate(1, 1.0, 0.03, allowed=0.02).violation == pytest.approx(0.5)
    assert candidate(1, 1.0, 0.01, allowed=0.02).violation == pytest.approx(-0.5)
    least = Check("speedup at 1x8", 2.0, 1.5, 1.4, 1.6, "fail", at_least=True)
    measured = Measured(0.9, 0.0, (least,), ((1.5, 1.4, 1.6),), 0.5, 1.0)
    assert Candidate(1, {}, recipe(CUT), measured=measured).violation == pytest.approx(0.25)
    assert candidate(1, 1.0).violation == 0


def test_what_the_budget_cost_is_the_best_that_was_measured():
    found = [candidate(1, 3.0, 0.05), candidate(2, 2.0, 0.01), candidate(3, 4.0),
             candidate(4, 2.5, 0.0), candidate(5, 1.5, 0.03)]  # fmt: skip
    assert front.beyond(found, found[1], "speed") is found[0]
    assert front.beyond(found, found[0], "speed") is None


def test_a_candidate_is_foreseen_without_what_rests_on_training():
    learned = {"step": "prune", "heads": 0.5, "criterion": "movement", "finetune": {"epochs": 1}}
    rounds = {"step": "prune", "heads": 0.5, "rounds": 3, "finetune": {"epochs": 1}}
    limited = {"step": "quantize", "max_drop": 0.01}
    splits = GOOD["task"]["splits"] | {"train": "train[:70%]", "selection": "train[70%:80%]"}
    task = GOOD["task"] | {"splits": splits}
    steps = [TRAIN, learned, rounds, TRAIN, limited, {"step": "export"}]
    whole = Recipe.model_validate(GOOD | {"steps": steps, "task": task, "baseline": "finetune"})
    lean = untrained(whole)
    assert [step.step for step in lean.steps] == [
        "finetune",
        "prune",
        "prune",
        "quantize",
        "export",
    ]
    assert [step.criterion for step in lean.steps[1:3]] == ["importance", "importance"]
    assert all(step.finetune is None and step.rounds == 1 for step in lean.steps[1:3])
    assert lean.steps[3].allowed is None
    assert [step.heads for step in lean.steps[1:3]] == [0.5, 0.5]
    free = {"train": "train[:70%]", "gate": "train[80%:]"}
    steps = [learned | {"repair": "none"}, {"step": "export"}]
    without = Recipe.model_validate(GOOD | {"steps": steps, "task": task | {"splits": free}})
    assert untrained(without).steps[0].criterion == "magnitude"
    assert not untrained(without).steps[0].calibrated
