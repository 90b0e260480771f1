"""What each step does: an artifact in, an entry of the store out.

A step's key holds all that its result depends on; its `make` is run only if the store has no such
entry. The untouched model is the first artifact, made as if by a step. To prune and to train have a
file of their own, schedules.py.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel, set_seed

from benchmarks import metrics
from benchmarks.accuracy import Outcomes, evaluate, fidelity, once
from benchmarks.data import DataError
from benchmarks.tasks import Arrays, collate
from benchmarks.worker import InProcess
from exporters import onnx
from pipeline import calibration, checkpoint, mixed, parts, quantization, sources
from pipeline.checkpoint import ModelError
from pipeline.recipe import ORIGINAL
from pipeline.settings import Finetune, Quantize, trained
from pipeline.store import MANIFEST, Entry
from pipeline.weight_only import ASYMMETRIC
from pipeline.work import Artifact, Work

FEWEST_WINDOWS: Final = 32
"""The fewest windows from which the ranges of activations are taken."""


def original(work: Work) -> Artifact:
    """Return the untouched model, checked; a head that it lacks is new, and random."""
    recipe = work.recipe
    trained_first = any(isinstance(step, Finetune) for step in recipe.steps[: recipe.baseline_at])

    def make(folder: Path) -> dict[str, Any]:
        set_seed(recipe.seed)  # a new head is random
        options: dict[str, Any] = {
            "dtype": torch.float32,
            "revision": recipe.model.revision or "main",
        }
        if work.labels and (recipe.task.labels or not work.has_head):
            options["id2label"] = dict(enumerate(work.labels))
            options["label2id"] = {name: at for at, name in enumerate(work.labels)}
        model, missing = checkpoint.load(work.source, work.task.auto_class, **options)
        if missing and work.has_head:
            raise ModelError(
                f"{recipe.model.source}: found no {', '.join(missing[:3])}, expected every tensor"
                f" of {type(model).__name__}; the files are damaged"
            )
        _check_vocabulary(work, model)
        if getattr(model.config, "pad_token_id", None) is None and "sequence" in work.task.axes:
            model.config.pad_token_id = work.padding["input_ids"]
        return work.write(model, folder, {})

    if not work.has_head and not trained_first:
        kind = (work.config.architectures or ["no class"])[0]
        raise ModelError(
            f"{recipe.model.source}: found {kind}, expected a model trained for"
            f" {recipe.task.kind}; begin with a finetune step and name it under `baseline`"
        )
    taught = [trained(step) for step in recipe.steps]
    if not work.has_head and any(t is not None and t.teacher == ORIGINAL for t in taught):
        raise ModelError(
            f"{recipe.model.source}: found the teacher {ORIGINAL!r}, whose head for"
            f" {recipe.task.kind} is random, expected a stage that was trained"
        )
    key = {
        "model": sources.identity(work.source, recipe.model.revision),
        "kind": recipe.task.kind,
        "labels": work.labels,
        "seed": None if work.has_head else recipe.seed,
    }
    return Artifact(ORIGINAL, None, "torch", work.make(ORIGINAL, key, make))


def _check_vocabulary(work: Work, model: PreTrainedModel) -> None:
    if "sequence" not in work.task.axes:
        return
    largest = max(
        int(window.inputs["input_ids"].max())
        for example in work.examples("gate")
        for window in example.windows
    )
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    if largest >= rows:
        raise ModelError(
            f"{work.recipe.model.source}: found token {largest}, expected less than {rows}, the"
            " rows of the embedding table; the tokenizer is another model's"
        )


def export(work: Work, before: Artifact, *, standard: bool = False) -> Entry:
    """Return the artifact as ONNX, one that is ONNX as it is.

    It is fused for the target's provider, or else of `standard` operators alone.
    """
    if before.format == "onnx":
        return before.entry
    fuse_for = None if standard else work.recipe.target.device

    def make(folder: Path) -> dict[str, Any]:
        model = checkpoint.from_pretrained(before.entry.folder)
        (folder / onnx.MODEL).parent.mkdir()
        export = partial(
            onnx.export,
            model,
            work.samples(),
            axes=work.task.axes,
            path=folder / onnx.MODEL,
            fuse_for=fuse_for,
        )
        difference = once(work.track, "exporting", export)
        _copy_around(before.entry.folder, folder)
        details = {
            "difference_to_torch": difference,
            "bytes_by_part": _bytes_by_part(folder, model),
        }
        return _known(before) | {"details": details}

    key = {"input": before.entry.digest, "export": "onnx", "fused_for": fuse_for}
    return work.make("onnx", key, make)


def quantize(work: Work, step: Quantize, before: Artifact) -> Entry:
    """Return the artifact as quantized ONNX."""
    source = export(work, before, standard=step.standard)
    integer = quantization.METHODS[step.method].integer
    # What is portable is for another runtime than the one here.
    reduce_range = integer and work.machine.saturates and not step.portable
    options = quantization.Options(
        **step.model_dump(exclude={"step", "method", "max_drop", "symmetric"}),
        symmetric=step.algorithm not in ASYMMETRIC if step.symmetric is None else step.symmetric,
        reduce_range=reduce_range,
        calibration=partial(_calibration, work),
    )

    def make(folder: Path) -> dict[str, Any]:
        path = folder / onnx.MODEL
        path.parent.mkdir()
        details: dict[str, Any] = {"reduce_range": reduce_range} if integer else {}
        chosen = options
        if step.max_drop is not None:
            layers = quantization.layers(source.folder / onnx.MODEL, step.method, options)
            left, divergences = _leave_out(work, step, options, source.folder / onnx.MODEL, layers)
            details |= {"left": left, "divergences": divergences}
            chosen = replace(options, left=frozenset(n for name in left for n in layers[name]))
        quantize = partial(
            quantization.quantize_all, source.folder / onnx.MODEL, path, step.method, chosen
        )
        details["quantized_nodes"] = once(work.track, "quantizing", quantize)
        _copy_around(source.folder, folder)
        model = checkpoint.without_weights(source.folder, work.task.auto_class)
        details["bytes_by_part"] = _bytes_by_part(folder, model)
        return _known(before) | {"details": details}

    key = {
        "step": step.model_dump(mode="json"),
        "input": source.digest,
        "reduce_range": reduce_range,
        "data": work.evidence("calibration") if step.calibrated else None,
        "selection": [work.metric, work.evidence("selection")] if step.max_drop else None,
    }
    return work.make("quantize", key, make)


def _bytes_by_part(folder: Path, model: PreTrainedModel) -> dict[str, int]:
    """Return the bytes of an artifact's graphs by part."""
    found = [parts.bytes_of_graph(path, model) for path in onnx.files(folder / onnx.MODEL)]
    return {part: sum(each[part] for each in found) for part in parts.PARTS}


def _leave_out(
    work: Work,
    step: Quantize,
    options: quantization.Options,
    source: Path,
    layers: Mapping[str, Sequence[str]],
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Return the layers to leave as they are, and what each does if it is quantized alone."""
    assert step.max_drop is not None
    examples = work.examples("selection")

    def outcomes(path: Path) -> Outcomes:
        worker = InProcess(onnx.predictor(path, device="cpu", threads=work.threads))
        return evaluate(worker, work.task, examples, work.padding)

    before = outcomes(source)
    reference = metrics.score(work.metric, before.columns)

    def measure(left: frozenset[str]) -> mixed.Loss:
        nodes = frozenset(node for name in left for node in layers[name])
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            path = Path(folder, onnx.MODEL.name)
            quantization.quantize(source, path, step.method, replace(options, left=nodes))
            after = outcomes(path)
        lost = reference - metrics.score(work.metric, after.columns)
        kl_mean = fidelity(before, after, None).kl_mean
        return mixed.Loss(lost, lost if kl_mean is None else kl_mean)

    try:
        return mixed.leave_out(list(layers), measure, step.max_drop, work.track)
    except mixed.OutOfReach as error:
        raise quantization.QuantizationError(str(error)) from error


def _calibration(work: Work) -> Iterator[Arrays]:
    """Yield the inputs of the calibration split, those of one length in a batch.

    So none is padded: what stands at padding counts in no output, but would in the ranges.
    """
    windows = [w.inputs for example in work.examples("calibration") for w in example.windows]
    if len(windows) < FEWEST_WINDOWS:
        raise DataError(
            f"task.splits.calibration: found {len(windows)} windows, expected at least"
            f" {FEWEST_WINDOWS} to find the ranges of activations on"
        )

    def length(window: Arrays) -> tuple[int, ...]:
        return tuple(array.shape[-1] for array in window.values())

    for _, group in groupby(sorted(windows, key=length), key=length):
        alike = list(group)
        for start in range(0, len(alike), calibration.BATCH):
            yield collate(alike[start : start + calibration.BATCH], work.padding)


def _known(before: Artifact) -> dict[str, Any]:
    return {
        name: before.entry.about[name] for name in ("parameters", "heads", "neurons", "kept_heads")
    }


def _copy_around(source: Path, folder: Path) -> None:
    """Copy what lies around a model (config, tokenizer), but not the model."""
    for path in source.iterdir():
        weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != MANIFEST:
            shutil.copyfile(path, folder / path.name)
