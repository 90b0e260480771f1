"""Batches that stay on the device: what the predictors of all runtimes without copies share."""

from collections.abc import Callable, Mapping
from typing import Any

Arrays = Mapping[str, Any]


def resident(
    put: Callable[[Arrays], Any], compute: Callable[[Any], object]
) -> Callable[[Arrays], Arrays]:
    """Return a predictor that leaves all outputs on the device, and returns none of them.

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
