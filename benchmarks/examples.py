"""What a model is asked and what its answer comes to, of any task: windows, examples, judgements.

N examples, W windows of an example, T tokens, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]

IGNORED: Final = -100
"""The label of a position that counts neither in a loss nor in a score."""


@dataclass(frozen=True)
class Window:
    """What the model sees at once: its `inputs`, and the `labels` that its loss needs."""

    inputs: Arrays
    labels: Arrays


@dataclass(frozen=True)
class Example:
    """A row as windows, with what is needed to judge the outputs for them."""

    id: str
    windows: tuple[Window, ...]
    reference: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """What one example contributes.

    `columns` are numbers for the metrics; `decisions` `(D,)` and `log_probabilities` `(D, C)` are
    what two models can be compared by where there are no labels.
    """

    columns: Mapping[str, float]
    decisions: Array
    log_probabilities: Array | None = None


def collate(windows: Sequence[Arrays], padding: Mapping[str, int]) -> Arrays:
    """Stack arrays of equal rank to `(B, longest, ...)`, shorter ones padded (0 unless told)."""
    batch = {}
    for name, first in windows[0].items():
        arrays = [window[name] for window in windows]
        shape = np.max([array.shape for array in arrays], axis=0)
        stacked = np.full((len(arrays), *shape), padding.get(name, 0), first.dtype)
        for row, array in enumerate(arrays):
            inside: tuple[int | slice, ...] = (row, *(slice(size) for size in array.shape))
            stacked[inside] = array
        batch[name] = stacked
    return batch


def padding(processor: object) -> dict[str, int]:
    """Return the padding value of every array that is not padded with 0."""
    pad = getattr(processor, "pad_token_id", None)
    end = getattr(processor, "eos_token_id", None)
    values = dict.fromkeys(("labels", "start_positions", "end_positions"), IGNORED)
    fill = next((value for value in (pad, end) if value is not None), 0)
    return values | dict.fromkeys(("input_ids", "decoder_input_ids"), fill)


def with_decoder_inputs(
    examples: Sequence[Example], shift: Callable[[Array], Array]
) -> list[Example]:
    """Return the examples with `decoder_input_ids`, the labels one place later.

    Args:
        examples: windows whose `labels` `(T,)` end with one that is ignored, for the place that the
            last token moves to.
        shift: labels to what the model's decoder reads `(T,)`, a start token in front.
    """
    return [
        replace(
            example,
            windows=tuple(
                replace(w, inputs={**w.inputs, "decoder_input_ids": shift(w.labels["labels"])})
                for w in example.windows
            ),
        )
        for example in examples
    ]
