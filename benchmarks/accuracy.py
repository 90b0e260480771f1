"""How good a predictor is on a task, example by example.

The outcomes of every example are kept, not only the score: the gate pairs those of the baseline
with those of the candidate, and fidelity compares what the two decide.

N examples, D decisions (one an example, or one a token), C classes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from benchmarks.examples import Array, Arrays, Example, Judgement, collate
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


@dataclass(frozen=True)
class Outcomes:
    """What each example came to: `ids` `(N,)`, `columns` `(N,)` each, decisions `(D,)`."""

    ids: tuple[str, ...]
    columns: Arrays
    decisions: Array
    log_probabilities: NDArray[np.float32] | None

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        arrays = {f"column.{name}": values for name, values in self.columns.items()}
        arrays["decisions"] = self.decisions
        if self.log_probabilities is not None:
            arrays["log_probabilities"] = self.log_probabilities
        arrays["ids"] = np.frombuffer(bytes.fromhex("".join(self.ids)), np.uint8)
        save_file(arrays, path)

    @classmethod
    def load(cls, path: Path) -> "Outcomes":
        """Read what `save` wrote."""
        arrays = load_file(path)
        ids = arrays["ids"].tobytes().hex()
        return cls(
            ids=tuple(ids[at : at + 64] for at in range(0, len(ids), 64)),
            columns={
                name.removeprefix("column."): values
                for name, values in arrays.items()
                if name.startswith("column.")
            },
            decisions=arrays["decisions"],
            log_probabilities=arrays.get("log_probabilities"),
        )


@dataclass(frozen=True)
class Fidelity:
    """How far a candidate's decisions are from the baseline's.

    `agreement` is the share of equal decisions; `flips` counts the examples that turned from right
    to wrong or back (None where an example is not right or wrong); `kl_mean` is the mean of
    KL(baseline || candidate) over the decisions, in nats (None where there are no class
    probabilities). Flips: arXiv 2407.09141.
    """

    agreement: float
    flips: int | None
    kl_mean: float | None


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
    )


def fidelity(
    baseline: Outcomes, candidate: Outcomes, right: Callable[[Arrays], Array] | None
) -> Fidelity:
    """Return how the candidate's decisions differ; `right` says which examples are right `(N,)`.

    Raises:
        ValueError: the two were not measured on the same examples.
    """
    if baseline.ids != candidate.ids or len(baseline.decisions) != len(candidate.decisions):
        raise ValueError(
            f"fidelity: found outcomes of {len(baseline.ids)} and {len(candidate.ids)} examples,"
            " expected the same examples in the same order"
        )
    kl_mean = None
    if baseline.log_probabilities is not None and candidate.log_probabilities is not None:
        p = baseline.log_probabilities.astype(np.float64)
        q = candidate.log_probabilities.astype(np.float64)
        kl_mean = float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))
    flips = None
    if right is not None:
        flips = int(np.sum(right(baseline.columns) != right(candidate.columns)))
    agreement = float(np.mean(baseline.decisions == candidate.decisions))
    return Fidelity(agreement, flips, kl_mean)
