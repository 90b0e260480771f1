"""What a score is: functions from per-example columns to one number.

The columns come from a task's judge (tasks.py): one row an example, kept for baseline and candidate
alike, so that the gate can pair them. A metric says of which kind it is, because the kind decides
the statistical test; it knows nothing of models, budgets or tests.

N examples.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float64]
Kind = Literal["binary", "mean", "corpus", "perplexity"]


@dataclass(frozen=True)
class Metric:
    """A metric: its kind, and its function.

    `binary` and `mean` functions return one value an example `(N,)`, and the score is their mean;
    `corpus` functions return the score of all examples at once; `perplexity` is the exponential of
    a mean over tokens, lower is better. A corpus metric can `spoil`: return columns with a number
    of right examples turned wrong, in each way that may cost it most.
    """

    kind: Kind
    function: Callable[[Columns], Floats | float]
    spoil: Callable[[Columns, int], Iterator[Columns]] | None = None

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is a better one."""
        return self.kind != "perplexity"


def accuracy(columns: Columns) -> Floats:
    """Return 1 where the prediction is the label, else 0 `(N,)`."""
    return np.asarray(columns["prediction"] == columns["label"], np.float64)


def exact_match(columns: Columns) -> Floats:
    """Return 1 where the normalised answer equals a reference `(N,)`. arXiv 1606.05250."""
    return np.asarray(columns["exact_match"], np.float64)


def answer_f1(columns: Columns) -> Floats:
    """Return the token overlap of answer and reference `(N,)`. SQuAD 1.1, arXiv 1606.05250."""
    return np.asarray(columns["answer_f1"], np.float64)


def macro_f1(columns: Columns) -> float:
    """Return the unweighted mean over the classes of their F1, as scikit-learn has it."""
    counts = _confusion(columns)
    both = counts.sum(axis=0) + counts.sum(axis=1)
    there = both > 0
    return float(np.mean(2 * counts.diagonal()[there] / both[there]))


def matthews(columns: Columns) -> float:
    """Return the Matthews correlation coefficient in [-1, 1], 0 where it is not defined.

    Of several classes: Gorodkin 2004, Computational Biology and Chemistry 28:367-374.
    """
    counts = _confusion(columns)
    predicted, expected, total = counts.sum(axis=0), counts.sum(axis=1), counts.sum()
    spread = (total**2 - predicted @ predicted) * (total**2 - expected @ expected)
    shared = total * counts.trace() - predicted @ expected
    return float(shared / np.sqrt(spread)) if spread else 0.0


def _confusion(columns: Columns) -> Floats:
    """Return how often each class was called each `(C, C)`; thousands are taken in a bootstrap."""
    label, prediction = (np.asarray(columns[key], np.int64) for key in ("label", "prediction"))
    classes = int(max(label.max(), prediction.max())) + 1
    counts = np.bincount(label * classes + prediction, minlength=classes**2)
    return counts.reshape(classes, classes).astype(np.float64)


def pearson(columns: Columns) -> float:
    """Return the correlation of predicted and given scores in [-1, 1], 0 if one does not vary."""
    return _correlation(columns["predicted"], columns["score"])


def spearman(columns: Columns) -> float:
    """Return the correlation of their ranks in [-1, 1], 0 if one does not vary."""
    return _correlation(_ranks(columns["predicted"]), _ranks(columns["score"]))


def _ranks(values: NDArray[Any]) -> Floats:
    """Return ranks from 1 on; equal ones share the mean. scipy.stats is slow to import."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = np.cumsum(counts) - (counts - 1) / 2
    return ranks[places]


def _correlation(one: Floats, other: Floats) -> float:
    one, other = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (one, other))
    spread = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / spread if spread else 0.0


def entity_f1(columns: Columns) -> float:
    """Return the micro F1 of whole entities, from the counts of each sentence (CoNLL-2003)."""
    right = int(columns["true_positives"].sum())
    wrong = int(columns["false_positives"].sum()) + int(columns["false_negatives"].sum())
    return 2 * right / (2 * right + wrong) if right + wrong else 1.0


def spoil_classes(columns: Columns, count: int) -> Iterator[Columns]:
    """Yield columns with `count` right examples of one class called another: each, the rarest."""
    label, prediction = (np.asarray(columns[key], np.int64) for key in ("label", "prediction"))
    classes, sizes = np.unique(label, return_counts=True)
    for one in classes:
        others = classes != one
        right = np.flatnonzero((label == one) & (prediction == one))[:count]
        spoilt = prediction.copy()
        # Where there is no other class, one that is none.
        spoilt[right] = classes[others][sizes[others].argmin()] if others.any() else one + 1
        yield {**columns, "prediction": spoilt}


def spoil_entities(columns: Columns, count: int) -> Iterator[Columns]:
    """Yield columns where the `count` sentences with most right entities have all of them wrong."""
    right = np.asarray(columns["true_positives"], np.int64)
    lost = np.zeros_like(right)
    most = np.argsort(-right, kind="stable")[:count]
    lost[most] = right[most]
    yield {
        "true_positives": right - lost,
        "false_positives": columns["false_positives"] + lost,
        "false_negatives": columns["false_negatives"] + lost,
    }


def spoil_scores(columns: Columns, count: int) -> Iterator[Columns]:
    """Yield columns where `count` examples are predicted beyond the wrong end: what costs most."""
    predicted, score = (np.asarray(columns[n], np.float64) for n in ("predicted", "score"))
    low, high = predicted.min(), predicted.max()
    away = score - np.median(score)
    ends = np.where(away > 0, low, high)
    most = np.argsort(-away * (predicted - ends), kind="stable")[:count]
    spoilt = predicted.copy()
    spoilt[most] = ends[most]
    yield {**columns, "predicted": spoilt}


def perplexity(columns: Columns) -> float:
    """Return exp of the mean negative log-likelihood of a token."""
    return float(np.exp(columns["nll"].sum() / columns["tokens"].sum()))


def score(name: str, columns: Columns) -> float:
    """Return the score by the metric `name`.

    Raises:
        ValueError: there is no example, or the score is not a finite number.
    """
    examples = len(next(iter(columns.values())))
    if not examples:
        raise ValueError(f"{name}: found no example, expected at least one")
    value = float(np.mean(METRICS[name].function(columns)))
    if not np.isfinite(value):
        raise ValueError(f"{name}: found {value} over {examples} examples, expected a number")
    return value


def lost(name: str, before: float, after: float) -> float:
    """Return what a score by the metric `name` lost: points, or of a perplexity its growth.

    A perplexity that grows from 4 to 5 lost 0.25.
    """
    return before - after if METRICS[name].higher_is_better else after / before - 1


METRICS: Final[Mapping[str, Metric]] = {
    "accuracy": Metric("binary", accuracy),
    "exact_match": Metric("binary", exact_match),
    "answer_f1": Metric("mean", answer_f1),
    "macro_f1": Metric("corpus", macro_f1, spoil_classes),
    "matthews": Metric("corpus", matthews, spoil_classes),
    "entity_f1": Metric("corpus", entity_f1, spoil_entities),
    "spearman": Metric("corpus", spearman, spoil_scores),
    "pearson": Metric("corpus", pearson, spoil_scores),
    "perplexity": Metric("perplexity", perplexity),
}
