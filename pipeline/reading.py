"""How what a user writes is read: YAML, with keys that are known.

Imports neither torch nor transformers: a budget can be judged again without any model.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field

LARGEST: Final = 10_000
"""Values in a file; more are the work of aliases in aliases."""
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


def read_yaml(path: Path, needs: str) -> dict[str, Any]:
    """Return the mapping in a YAML file; `needs` says what it is expected to hold.

    Raises:
        RecipeError: the file is missing, is not YAML, or holds no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path}: not YAML: {reason}") from None
    if not isinstance(content, dict):
        found = "an empty file" if content is None else type(content).__name__
        raise RecipeError(f"{path}: found {found}, expected a mapping with {needs}")
    left = LARGEST
    waiting: list[Any] = [content]
    while waiting:
        value = waiting.pop()
        left -= 1
        if left < 0:
            raise RecipeError(
                f"{path}: found more than {LARGEST} values, expected {needs}; aliases multiply them"
            )
        if isinstance(value, dict | list):
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return content


def stage_names(steps: Sequence[str]) -> tuple[str, ...]:
    """Return the name of every step's stage: the step's, with a number from the second on."""
    names: list[str] = []
    for step in steps:
        count = sum(name.partition("-")[0] == step for name in names) + 1
        names.append(step if count == 1 else f"{step}-{count}")
    return tuple(names)
