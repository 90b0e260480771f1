"""What a release must keep to, in a recipe or in a file of its own.

A budget can be judged again without any model: this module imports neither torch nor transformers.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[float, Field(gt=0)]


class RecipeError(ValueError):
    """What a user wrote is wrong; the message lists every mistake, one a line."""


def unknown(value: str, names: Sequence[str]) -> str:
    """Return what to say of a name that is none of `names`."""
    close = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"found {value!r}, expected one of {list(names)}{hint}"


class Strict(BaseModel):
    """Unknown keys are mistakes, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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

    @property
    def names(self) -> list[str]:
        """What is limited."""
        given = self.model_dump(exclude_none=True, exclude={"confidence"})
        return list(given)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Budget":
        """Return the budget in the file at `path`, which has the keys of a recipe's `budget`.

        Raises:
            RecipeError: the file is missing, is not YAML, or is not a budget.
        """
        path = Path(path)
        content = read_yaml(path)
        if not isinstance(content, dict) or not content:
            raise RecipeError(f"{path}: found no keys, expected some of {list(cls.model_fields)}")
        try:
            found = cls.model_validate(content)
        except ValidationError as error:
            lines = [f"  {_where(m)}: {_words(m, list(cls.model_fields))}" for m in error.errors()]
            raise RecipeError("\n".join([f"{path}: not a budget", *lines])) from None
        if not found.names:
            raise RecipeError(f"{path}: found no limit, expected one of {list(cls.model_fields)}")
        return found


def read_yaml(path: Path) -> Any:
    """Return what is in a YAML file.

    Raises:
        RecipeError: the file is missing, or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path}: not YAML: {reason}") from None


def _where(mistake: Any) -> str:
    return ".".join(str(part) for part in mistake["loc"])


def _words(mistake: Any, names: Sequence[str]) -> str:
    if mistake["type"] == "extra_forbidden":
        return unknown(_where(mistake), names)
    return f"{mistake['msg']}, found {mistake['input']!r}"
