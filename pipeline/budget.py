"""What a release must keep to, in a recipe or in a file of its own."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from pipeline.mistakes import explain
from pipeline.reading import Positive, RecipeError, Strict, read_yaml


class Budget(Strict):
    """What the result must keep to, against the baseline; what is not given is not checked."""

    max_drop: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The most the score may fall, absolute, for a metric where higher is better."""
    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None
    """The most the perplexity may grow, as a ratio."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """How sure the accuracy check must be before it passes."""
    min_speedup: Positive | None = None
    """The least ratio of baseline latency to final latency, at every load."""
    max_size: Positive | None = None
    """The final size as a ratio to the baseline's."""
    max_memory: Positive | None = None
    """The final peak memory as a ratio to the baseline's."""

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Budget":
        """Return the budget in the file at `path`, which has the keys of a recipe's `budget`.

        Raises:
            RecipeError: the file is missing, is not YAML, or is not a budget.
        """
        path, limits = Path(path), sorted(cls.model_fields.keys() - {"confidence"})
        content = read_yaml(path, f"some of {limits}")
        try:
            found = cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError(explain(path, error, {"": [cls]})) from None
        if not found.model_dump(exclude_none=True, exclude={"confidence"}):
            raise RecipeError(f"{path}: found no limit, expected one of {limits}")
        return found
