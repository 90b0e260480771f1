"""What a release must keep to, in a recipe or in a file of its own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from pipeline.mistakes import explain
from pipeline.reading import Positive, RecipeError, Strict, read_yaml

Share = Annotated[float, Field(gt=0, lt=1)]
Ratio = Annotated[float, Field(gt=1)]
Few = Annotated[int, Field(ge=2)]

FEW: Final = 100
"""Examples of a slice, unless more or fewer are asked for."""


class OfScore(Strict):
    """What the score may lose; None is not checked."""

    max_drop: Share | None = None
    """The most the score may fall, absolute, for a metric where higher is better."""
    max_relative_drop: Share | None = None
    """The same as a share of the baseline's score: 0.01 keeps 99 % of it."""
    max_perplexity_ratio: Ratio | None = None
    """The most the perplexity may grow, as a ratio."""


class Limits(OfScore):
    """What two artifacts can be compared by, whoever measured them; None is not checked."""

    max_flips: Share | None = None
    """The share of examples that may turn from right to wrong or back."""
    min_agreement: Share | None = None
    """The share of decisions that have to stay the same."""
    max_kl: Positive | None = None
    """The mean divergence of the class probabilities from the baseline's, in nats a decision."""
    max_size: Positive | None = None
    """The final size as a ratio to the baseline's."""
    max_memory: Positive | None = None
    """The final peak memory as a ratio to the baseline's."""

    @property
    def of_quality(self) -> bool:
        """Whether a limit rests on what the gate's examples came to."""
        return _limited(self, QUALITY)


class Slices(OfScore):
    """Limits that hold in every slice of the gate split: among the examples of one value."""

    column: str = Field(min_length=1)
    """The column of the data that says to which slice an example belongs."""
    values: tuple[str, ...] = ()
    """Slices that have to be there."""
    min_examples: Few | dict[str, Few] = FEW
    """With fewer, a slice is inconclusive: a number for all, or one for each of some values."""

    @model_validator(mode="after")
    def _checks_something(self) -> Self:
        if not _limited(self, OfScore.model_fields):
            raise ValueError("found no limit, expected one, such as max_drop")
        return self

    def least(self, value: str) -> int:
        """Return the number of examples below which a slice is inconclusive."""
        given = self.min_examples
        return given.get(value, FEW) if isinstance(given, dict) else given


class Regression(Limits):
    """Limits against the artifact that was released last."""

    report: str = Field(min_length=1)
    """Its report.json, or the folder of it."""

    @model_validator(mode="after")
    def _checks_something(self) -> Self:
        if not _limited(self, Limits.model_fields):
            raise ValueError("found no limit, expected one, such as max_drop")
        return self


class Budget(Limits):
    """What the result must keep to, against the baseline; what is not given is not checked."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """How sure a check must be before it passes."""
    baseline_floor: float | None = None
    """The score that the baseline must be better than; unless given, that of the most frequent
    label, or 0."""
    min_speedup: Positive | None = None
    """The least ratio of baseline latency to final latency, at every load."""
    max_energy: Positive | None = None
    """The most energy of a call as a ratio to the baseline's, at every load."""
    max_p50_ms: Positive | None = None
    """The final latency at every load, on a target that is dedicated."""
    max_p95_ms: Positive | None = None
    max_p99_ms: Positive | None = None
    max_peak_mb: Positive | None = None
    """The final peak memory in megabytes, on a target that is dedicated."""
    max_mb: Positive | None = None
    """The final size in megabytes, likewise."""
    min_throughput_per_s: Positive | None = None
    """The examples a second at every load by its median latency, likewise."""
    slices: Slices | None = None
    regression: Regression | None = None

    @model_validator(mode="after")
    def _sure_of_times(self) -> Self:
        timed = [name for name in TIMED if getattr(self, name) is not None]
        if timed and self.confidence > TIMED_CONFIDENCE:
            raise ValueError(
                f"confidence: found {self.confidence:g}, expected at most {TIMED_CONFIDENCE} with"
                f" {', '.join(timed)}: times are measured with two-sided intervals at 95 %"
            )
        return self

    @property
    def empty(self) -> bool:
        """Whether there is no limit."""
        return not self.model_dump(exclude_none=True, exclude=set(SETTINGS))

    @property
    def absolute(self) -> list[str]:
        """The names of the limits that are no comparison, and hold on a dedicated target alone."""
        return [name for name in ABSOLUTE if getattr(self, name) is not None]

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Budget":
        """Return the budget in the file at `path`, which has the keys of a recipe's `budget`.

        Raises:
            RecipeError: the file is missing, is not YAML, or is not a budget.
        """
        path, limits = Path(path), sorted(cls.model_fields.keys() - SETTINGS)
        content = read_yaml(path, f"some of {limits}")
        try:
            found = cls.model_validate(content)
        except ValidationError as error:
            kinds: dict[str, list[type[BaseModel]]]
            kinds = {"": [cls], "slices": [Slices], "regression": [Regression]}
            raise RecipeError(explain(path, error, kinds)) from None
        if found.empty:
            raise RecipeError(f"{path}: found no limit, expected one of {limits}")
        return found


def _limited(limits: Strict, names: Iterable[str]) -> bool:
    return any(getattr(limits, name) is not None for name in names)


QUALITY: Final = tuple(
    name for name in Limits.model_fields if name not in {"max_size", "max_memory"}
)
SETTINGS: Final = frozenset({"confidence", "baseline_floor"})
"""What is no limit in itself."""
LATENCIES: Final = {"max_p50_ms": 0.5, "max_p95_ms": 0.95, "max_p99_ms": 0.99}
"""Limits of a percentile, and which."""
ABSOLUTE: Final = (*LATENCIES, "max_peak_mb", "max_mb", "min_throughput_per_s")
TIMED: Final = ("min_speedup", "max_energy", *LATENCIES, "min_throughput_per_s")
TIMED_CONFIDENCE: Final = 0.975
"""Of one end of an interval that holds with 95 %."""
