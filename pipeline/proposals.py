"""What a search tries next: all there is if that is little, else what Optuna's TPE proposes.

The tree-structured Parzen estimator (Bergstra et al. 2011, NeurIPS 24) with constraints (Watanabe
and Hutter 2023, IJCAI, https://www.ijcai.org/proceedings/2023/486): candidates that are beyond the
budget are ranked by how far. It is seeded, and proposes the same again if it is told the same.
"""

import warnings
from itertools import islice
from typing import Any, Final

import optuna

from pipeline.reading import RecipeError
from pipeline.space import Choice, Open, Space

RANDOM: Final = 0.25
"""The share of the trials that are drawn at random, before there is something to learn from."""
FAILED: Final = 10.0
"""What is no recipe, or cannot be made, counts as so many times the budget beyond it: failures that
TPE is not told of it proposes again and again."""


class Proposals:
    """Asked for what to pick, and told what came of it, in turns."""

    def __init__(self, space: Space, trials: int, seed: int) -> None:
        self._space = space
        self._listed = _listed(space, trials)
        self._trial: optuna.Trial | None = None
        if self._listed is None:
            self._study = _study(trials, seed)

    @property
    def nothing_left(self) -> bool:
        """Whether all there is was proposed."""
        return self._listed == []

    def ask(self) -> dict[str, float] | None:
        """Return what to pick by the places of the open values; None if nothing is left."""
        if self._listed is not None:
            return self._listed.pop(0) if self._listed else None
        trial = self._trial = self._study.ask()
        picked: dict[str, float] = {}

        def pick(place: str, free: Open) -> float:
            picked[place] = _suggest(trial, place, free)
            return picked[place]

        self._space.settle(pick)
        return picked

    def tell(self, merit: float | None, beyond: float = 0.0) -> None:
        """Say how good the last one is, and by what share beyond the budget; None: it failed."""
        if self._trial is not None:
            self._trial.set_constraint("beyond", FAILED if merit is None else max(beyond, 0.0))
            self._study.tell(self._trial, merit or 0.0)


def _study(trials: int, seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        # Groups of values that depend on a choice, as of Optuna 5.0.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=max(4, round(RANDOM * trials)),
            multivariate=True,
            group=True,
            seed=seed,
        )
    return optuna.create_study(direction="maximize", sampler=sampler)


def _suggest(trial: optuna.Trial, place: str, free: Open) -> float:
    if isinstance(free, Choice):
        return trial.suggest_categorical(place, list(range(len(free.values))))
    options: dict[str, Any] = {"log": free.log}
    if free.step is not None:
        options["step"] = free.step
    if free.whole:
        return trial.suggest_int(place, int(free.low), int(free.high), **options)
    return trial.suggest_float(place, free.low, free.high, **options)


def _listed(space: Space, most: int) -> list[dict[str, float]] | None:
    """Return all that can be picked, if that is no more than `most`."""
    try:
        found = list(islice(space, most + 1))
    except RecipeError:  # a range without a step
        return None
    return found if len(found) <= most else None
