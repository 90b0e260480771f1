"""What it costs to score all heads and neurons, and to repair a layer.

    python -m benchmarks.cost_of_scores MODEL DATA [--examples 512]

DATA is a folder with train.csv(.gz) with the columns `sentence` and `label`. First, scoring (one
forward and one backward pass) is timed beside an epoch of training over the same examples, in
turns. Then a repair, least squares at four ridges, is timed by the width of the matrix, and a whole
cut by the depth and the width of a random model, with the peak of its memory over the model's.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final

import torch
from datasets import load_dataset
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.criteria_compared import batches
from benchmarks.memory import peak_rss_bytes
from pipeline import from_pretrained, sources, structure
from pipeline.calibration import Batch, Moments, mask_gradients
from pipeline.compensation import repair
from pipeline.pruning import choose_and_cut

ROUNDS: Final = 3
WIDTHS: Final = (384, 768, 1536, 3072)
SHAPES: Final = ((384, 6), (384, 12), (768, 6), (768, 12))


def seconds(act: Callable[[], object]) -> float:
    """Return how long it takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def scoring(model: str, folder: Path, examples: int) -> tuple[float, float, float]:
    """Return the seconds of scoring and of an epoch, and the ratio's median over the rounds."""
    files = {"train": str(next(folder.glob("train.csv*")))}
    rows = load_dataset("csv", data_files=files)["train"].shuffle(seed=0).select(range(examples))
    data: list[Batch] = list(batches(rows, sources.processor(model, "AutoTokenizer", None)))
    scored, trained = from_pretrained(model), from_pretrained(model)
    groups = structure.groups(scored)
    readers = {group.path: group.reader for group in groups}
    counts = {group.path: len(group.kept) for group in groups}
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6)

    def epoch() -> None:
        for batch in data:
            trained(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def score() -> None:
        mask_gradients(scored, readers, counts, data, total=len(data))

    epoch()  # the optimizer's moments are made
    times = [(seconds(score), seconds(epoch)) for _ in range(ROUNDS)]
    each = [median(of_one) for of_one in zip(*times, strict=True)]
    return each[0], each[1], median(a / b for a, b in times)


def repairing(width: int) -> float:
    """Return the seconds of the repair of a matrix that loses half of `width` inputs."""
    inputs = torch.randn(4 * width, width, dtype=torch.float64)
    gram = inputs.T @ inputs
    weight = torch.randn(768, width)
    return seconds(lambda: repair(weight, Moments(gram, gram), torch.arange(width // 2)))


def cut(width: int, depth: int) -> None:
    """Cut half of a random model, and print the seconds and the bytes over the model's own."""
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        vocab_size=1000,
    )
    model = BertForSequenceClassification(config).eval()
    tokens = torch.randint(0, 1000, (8, 16, 32))
    data = [{"input_ids": each, "labels": torch.zeros(16, dtype=torch.long)} for each in tokens]
    before = peak_rss_bytes()
    taken = seconds(
        lambda: choose_and_cut(
            model,
            {"heads": 0.5, "neurons": 0.5},
            criterion="importance",
            repair="least-squares",
            data=lambda: iter(data),
            total=len(data),
        )
    )
    print(taken, peak_rss_bytes() - before)  # noqa: T201 - read by the process that started this


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--cut", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cut:
        cut(*options.cut)
        return
    if options.model is None or options.data is None:
        parser.error("expected MODEL and DATA")
    console = Console()
    score, epoch, ratio = scoring(options.model, options.data, options.examples)
    console.print(
        f"{options.examples} examples: scoring {score:.1f} s, an epoch {epoch:.1f} s,"
        f" ratio {ratio:.2f}"
    )
    table = Table("inputs of a matrix", "seconds of its repair")
    for width in WIDTHS:
        table.add_row(str(width), f"{repairing(width):.2f}")
    console.print(table)
    table = Table("width", "layers", "seconds of a cut", "MB over the model")
    for width, depth in SHAPES:
        command = [
            sys.executable,
            "-m",
            "benchmarks.cost_of_scores",
            "--cut",
            str(width),
            str(depth),
        ]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()  # noqa: S603
        table.add_row(
            str(width), str(depth), f"{float(found[-2]):.1f}", f"{int(found[-1]) / 1e6:.0f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
