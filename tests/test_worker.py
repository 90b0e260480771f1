"""A worker measures in its own process; whatever happens to it is a clear error."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from known_predictors import INPUTS

from benchmarks import worker as workers
from benchmarks.accuracy import evaluate
from benchmarks.examples import Example, Window
from benchmarks.machine import Unavailable
from benchmarks.outcomes import Outcomes, fidelity
from benchmarks.speed import compare, effective_samples, percentiles, ratio
from benchmarks.tasks import TASKS
from benchmarks.worker import WorkerError, next_token
from exporters import MissingDependency, NotHere


def test_latency_is_the_time_of_the_call(opened):
    worker = opened("sleeper", "0.02")
    worker.hold(0, INPUTS)
    latencies = worker.time(0, 5)
    assert len(latencies) == 5
    assert 20e6 <= min(latencies) < 40e6


def test_predictions_come_back(opened):
    worker = opened("sleeper", "0")
    found = worker.predict({"input_ids": np.asarray([[1, 2], [4, 4]])})
    assert found["logits"].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("megabytes", [64, 256])
def test_peak_memory_is_what_was_allocated(opened, megabytes):
    held = bytearray(os.urandom(1 << 20)) * 300  # the parent's own memory does not count
    worker = opened("eater", str(megabytes))
    before = worker.peak_rss_bytes()
    worker.hold(0, INPUTS)
    worker.time(0, 1)
    assert worker.peak_rss_bytes() - before == pytest.approx(megabytes << 20, rel=0.02, abs=2 << 20)
    assert before < 200 << 20 < len(held)


def test_what_libraries_print_does_not_matter(opened):
    assert opened("talker").predict(INPUTS)["logits"].shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crasher", "x .*ended with status 1: RuntimeError: the runtime gave up"),
        ("killed", "ended by SIGKILL; it may have run out of memory"),
    ],
)
def test_a_call_that_ends_the_process_is_an_error(opened, name, message):
    worker = opened(name)
    with pytest.raises(WorkerError, match=message):
        worker.predict(INPUTS)
    with pytest.raises(WorkerError, match="ended"):
        worker.peak_rss_bytes()


def test_an_artifact_that_does_not_open_is_an_error(opened):
    with pytest.raises(WorkerError, match="status 1: ValueError: no such artifact"):
        opened("broken")


def test_what_this_machine_lacks_is_said_in_the_words_of_the_opener(opened):
    with pytest.raises(Unavailable, match=r"^x \(.*\): abacus: not installed; pip install"):
        opened("lacking")


def test_all_errors_of_what_this_machine_lacks_are_known_to_workers():
    lacking = (MissingDependency, NotHere, Unavailable)
    assert {kind.__name__ for kind in lacking} == workers.NOT_HERE


def test_a_hung_call_is_an_error_and_leaves_no_process(opened, monkeypatch):
    worker = opened("hanging")
    monkeypatch.setattr(workers, "REPLY_SECONDS", 0.5)
    with pytest.raises(WorkerError, match="no reply within"), worker:
        worker.predict(INPUTS)
    time.sleep(0.1)
    lines = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not [line for line in lines if "hanging" in line]


def test_a_killed_parent_leaves_no_worker():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )  # fmt: skip
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


PARENT = """
import threading
from pathlib import Path
from known_predictors import INPUTS
from benchmarks.worker import Worker
worker = Worker("known_predictors:hanging", Path("x"), device="cpu", threads=1)
threading.Timer(0.5, lambda: print(worker._process.pid, flush=True)).start()
worker.predict(INPUTS)
"""
ROOT = Path(__file__).parents[1]


def test_the_slower_is_called_slower(opened):
    pair = {"fast": opened("sleeper", "0.010"), "slow": opened("sleeper", "0.015")}
    (fast, slow) = (rounds[0] for rounds in compare(pair, [INPUTS], rounds=15, seconds=60).values())
    found = ratio(fast, slow)
    assert found.low <= found.value <= found.high < 0.9
    assert found.value == pytest.approx(2 / 3, rel=0.1)


def test_one_artifact_twice_is_a_tie(opened):
    pair = {"a": opened("sleeper", "0.010"), "b": opened("sleeper", "0.010")}
    found = ratio(
        *(rounds[0] for rounds in compare(pair, [INPUTS], rounds=15, seconds=60).values())
    )
    assert found.value == pytest.approx(1.0, abs=0.05)


def test_time_runs_out_but_not_before_six_rounds(opened):
    (rounds,) = compare(
        {"a": opened("sleeper", "0.01")}, [INPUTS], rounds=50, seconds=1e-3
    ).values()
    assert len(rounds[0]) == 6


def test_ratio_has_the_exact_interval_of_a_median():
    baseline = [[float(at)] for at in range(1, 12)]
    found = ratio(baseline, [[1.0]] * 11)
    # n = 11: the 2nd and the 10th order statistic cover the median with 98.8 %, the 3rd with 93.5.
    assert (found.low, found.value, found.high) == (2.0, 6.0, 10.0)
    with pytest.raises(ValueError, match="found 11 and 3 rounds"):
        ratio(baseline, [[1.0]] * 3)


@pytest.mark.parametrize(
    ("samples", "known"),
    [(28, ()), (29, ("p90",)), (59, ("p90", "p95")), (299, ("p90", "p95", "p99"))],
)
def test_a_percentile_needs_enough_samples(samples, known):
    found = percentiles([float(at) for at in range(samples)])
    assert [name for name in ("p90", "p95", "p99") if getattr(found, name) is not None] == [*known]
    assert found.p50 == samples // 2


def test_the_interval_of_a_percentile_is_that_of_the_textbook():
    found = percentiles([float(at) for at in range(1, 101)])
    # Conover, Practical Nonparametric Statistics, 3.2: ranks by the binomial; of n = 100 the median
    # lies between the 40th and the 61st with 96.5 %, p90 between the 84th and the 96th with 95.6 %.
    assert found.intervals["p50"] == (40, 61)
    assert found.intervals["p90"] == (84, 96)
    assert found.quantiles[::5] == (1, 25.75, 50.5, 75.25, 100)


def test_an_end_that_the_samples_do_not_reach_is_none():
    found = percentiles([float(at) for at in range(35)])
    assert found.p90 is not None
    assert found.intervals["p90"][1] is None
    assert percentiles([float(at) for at in range(36)]).intervals["p90"][1] == 35
    assert "p95" not in found.intervals
    assert percentiles([1.0] * 5).intervals["p50"] == (None, None)


def test_calls_that_hang_together_are_worth_fewer():
    noise = np.random.default_rng(0).normal(size=4000)
    together = np.zeros(4000)
    for at in range(1, 4000):
        together[at] = 0.8 * together[at - 1] + noise[at]
    assert effective_samples(noise) > 3700
    # An AR(1) of 0.8 has (1 - 0.8) / (1 + 0.8) of its samples; ranks hang together a little less.
    assert effective_samples(together) / 4000 == pytest.approx(0.2 / 1.8, rel=0.15)
    assert effective_samples([1.0] * 9) == 9
    assert effective_samples([1.0, 2.0] * 9) == 18


def test_next_token_is_the_cross_entropy_of_torch():
    import torch

    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    found = next_token({"input_ids": ids.numpy()}, {"logits": logits.numpy()})
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    np.testing.assert_allclose(found["nll"].ravel(), expected.numpy(), rtol=1e-5)
    assert (found["next_token"] == logits[:, :-1].argmax(-1).numpy()).all()
    given = {"input_ids": ids[:, :2].numpy(), "decoder_input_ids": ids.numpy()}
    np.testing.assert_array_equal(
        next_token(given, {"logits": logits.numpy()})["nll"], found["nll"]
    )


def examples(labels):
    return [
        Example(
            f"{at:064x}",
            (Window({"input_ids": np.asarray([at, *[9] * (at % 4)])}, {}),),
            {"label": label},
        )
        for at, label in enumerate(labels)
    ]


def test_evaluation_keeps_the_order_of_the_examples(opened, tmp_path):
    labels = [at % 2 for at in range(70)]
    labels[3] = labels[50] = 7
    found = evaluate(opened("sleeper", "0"), TASKS["text-classification"], examples(labels), {})
    assert found.columns["prediction"].tolist() == [at % 2 for at in range(70)]
    assert np.flatnonzero(found.columns["prediction"] != found.columns["label"]).tolist() == [3, 50]
    found.save(tmp_path / "outcomes.safetensors")
    loaded = Outcomes.load(tmp_path / "outcomes.safetensors")
    assert loaded.ids == found.ids
    assert (loaded.log_probabilities == found.log_probabilities).all()


def outcomes(decisions, probabilities) -> Outcomes:
    return Outcomes(
        ids=("a", "b"),
        columns={"prediction": np.asarray(decisions), "label": np.asarray([0, 0])},
        decisions=np.asarray(decisions),
        log_probabilities=np.log(np.asarray(probabilities, np.float32)),
    )


def test_fidelity_counts_by_hand():
    before = outcomes([0, 1], [[0.5, 0.5], [0.25, 0.75]])
    after = outcomes([0, 0], [[0.5, 0.5], [0.75, 0.25]])
    found = fidelity(before, after, lambda c: c["prediction"] == c["label"])
    assert (found.agreement, found.flips, found.broken, found.mended) == (0.5, 1, 0, 1)
    assert found.kl_mean == pytest.approx(0.5 * np.log(3) / 2)
    assert found.kl_p99 == pytest.approx(0.99 * np.log(3) / 2)
    # The margins are 0 and 0.5.
    assert (found.margin, found.close) == (pytest.approx(0.25), 0.5)
    assert fidelity(after, before, lambda c: c["prediction"] == c["label"]).broken == 1
    other = Outcomes(("a", "c"), after.columns, after.decisions, None)
    with pytest.raises(ValueError, match="expected the same examples"):
        fidelity(before, other, None)


def test_fidelity_of_a_language_model_is_told_by_document():
    def told(nll):
        columns = {"nll": np.asarray(nll), "tokens": np.asarray([2, 4, 1])}
        return Outcomes(("a", "b", "c"), columns, np.zeros(7), None)

    before, after = told(np.log([4.0, 16.0, 3.0])), told(np.log([16.0, 16.0, 3.3]))
    found = fidelity(before, after, None)
    # Perplexities 2, 2, 3 become 4, 2, 3.3.
    assert found.perplexities.p50 == pytest.approx(3.3)
    assert found.perplexity_ratios.p50 == pytest.approx(1.1)
    assert found.perplexity_ratios.p95 == pytest.approx(1.1 + 0.9 * 0.9)
    assert (found.flips, found.kl_mean, found.margin) == (None, None, None)
