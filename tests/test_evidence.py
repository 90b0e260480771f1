"""A baseline has to know something: less than that, and nothing can be lost of it."""

import numpy as np
import pytest

from pipeline.evidence import EvidenceError, check_floor


def answers(share_of_ones, prediction):
    label = (np.arange(100) < 100 * share_of_ones).astype(int)
    return {"label": label, "prediction": np.asarray(prediction(label), int)}


LUCK = np.random.default_rng(0).integers(0, 2, 100)


@pytest.mark.parametrize(
    ("metric", "columns"),
    [
        ("accuracy", answers(0.7, lambda label: np.ones(100))),  # the most frequent label alone
        ("accuracy", answers(0.7, lambda label: LUCK)),
        ("macro_f1", answers(0.7, lambda label: np.ones(100))),
        ("matthews", answers(0.7, lambda label: np.ones(100))),
        ("matthews", answers(0.5, lambda label: 1 - label)),
        ("exact_match", {"exact_match": np.zeros(50)}),
        ("answer_f1", {"answer_f1": np.zeros(50)}),
        (
            "entity_f1",
            {
                "true_positives": np.zeros(50, int),
                "false_positives": np.ones(50, int),
                "false_negatives": np.ones(50, int),
            },
        ),
    ],
)
def test_a_baseline_that_has_learnt_nothing_is_an_error(metric, columns):
    with pytest.raises(EvidenceError, match=rf"baseline: found {metric} .*, expected more than"):
        check_floor(metric, columns)
    check_floor(metric, columns, floor=-2.0)


def test_a_baseline_that_has_learnt_something_is_fit():
    check_floor("accuracy", answers(0.7, lambda label: label))
    check_floor("perplexity", {"nll": np.ones(40), "tokens": np.ones(40)})


def test_a_floor_of_perplexity_is_the_most_it_may_be():
    documents = {"nll": np.full(40, 3.0), "tokens": np.ones(40)}
    check_floor("perplexity", documents, floor=21.0)
    with pytest.raises(EvidenceError, match=r"found perplexity 20\.09, expected less than 20"):
        check_floor("perplexity", documents, floor=20.0)
