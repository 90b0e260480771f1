"""Scores against scikit-learn, hand counts and closed forms."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as oracle

from benchmarks.metrics import METRICS, score

LABELS = np.asarray([0, 0, 1, 1, 2, 2, 2, 1])
PREDICTIONS = np.asarray([0, 1, 1, 1, 2, 0, 2, 2])
CLASSES = {"label": LABELS, "prediction": PREDICTIONS}


def test_classification_metrics_equal_scikit_learn():
    assert score("accuracy", CLASSES) == oracle.accuracy_score(LABELS, PREDICTIONS) == 5 / 8
    assert score("macro_f1", CLASSES) == oracle.f1_score(LABELS, PREDICTIONS, average="macro")
    assert score("matthews", CLASSES) == oracle.matthews_corrcoef(LABELS, PREDICTIONS)


def test_correlations_equal_scipy():
    generator = np.random.default_rng(0)
    score_ = generator.integers(0, 6, 50).astype(float)  # as in STS-B, many are equal
    columns = {"score": score_, "predicted": score_ + generator.normal(size=50)}
    pair = columns["predicted"], columns["score"]
    assert score("spearman", columns) == pytest.approx(stats.spearmanr(*pair).statistic)
    assert score("pearson", columns) == pytest.approx(stats.pearsonr(*pair).statistic)
    constant = {**columns, "predicted": np.ones(50)}
    assert score("spearman", constant) == score("pearson", constant) == 0


@pytest.mark.parametrize("name", ["spearman", "pearson"])
def test_spoilt_scores_cost_most_of_all_single_changes(name):
    generator = np.random.default_rng(1)
    given = generator.normal(size=40)
    columns = {"score": given, "predicted": given + 0.3 * generator.normal(size=40)}
    (spoilt,) = METRICS[name].spoil(columns, 1)
    lowest = score(name, spoilt)
    ends = columns["predicted"].min(), columns["predicted"].max()
    others = [
        score(
            name, columns | {"predicted": np.where(np.arange(40) == at, end, columns["predicted"])}
        )
        for at in range(40)
        for end in ends
    ]
    assert lowest <= min(others) + 0.01
    (more,) = METRICS[name].spoil(columns, 3)
    assert score(name, more) < lowest


def test_entity_f1_adds_up_counts():
    counts = {
        "true_positives": np.asarray([2, 0, 1]),
        "false_positives": np.asarray([0, 1, 0]),
        "false_negatives": np.asarray([1, 0, 1]),
    }
    # precision 3/4, recall 3/5
    assert score("entity_f1", counts) == pytest.approx(2 * 0.75 * 0.6 / 1.35)


def test_perplexity_weighs_documents_by_tokens():
    columns = {"nll": np.asarray([2.0, 6.0]), "tokens": np.asarray([1, 3])}
    assert score("perplexity", columns) == pytest.approx(math.exp(8 / 4))


@pytest.mark.parametrize("name", METRICS)
def test_only_perplexity_is_better_when_lower(name):
    assert METRICS[name].higher_is_better == (name != "perplexity")


def test_no_example_is_an_error():
    with pytest.raises(ValueError, match="accuracy: found no example"):
        score("accuracy", {"label": np.asarray([]), "prediction": np.asarray([])})


def test_nan_is_an_error():
    with pytest.raises(ValueError, match="perplexity: found nan over 1 examples"):
        score("perplexity", {"nll": np.asarray([np.nan]), "tokens": np.asarray([1])})
