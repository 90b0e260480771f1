"""The mistakes of a recipe in words: where, what was found, what was expected."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.reading import unknown

Kinds = Mapping[str, type[BaseModel]]


def explain(
    path: Path,
    error: ValidationError,
    kinds: Mapping[str, Sequence[type[BaseModel]]],
    steps: Kinds | None = None,
    inner: Kinds | None = None,
) -> str:
    """Return every mistake on a line of its own, with its path in the file.

    Args:
        path: the file.
        error: what is wrong with it.
        kinds: what has the keys under each of the file's own, but for `steps`; under "", those.
        steps: what has the keys of a step, by its name.
        inner: what has the keys under those of a step that have some themselves.
    """
    lines: list[str] = []
    for mistake in error.errors():
        if mistake["type"] == "too_short" and mistake["input"]:
            continue  # a list is said to be short when its items are wrong
        # The tag of a step says the same as its place: steps.0.prune.heads -> steps.0.heads
        parts, step = [str(part) for part in mistake["loc"]], ""
        if len(parts) > 2 and parts[0] == "steps":  # noqa: PLR2004
            step = parts.pop(2)
        where = ".".join(parts)
        if mistake["type"] == "extra_forbidden":
            text = f"unknown key{_suggest(parts, step, kinds, steps or {}, inner or {})}"
        else:
            text = _plain(mistake, steps or {})
        lines.extend(f"  {where}: {line}" if where else f"  {line}" for line in text.splitlines())
    count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
    return "\n".join([f"{path}: {count}", *lines])


def _plain(mistake: Any, steps: Kinds) -> str:
    text = str(mistake["msg"]).removeprefix("Value error, ")
    if mistake["type"] == "union_tag_invalid":
        return f"step: {unknown(str(mistake['ctx']['tag']), list(steps))}"
    if mistake["type"] == "union_tag_not_found":
        return f"step: found none, expected one of {list(steps)}"
    if mistake["type"] in {"value_error", "missing"}:
        return text
    return f"{text}, found {mistake['input']!r}"


def _suggest(
    parts: Sequence[str],
    step: str,
    kinds: Mapping[str, Sequence[type[BaseModel]]],
    steps: Kinds,
    inner: Kinds,
) -> str:
    """Return the known key closest to an unknown one."""
    parent = parts[0] if len(parts) > 1 else ""
    here = kinds.get(parent, ())
    if parent == "steps":
        here = [steps[step]] if step else []
        if len(parts) > 3 and parts[2] in inner:  # noqa: PLR2004 - steps.0.goal.speed
            here = [inner[parts[2]]]
    known = [key for kind in here for key in kind.model_fields]
    close = difflib.get_close_matches(parts[-1], known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f", expected one of {sorted(known)}"
