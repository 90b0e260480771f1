"""How good a predictor is on a task, example by example.

The outcomes of every example are kept, not only the score; see outcomes.py.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol, TypeVar

import numpy as np

from benchmarks.examples import Arrays, Example, Judgement, collate
from benchmarks.outcomes import Outcomes
from benchmarks.tasks import Task
from benchmarks.worker import InProcess, Worker

BATCH: Final = 32
"""Windows a batch; the same for every artifact, since int8 ranges depend on what is beside."""


T = TypeVar("T")


class Track(Protocol):
    """Shows how far an iteration is; `total` is its length."""

    def __call__(self, items: Iterable[T], what: str, total: int) -> Iterable[T]:
        """Return the items, one after the other."""
        ...


def silent(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """Show nothing."""
    del what, total
    return items


def once(track: Track, what: str, act: Callable[[], T]) -> T:
    """Return what `act` returns, and show that it lasts."""
    (result,) = [act() for _ in track(range(1), what, 1)]
    return result


def evaluate(
    worker: Worker | InProcess,
    task: Task,
    examples: Sequence[Example],
    padding: dict[str, int],
    track: Track = silent,
) -> Outcomes:
    """Return the outcomes of all examples, in their order."""
    places = [(n, w) for n, example in enumerate(examples) for w in range(len(example.windows))]
    # Windows of like length share a batch: less padding, and the same batches for every artifact.
    places.sort(key=lambda place: _length(examples, place))
    outputs: dict[tuple[int, int], Arrays] = {}
    starts = range(0, len(places), BATCH)
    for start in track(starts, "evaluating", len(starts)):
        batch = places[start : start + BATCH]
        inputs = collate([examples[n].windows[w].inputs for n, w in batch], padding)
        predicted = worker.predict(inputs, reduction=task.reduction)
        for name, array in predicted.items():
            if not np.all(np.isfinite(array)):
                raise FloatingPointError(
                    f"evaluating: found NaN or infinity in the output {name!r}, expected numbers"
                )
        for row, place in enumerate(batch):
            outputs[place] = {name: array[row] for name, array in predicted.items()}
    return _gather(
        examples,
        [
            task.judge(example, [outputs[n, w] for w in range(len(example.windows))])
            for n, example in enumerate(examples)
        ],
    )


def _length(examples: Sequence[Example], place: tuple[int, int]) -> int:
    example, window = place
    return max(array.shape[-1] for array in examples[example].windows[window].inputs.values())


def _gather(examples: Sequence[Example], judged: Sequence[Judgement]) -> Outcomes:
    log_probabilities = None
    if judged[0].log_probabilities is not None:
        log_probabilities = np.concatenate(
            [np.asarray(j.log_probabilities, np.float32) for j in judged]
        )
    return Outcomes(
        ids=tuple(example.id for example in examples),
        columns={name: np.asarray([j.columns[name] for j in judged]) for name in judged[0].columns},
        decisions=np.concatenate([np.asarray(j.decisions, np.int64) for j in judged]),
        log_probabilities=log_probabilities,
        lengths=np.asarray([len(j.decisions) for j in judged], np.int64),
    )
