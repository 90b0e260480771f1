"""What models cost on the target: milliseconds in its runtime, multiply-adds, parameters."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from transformers import PreTrainedModel

from benchmarks import speed
from exporters import onnx
from pipeline import checkpoint, counting, measuring, processes, quantization
from pipeline.costs import Variants
from pipeline.measuring import Bench, Target
from pipeline.settings import Quantize
from pipeline.work import Work


class Uncountable(ValueError):
    """A model's multiply-adds cannot be counted."""


BESIDE: Final = 5
"""So many models are timed beside the first one, in turns."""
ROUNDS: Final = 30
SECONDS: Final = 20.0


def bench(work: Work, split: str = "gate") -> Bench:
    """Return what measuring on the recipe's target needs, with the examples of a split."""
    target = work.recipe.target
    return Bench(
        store=work.store,
        target=Target(
            device=target.device,
            runtime=target.runtime,
            threads=work.threads,
            loads=tuple((load.batch, load.sequence) for load in target.loads),
            rounds=target.rounds,
            seconds=target.seconds,
        ),
        machine=work.machine,
        task=work.task,
        examples=work.examples(split),
        padding=work.padding,
        evidence=work.evidence(split),
        code=work.code,
        track=work.track,
    )


def parameters(models: Variants) -> dict[str, float]:
    """Return the number of parameters of each."""
    return {name: float(make().num_parameters()) for name, make in models.items()}


def multiply_adds(models: Variants, *, sequence: int) -> dict[str, float]:
    """Return the multiply-adds of one input of `sequence` tokens.

    Raises:
        Uncountable: they do not follow from the shapes of such a model.
    """
    try:
        return {name: counting.total(make(), sequence) for name, make in models.items()}
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise Uncountable(f"found a model that cannot be counted: {error}") from error


def latency_ms(
    models: Variants, *, work: Work, load: int, first: str, quantize: Quantize | None = None
) -> dict[str, float]:
    """Return the median latency of a load in the target's runtime, of models quantized by a step.

    The first model, whose artifact has the digest `first`, is timed again beside some of the others
    at a time, and theirs are put in proportion to it, so that a machine that changes its pace in
    between does no harm. As written for the runtime it is kept for the next prices.
    """
    target = bench(work)
    inputs = measuring.loads(target)[load : load + 1]
    with tempfile.TemporaryDirectory(prefix="secateur-") as root:
        reference, *others = models
        otherwise = Path(root, "reference")
        folders = {reference: _kept(work, models[reference], first, quantize, otherwise)}
        for at, name in enumerate(work.track(others, "exporting levels", len(others))):
            folders[name] = Path(root, str(at))
            _write(work, models[name](), folders[name], quantize)
        found: dict[str, float] = {}
        starts = range(0, len(others), BESIDE)
        for start in work.track(starts, "timing levels", len(starts)):
            names = [reference, *others[start : start + BESIDE]]
            with ExitStack() as stack:
                workers = {
                    name: stack.enter_context(measuring.open_worker(target, folders[name]))
                    for name in names
                }
                timed = speed.compare(workers, inputs, rounds=ROUNDS, seconds=SECONDS)
            medians = {name: float(np.median(np.concatenate(timed[name][0]))) for name in names}
            found.setdefault(reference, medians[reference])
            for name in names[1:]:
                found[name] = found[reference] * medians[name] / medians[reference]
    return found


def _kept(
    work: Work,
    model: Callable[[], PreTrainedModel],
    digest: str,
    quantize: Quantize | None,
    otherwise: Path,
) -> Path:
    """Return the folder of a model as written for the runtime, now or before."""

    def make(folder: Path) -> dict[str, Any]:
        _write(work, model(), folder, quantize)
        return {}

    if processes.count() > 1:  # they do not meet inside of what the first one makes
        make(otherwise)
        return otherwise
    target = work.recipe.target
    key: dict[str, Any] = {"input": digest, "runtime": [target.runtime, target.device]}
    if quantize is not None:
        key |= {"quantize": quantize.model_dump(mode="json")}
        key |= {"reduce_range": quantize.reduces_range(work.machine)}
    return work.make("reference", key, make).folder


def _write(work: Work, model: PreTrainedModel, folder: Path, quantize: Quantize | None) -> None:
    """Write a model as the target's runtime opens it."""
    if work.recipe.target.runtime == "torch":
        checkpoint.save_pretrained(model, folder)
        return
    (folder / onnx.MODEL).parent.mkdir(parents=True)
    write = partial(
        onnx.export,
        model,
        work.samples(),
        axes=work.task.axes,
        fuse_for=None if quantize and quantize.standard else work.recipe.target.device,
    )
    if quantize is None:
        write(path=folder / onnx.MODEL)
        return
    with tempfile.TemporaryDirectory(prefix="secateur-") as beside:
        plain = Path(beside, onnx.MODEL.name)
        write(path=plain)
        options = quantization.Options(
            **quantize.options, reduce_range=quantize.reduces_range(work.machine)
        )
        quantization.quantize_all(plain, folder / onnx.MODEL, quantize.method, options)
