"""What every example came to: kept, so that a verdict can be reached again.

The gate pairs the outcomes of the baseline with those of the candidate, and fidelity compares what
the two decide. Imports neither torch nor any other library of models.

N examples, D decisions (one an example, or one a token), C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save_file

from benchmarks.examples import Array, Arrays


@dataclass(frozen=True)
class Outcomes:
    """What each example came to: `ids` `(N,)`, `columns` `(N,)` each, decisions `(D,)`.

    `lengths` `(N,)` says how many decisions each example has; None: one.
    """

    ids: tuple[str, ...]
    columns: Arrays
    decisions: Array
    log_probabilities: NDArray[np.float32] | None
    lengths: NDArray[np.int64] | None = None

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        arrays = {f"column.{name}": values for name, values in self.columns.items()}
        arrays["decisions"] = self.decisions
        if self.log_probabilities is not None:
            arrays["log_probabilities"] = self.log_probabilities
        if self.lengths is not None:
            arrays["lengths"] = self.lengths
        arrays["ids"] = np.frombuffer(bytes.fromhex("".join(self.ids)), np.uint8)
        save_file(arrays, path)

    @classmethod
    def load(cls, path: Path) -> "Outcomes":
        """Read what `save` wrote."""
        return cls.parse(path.read_bytes())

    @classmethod
    def parse(cls, content: bytes) -> "Outcomes":
        """Return what the bytes of such a file hold."""
        arrays = load(content)
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
            lengths=arrays.get("lengths"),
        )


CLOSE: Final = 0.1
"""The margin below which a decision counts as close."""


@dataclass(frozen=True)
class Spread:
    """Three quantiles: 5, 50 and 95 %."""

    p5: float
    p50: float
    p95: float


@dataclass(frozen=True)
class Fidelity:
    """How far a candidate's decisions are from the baseline's.

    `agreement` is the share of equal decisions, None where nothing is decided; `flips` counts the
    examples that turned from right to wrong (`broken`) or back (`mended`), None where an example is
    not right or wrong (arXiv 2407.09141). `kl_mean` and `kl_p99` are of KL(baseline || candidate)
    over the decisions, in nats; `margin` is the median of how much more probable the candidate's
    decision was than the next one, `close` the share of decisions where that is below `CLOSE`; None
    where there are no class probabilities. Of a language model, `perplexities` are those of single
    documents, and `perplexity_ratios` what they are of the baseline's.
    """

    agreement: float | None
    flips: int | None
    kl_mean: float | None
    broken: int | None = None
    mended: int | None = None
    kl_p99: float | None = None
    margin: float | None = None
    close: float | None = None
    perplexities: Spread | None = None
    perplexity_ratios: Spread | None = None


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
    found: dict[str, Any] = {"flips": None, "kl_mean": None}
    if right is not None:
        before, after = (np.asarray(right(each.columns), bool) for each in (baseline, candidate))
        broken, mended = int(np.sum(before & ~after)), int(np.sum(~before & after))
        found |= {"flips": broken + mended, "broken": broken, "mended": mended}
    if baseline.log_probabilities is not None and candidate.log_probabilities is not None:
        p = baseline.log_probabilities.astype(np.float64)
        q = candidate.log_probabilities.astype(np.float64)
        kl = divergences(p, q)
        found |= {"kl_mean": float(np.mean(kl)), "kl_p99": float(np.quantile(kl, 0.99))}
        if q.shape[-1] > 1:
            second, first = np.partition(np.exp(q), -2, axis=-1)[:, -2:].T
            margins = first - second
            found |= {"margin": float(np.median(margins)), "close": float(np.mean(margins < CLOSE))}
    if "nll" in candidate.columns:
        before, after = (
            each.columns["nll"] / each.columns["tokens"] for each in (baseline, candidate)
        )
        found |= {
            "perplexities": _spread(np.exp(after)),
            "perplexity_ratios": _spread(np.exp(after - before)),
        }
    equal = baseline.decisions == candidate.decisions
    return Fidelity(agreement=float(np.mean(equal)) if len(equal) else None, **found)


def divergences(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return KL(p || q) of log-probabilities `(D, C)` in nats `(D,)`."""
    kl: NDArray[np.float64] = np.sum(np.exp(p) * (p - q), axis=-1)
    return kl


def _spread(values: Array) -> Spread:
    return Spread(*np.quantile(values, (0.05, 0.5, 0.95)).tolist())
