"""A torch model becomes a file that another runtime opens.

A format is a module of this folder, imported only when a recipe names it. It has two functions:
`export` writes a model into a folder, `open_predictor` opens such a folder in a runtime. They know
a torch model, a file and a folder; nothing of recipes, stages or measurements.
"""

from collections.abc import Callable, Mapping
from pkgutil import iter_modules
from typing import Any

Arrays = Mapping[str, Any]


class ExportError(RuntimeError):
    """A model could not be exported, or what was exported gives other outputs."""


class MissingDependency(ImportError):
    """What a format needs is not installed."""


class NotHere(RuntimeError):
    """The GPU, or the version of a library, that an engine needs is not here."""


def formats() -> list[str]:
    """Return the names of the formats there are."""
    return sorted(module.name for module in iter_modules(__path__))


def without_copies(
    put: Callable[[Arrays], Any], compute: Callable[[Any], object]
) -> Callable[[Arrays], Arrays]:
    """Return a predictor that leaves its outputs on the device, and batches until another comes.

    Args:
        put: returns a batch on the device; called when it is another one than at the call before.
        compute: returns when the device has computed what was put there.
    """
    batch: Arrays | None = None
    there: Any = None

    def predict(arrays: Arrays) -> Arrays:
        nonlocal batch, there
        if batch is not arrays:
            batch, there = arrays, put(arrays)
        compute(there)
        return {}

    return predict
