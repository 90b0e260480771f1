"""How the cost of compressing grows with a model's depth and width: seconds, and peak memory.

    python -m benchmarks.cost_of_growth [--layers 4] [--width 128] [--rounds 3]

Random BERTs of 1, 2 and 4 times the depth and the width, on 128 examples of 128 tokens: scoring all
heads and neurons; second moments and the least-squares repair of half of them; a candidate of the
search to a goal; export to ONNX. Each model and task has a process of its own, which has done the
task once before on a model of one layer; the models of a task take turns. Prints Markdown: medians,
by how much the peak of resident memory rose above what was there with the model loaded, and the
exponents: log2 of what twice as much of the model costs more, 1 = linear.

With twice the width a matrix has 4 times the weights, and the repair solves for all of them from
the products of all pairs of inputs: 4 times the memory, and 8 times the operations.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from benchmarks.memory import peak_rss_bytes

T = TypeVar("T")
TIMES: Final = (1, 2, 4)
EXAMPLES: Final = 128
TOKENS: Final = 128
BATCH: Final = 16
HEAD: Final = 32
"""The width of a head."""
STEPS: Final = 16
"""So many candidates a search has."""


def build(layers: int, width: int) -> Any:
    """Return a random model."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        intermediate_size=4 * width,
        vocab_size=1000,
    )
    return BertForSequenceClassification(config).eval()


def batches(examples: int) -> list[dict[str, Any]]:
    """Return random tokens with labels."""
    import torch

    tokens = torch.randint(0, 1000, (examples // BATCH, BATCH, TOKENS))
    ones = torch.ones(BATCH, TOKENS, dtype=torch.long)
    labels = torch.arange(BATCH) % 2
    return [{"input_ids": each, "attention_mask": ones, "labels": labels} for each in tokens]


def seconds(act: Callable[[], object]) -> float:
    """Return how long it takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def scoring(model: Any, examples: int) -> float:
    """Return the seconds of one forward and backward pass for all units."""
    from pipeline import structure
    from pipeline.calibration import mask_gradients

    groups = structure.groups(model)
    readers = {group.path: group.reader for group in groups}
    counts = {group.path: len(group.kept) for group in groups}
    data = batches(examples)
    return seconds(lambda: mask_gradients(model, readers, counts, data, total=len(data)))


def repair(model: Any, examples: int) -> float:
    """Return the seconds of moments, repair and cut; scores by magnitude take next to nothing."""
    from pipeline.pruning import choose_and_cut

    data = batches(examples)
    cut = partial(choose_and_cut, model, {"heads": 0.5, "neurons": 0.5}, criterion="magnitude")
    return seconds(lambda: cut(repair="least-squares", data=lambda: iter(data), total=len(data)))


def candidate(model: Any, examples: int) -> float:
    """Return the seconds of a step of the search: the knapsack, and a divergence.

    Levels are left unrepaired, and foretold from a batch: that is not what is timed here, though
    the peak of memory is that of all of it. Outputs are compared on a fifth of the examples, as in
    a recipe. Candidates that came before are not tried again, and not counted here.
    """
    from pipeline import goals, prices
    from pipeline.calibration import HELD_OUT_EVERY

    data = batches(examples)
    taken: list[float] = []

    def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
        del total
        for item in items:
            began = time.perf_counter()
            yield item
            if what.startswith("searching"):
                taken.append(time.perf_counter() - began)

    goals.reach(
        model,
        ["heads", "neurons"],
        lambda dense: 0.6 * dense,
        partial(prices.multiply_adds, sequence=TOKENS),
        criterion="magnitude",
        repair="none",
        searched=STEPS,
        data=lambda: iter(data[:1]),
        held_out=data[: math.ceil(len(data) / HELD_OUT_EVERY)],
        total=1,
        track=track,
    )
    return statistics.median(each for each in taken if each > max(taken) / 2)


def export(model: Any, examples: int) -> float:
    """Return the seconds of an export, with its check against torch on two small batches."""
    from exporters import onnx

    del examples
    given = {name: each[:2].numpy() for name, each in batches(BATCH)[0].items() if name != "labels"}
    shorter = {name: each[:1, :9] for name, each in given.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        axes = ("batch", "sequence")
        write = partial(onnx.export, model, [given, shorter], axes=axes, path=path)
        return seconds(lambda: write(fuse_for="cpu"))


TASKS: Final[dict[str, Callable[[Any, int], float]]] = {
    "scoring": scoring,
    "moments and repair": repair,
    "a candidate": candidate,
    "export": export,
}


def work(task: str, layers: int, width: int) -> None:
    """Do a task whenever a line comes in; print seconds and bytes as JSON."""
    import torch

    torch.manual_seed(0)
    TASKS[task](build(1, HEAD), BATCH)  # imports, and what a first call sets up
    for _ in sys.stdin:
        model = build(layers, width)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak_rss_bytes()
        taken = TASKS[task](model, EXAMPLES)
        found = {"seconds": taken, "bytes": peak_rss_bytes() - before}
        print(json.dumps(found), flush=True)  # noqa: T201 - read by the process that started this
        del model


def measure(
    task: str, shapes: list[tuple[int, int]], rounds: int
) -> dict[tuple[int, int], tuple[float, float]]:
    """Return median seconds and the most bytes of a task by the model's layers and width."""
    found: dict[tuple[int, int], list[dict[str, float]]] = {shape: [] for shape in shapes}
    with ExitStack() as stack:
        children = {shape: stack.enter_context(_child(task, *shape)) for shape in shapes}
        for turn in range(rounds):
            for shape in reversed(shapes) if turn % 2 else shapes:
                found[shape].append(_ask(children[shape]))
    return {
        shape: (statistics.median(r["seconds"] for r in runs), max(r["bytes"] for r in runs))
        for shape, runs in found.items()
    }


def _child(task: str, layers: int, width: int) -> "subprocess.Popen[str]":
    """Start the process of one model and task; it ends when its input does."""
    command = [sys.executable, "-m", "benchmarks.cost_of_growth", "--work", task]
    command += ["--layers", str(layers), "--width", str(width)]
    return subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _ask(child: "subprocess.Popen[str]") -> dict[str, float]:
    ask, answer = child.stdin, child.stdout
    assert ask is not None
    assert answer is not None
    ask.write("\n")
    ask.flush()
    for line in answer:  # what libraries print is passed over
        if line.startswith("{"):
            found: dict[str, float] = json.loads(line)
            return found
    raise RuntimeError(f"{child.args!r}: found the end, expected an answer; see what it said above")


def tables(
    found: dict[str, dict[tuple[int, int], tuple[float, float]]], layers: int, width: int
) -> str:
    """Return two Markdown tables: what each model costs, and the exponents of growth."""
    depths = [(layers * times, width) for times in TIMES]
    widths = [(layers, width * times) for times in TIMES]
    lines = _head(["layers x width", *(f"{task}, s | MB" for task in found)])
    for shape in dict.fromkeys(depths + widths):
        cells = [f"{t[shape][0]:.3g} | {t[shape][1] / 1e6:.0f}" for t in found.values()]
        lines.append(_row([f"{shape[0]} x {shape[1]}", *cells]))
    lines += ["", *_head(["exponent", *(f"{task}, time | memory" for task in found)])]
    for what, shapes in (("depth", depths), ("width", widths)):
        for at in range(len(shapes) - 1):
            less, more = shapes[at], shapes[at + 1]
            cells = [
                " | ".join(_exponent(a, b) for a, b in zip(t[less], t[more], strict=True))
                for t in found.values()
            ]
            lines.append(_row([f"{what} {TIMES[at]} to {TIMES[at + 1]}", *cells]))
    return "\n".join(lines)


def _exponent(less: float, more: float) -> str:
    """Return log2 of the growth; a dash where nothing was to be seen."""
    return f"{math.log2(more / less):.2f}" if less > 0 and more > 0 else "-"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(cells: list[str]) -> list[str]:
    row = _row(cells)
    return [row, "|---" * (row.count("|") - 1) + "|"]


def main() -> None:
    """Measure one task after the other, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help=f"a multiple of {HEAD}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", choices=TASKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.layers, options.width)
        return
    shapes = [(options.layers * times, options.width) for times in TIMES]
    shapes += [(options.layers, options.width * times) for times in TIMES[1:]]
    found = {task: measure(task, shapes, options.rounds) for task in TASKS}
    print(tables(found, options.layers, options.width))  # noqa: T201


if __name__ == "__main__":
    main()
