"""Whether `bench` can be trusted: it is asked what is known beforehand.

One artifact beside itself must come out as equal, one with a layer more as slower and one with a
layer less as faster, while other work goes on; allocations of known size must be read as they are;
and the parent must stay idle while a worker measures.

    python -m benchmarks.harness_checked [--times 20] [--seconds 30]
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Final

import numpy as np
import psutil
from rich.console import Console

from benchmarks.machine import usable_cores
from benchmarks.worker import Arrays, Predictor, Worker
from pipeline.bench import bench
from pipeline.turns import Settings

LAYERS: Final = 5
"""Of the first artifact; one more is 20 % more."""
NAME: Final = "benchmarks.harness_checked"


def write_encoder(folder: Path, layers: int) -> Path:
    """Export a BERT of small width with random weights; what is timed is not its accuracy."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from exporters import onnx
    from pipeline.sources import MINILM, processor, resolve

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=256, num_attention_heads=8, intermediate_size=1024, num_hidden_layers=layers
    )
    model = BertForSequenceClassification(config).eval()
    (folder / onnx.MODEL).parent.mkdir(parents=True)
    ids = np.arange(24).reshape(2, 12)
    samples = [{"input_ids": x, "attention_mask": np.ones_like(x)} for x in (ids, ids[:1, :7])]
    path = folder / onnx.MODEL
    onnx.export(model, samples, axes=("batch", "sequence"), path=path, fuse_for="cpu")
    config.save_pretrained(folder)
    processor(resolve(MINILM), "AutoTokenizer", None).save_pretrained(folder)
    return folder


def other_work(stop: float) -> None:
    """Use a core for a random part of the time, until `stop`."""
    generator = np.random.default_rng(0)
    table = np.ones((400, 400), np.float32)
    while time.time() < stop:
        until = time.time() + generator.exponential(0.2)
        while time.time() < until:
            table @ table
        time.sleep(generator.exponential(0.2))


def verdicts(
    first: Path, second: Path, times: int, seconds: float
) -> tuple[Counter[str], list[float]]:
    """Return what was said of the second artifact, and its ratios to the first."""
    said, ratios = Counter[str](), []
    settings = Settings(loads=((1, 128),), threads=1, seconds=seconds)
    for _ in range(times):
        noise = multiprocessing.Process(target=other_work, args=(time.time() + 600,))
        noise.start()
        try:
            result = bench([first, second], settings)["artifacts"][1]["results"][0]
        finally:
            noise.kill()
            noise.join()
        said[result["verdict"]] += 1
        ratios.append(result["ratio"]["value"])
    return said, ratios


def allocator(folder: Path, *, device: str, threads: int) -> Predictor:
    """Return a predictor that allocates as many megabytes as its folder's name says."""
    del device, threads

    def predict(inputs: Arrays) -> Arrays:
        del inputs
        np.ones(int(folder.name) << 20, np.uint8)
        return {}

    return predict


def spinner(folder: Path, *, device: str, threads: int) -> Predictor:
    """Return a predictor that computes for as many milliseconds as its folder's name says."""
    del device, threads

    def predict(inputs: Arrays) -> Arrays:
        until = time.perf_counter() + int(folder.name) / 1e3
        while time.perf_counter() < until:
            pass
        return inputs

    return predict


def allocated(megabytes: int) -> float:
    """Return the peak that a worker reports for an allocation, as a share of it."""
    with Worker(f"{NAME}:allocator", Path(str(megabytes)), device="cpu", threads=1) as worker:
        before = worker.peak_rss_bytes()
        worker.hold(0, {"x": np.zeros(1)})
        worker.time(0, 1)
        return (worker.peak_rss_bytes() - before) / (megabytes << 20)


def parents_share() -> float:
    """Return the share of a core that the parent uses while two workers take turns."""
    from benchmarks import speed

    with (
        Worker(f"{NAME}:spinner", Path("10"), device="cpu", threads=1) as first,
        Worker(f"{NAME}:spinner", Path("10"), device="cpu", threads=1) as second,
    ):
        inputs = [{"x": np.zeros(1)}]
        before, start = psutil.Process().cpu_times(), time.monotonic()
        speed.compare({"A": first, "B": second}, inputs, rounds=100, seconds=60)
        after, passed = psutil.Process().cpu_times(), time.monotonic() - start
    return (after.user + after.system - before.user - before.system) / passed


def main() -> None:
    """Ask everything, and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    say = Console(highlight=False, soft_wrap=True).print
    held = np.ones(1 << 30, np.uint8)  # the parent's own memory must not count
    for megabytes in (64, 256, 1024):
        say(f"allocation of {megabytes} MB: read as {allocated(megabytes):.4f} of it")
    del held
    say(f"the parent uses {parents_share():.2%} of a core while workers take turns")
    say(f"{usable_cores()} cores, other work on one of them about half of the time")
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        places = {n: write_encoder(Path(folder, str(n)), n) for n in range(LAYERS - 1, LAYERS + 2)}
        cases = {
            "itself": places[LAYERS],
            "20 % more layers": places[LAYERS + 1],
            "20 % fewer layers": places[LAYERS - 1],
        }
        for name, second in cases.items():
            said, ratios = verdicts(places[LAYERS], second, options.times, options.seconds)
            near = sum(abs(ratio - 1) <= 0.05 for ratio in ratios)  # noqa: PLR2004 - as printed
            say(
                f"{name}: {json.dumps(said)}, ratios {min(ratios):.3f} to {max(ratios):.3f},"
                f" {near} of {len(ratios)} within 5 %"
            )


if __name__ == "__main__":
    main()
