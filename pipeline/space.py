"""Recipes with values left open: what they are, and the recipes that they stand for.

In place of any value below `steps`, and of a whole step, a recipe may say `choose: [a, b, ...]`, in
place of a number `from: a, to: b`, with `step: c` if it is to be one of a grid, with `log: true` if
its ratios count; whole numbers at both ends stand for whole numbers. A step that is chosen as null
is left out. What is chosen may have open values itself.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from pipeline.reading import RecipeError, read_yaml
from pipeline.recipe import Recipe

MOST: Final = 10_000
"""Recipes that a grid may stand for."""
_KEYS: Final = frozenset({"from", "to", "step", "log"})


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    def grid(self) -> list[int]:
        """Return what can be picked: the place of a value."""
        return list(range(len(self.values)))

    def value(self, picked: float) -> Any:
        """Return the value that was picked."""
        return self.values[int(picked)]

    def words(self, picked: float) -> str:
        """Return what was picked, for people."""
        value = self.value(picked)
        steps = [v["step"] if _is_step(v) else None for v in self.values]
        if _is_step(value):
            name = value["step"]
            return name if steps.count(name) == 1 else f"{name} {int(picked)}"
        if value is None and any(steps):
            return f"no {' or '.join(dict.fromkeys(filter(None, steps)))}"
        return "none" if value is None else str(value)


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is a whole number."""
        return all(isinstance(x, int) for x in (self.low, self.high, self.step or 1))

    def grid(self) -> list[float]:
        """Return what can be picked, if there is a step."""
        if self.step is None:
            return []
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return [self.value(self.low + at * self.step) for at in range(count)]

    def value(self, picked: float) -> float:
        """Return the number that was picked, without the digits of rounding."""
        return int(picked) if self.whole else float(f"{picked:.6g}")

    def words(self, picked: float) -> str:
        """Return what was picked, for people."""
        return f"{self.value(picked):.3g}"


Open = Choice | Range
Pick = Callable[[str, Open], float]
"""Gives what is picked for the open value there: of a choice a place, of a range a number."""


@dataclass(frozen=True)
class Space:
    """The recipes that a file stands for; `content` has no keys but those of a recipe."""

    path: Path
    content: Mapping[str, Any]

    def settle(self, pick: Pick) -> dict[str, Any]:
        """Return the content with its open values picked."""
        steps = _settled(self.content.get("steps"), "steps", pick)
        return {**self.content, "steps": steps}

    def recipe(self, pick: Pick) -> Recipe:
        """Return the recipe with its open values picked.

        Raises:
            RecipeError: such a recipe cannot work.
        """
        try:
            return Recipe.model_validate(self.settle(pick))
        except ValidationError as error:
            raise RecipeError(Recipe.explain(self.path, error)) from None

    def __iter__(self) -> Iterator[dict[str, float]]:
        """Yield what can be picked for all open values, by their places, in order.

        Raises:
            RecipeError: a range has no step, or there are more than `MOST` recipes.
        """
        pending: list[list[float]] = [[]]
        for count in range(MOST + 1):
            if not pending:
                return
            picked, rest = dict[str, float](), pending.pop()
            self.settle(lambda place, free: self._next(place, free, picked, rest, pending))  # noqa: B023
            if count == MOST:
                raise RecipeError(
                    f"{self.path}: found more than {MOST} recipes, expected fewer; leave choices"
                    " out, or use larger steps"
                )
            yield picked

    def _next(
        self,
        place: str,
        free: Open,
        picked: dict[str, float],
        rest: list[float],
        pending: list[list[float]],
    ) -> float:
        """Pick what comes next at a place, and note what is still to be picked there."""
        if len(picked) < len(rest):
            picked[place] = rest[len(picked)]
            return picked[place]
        values = free.grid()
        if not values:
            raise RecipeError(
                f"{self.path}: {place}: found a range without `step`, expected one, so that its"
                " numbers can be listed"
            )
        before = list(picked.values())
        pending.extend([*before, other] for other in reversed(values[1:]))
        picked[place] = values[0]
        return values[0]

    @property
    def open(self) -> dict[str, Open]:
        """Return all open values by their places, those within choices too."""
        found: dict[str, Open] = {}
        waiting = [("steps", self.content.get("steps"))]
        while waiting:
            place, node = waiting.pop(0)
            free = _open(node, place)
            if isinstance(free, Choice):
                found[place] = free
                waiting.extend((f"{place}.{at}", value) for at, value in enumerate(free.values))
            elif isinstance(free, Range):
                found[place] = free
            else:
                waiting.extend((f"{place}.{key}", value) for key, value in _items(node))
        return found

    def check(self) -> list[Recipe]:
        """Return recipes with every choice and end, and refuse one that cannot be used anywhere.

        Each end and choice is tried with the first of all others, and if that is no recipe, with
        the last.

        Raises:
            RecipeError: with the mistakes of the first such value.
        """
        found = [self._corner(None, 0.0)]
        for place, free in self.open.items():
            values = free.grid() if isinstance(free, Choice) else [free.low, free.high]
            found.extend(self._corner(place, value) for value in values)
        return found

    def _corner(self, place: str | None, value: float) -> Recipe:
        """Return a recipe with a value, or refuse it if none of those that are tried works."""
        mistakes = []
        for last in (False, True):

            def pick(where: str, free: Open, last: bool = last) -> float:  # noqa: FBT001
                if where == place:
                    return value
                if isinstance(free, Choice):
                    if place is not None and place.startswith(f"{where}."):
                        return int(place[len(where) + 1 :].partition(".")[0])
                    return len(free.values) - 1 if last else 0
                return free.high if last else free.low

            try:
                return self.recipe(pick)
            except RecipeError as error:
                mistakes.append(error)
        found = str(mistakes[0])
        if place is not None:  # steps that are left out move the numbers of others
            picked = f"{self.path}: with {self.open[place].words(value)} for {place}: "
            found = found.replace(f"{self.path}: ", picked, 1)
        raise RecipeError(found)


def read(path: str | Path) -> tuple[Space, dict[str, Any]]:
    """Return the space of a file, and what it has under `search`.

    Raises:
        RecipeError: the file is missing, is not YAML, or an open value is not written as one.
    """
    path = Path(path)
    content = read_yaml(path, "the key `model`")
    search = content.pop("search", {})
    if not isinstance(search, dict):
        raise RecipeError(f"{path}: search: found {search!r}, expected a mapping")
    space = Space(path, content)
    if isinstance(content.get("steps"), dict):
        raise RecipeError(f"{path}: steps: found a mapping, expected a list of steps")
    try:
        space.open  # noqa: B018 - reads all of them
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    return space, search


def _is_step(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("step"), str)


def _settled(node: Any, place: str, pick: Pick) -> Any:
    free = _open(node, place)
    if free is not None:
        picked = pick(place, free)
        value = free.value(picked)
        return (
            _settled(value, f"{place}.{int(picked)}", pick) if isinstance(free, Choice) else value
        )
    if isinstance(node, dict):
        return {key: _settled(value, f"{place}.{key}", pick) for key, value in node.items()}
    if isinstance(node, list):
        settled = [_settled(value, f"{place}.{at}", pick) for at, value in enumerate(node)]
        # A step that was chosen as null is left out; one that was written so is a mistake.
        both = zip(node, settled, strict=True)
        return [new for old, new in both if new is not None or old is None]
    return node


def _items(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list) else []


def _open(node: Any, place: str) -> Open | None:
    """Return what a node leaves open, if it does.

    Raises:
        ValueError: it is written wrongly.
    """
    if not isinstance(node, dict):
        return None
    if "choose" in node:
        values = node["choose"]
        if len(node) > 1:
            raise ValueError(f"{place}: found {_other(node, {'choose'})} beside `choose`, expected"
                             " it alone")  # fmt: skip
        if not isinstance(values, list) or not values:
            raise ValueError(f"{place}.choose: found {values!r}, expected a list of values")
        return Choice(tuple(values))
    if not {"from", "to"} & node.keys():
        return None
    if not {"from", "to"} <= node.keys() <= _KEYS:
        raise ValueError(f"{place}: found {sorted(node)}, expected from and to, and perhaps step"
                         " and log")  # fmt: skip
    return _range(node, place)


def _range(node: Mapping[str, Any], place: str) -> Range:
    low, high, step, log = node["from"], node["to"], node.get("step"), node.get("log", False)
    for name, value in {"from": low, "to": high, "step": step or 1}.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"{place}.{name}: found {value!r}, expected a number")
    if not isinstance(log, bool):
        raise ValueError(f"{place}.log: found {log!r}, expected true or false")  # noqa: TRY004
    if not low < high:
        raise ValueError(f"{place}: found from: {low} and to: {high}, expected a smaller `from`")
    if step is not None and not 0 < step <= high - low:
        raise ValueError(f"{place}.step: found {step}, expected above 0 and at most {high - low:g}")
    if log and (step is not None or low <= 0):
        raise ValueError(f"{place}: found log with a step or a number that is not above 0,"
                         " expected neither")  # fmt: skip
    return Range(low, high, step, log)


def _other(node: Mapping[str, Any], known: set[str]) -> Sequence[str]:
    return sorted(map(str, node.keys() - known))
