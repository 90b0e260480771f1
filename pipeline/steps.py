"""What each step does: an artifact in, an entry of the store out.

A step's key holds all that its result depends on; its `make` is run only if the store has no such
entry. The untouched model is the first artifact, made as if by a step. To prune and to train have a
file of their own, schedules.py.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel, set_seed

from benchmarks import metrics
from benchmarks.accuracy import BATCH, evaluate, once
from benchmarks.data import DataError
from benchmarks.examples import Arrays, collate
from benchmarks.outcomes import Outcomes, fidelity
from benchmarks.worker import InProcess
from exporters import onnx, tensorrt
from pipeline import bnb, calibration, checkpoint, gptq, mixed, parts, quantization
from pipeline.checkpoint import ModelError
from pipeline.manifest import MANIFEST
from pipeline.recipe import ORIGINAL
from pipeline.settings import Export, Finetune, Quantize, trained
from pipeline.store import Entry
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
        if work.task.regression and not work.has_head:
            options["num_labels"] = 1
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
        "model": work.identity,
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

    It is fused for the target's provider, or else of `standard` operators alone. Weights of
    bitsandbytes are carried over as they are.
    """
    if before.format == "onnx":
        return before.entry
    fuse_for = None if standard else work.recipe.target.device

    def make(folder: Path) -> dict[str, Any]:
        model = checkpoint.from_pretrained(before.entry.folder)
        held = bnb.plain(model)
        path = folder / onnx.MODEL
        path.parent.mkdir()
        details: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="secateur-") as beside:
            plain = Path(beside, path.name) if held else path
            export = partial(
                onnx.export,
                model,
                work.samples(),
                axes=work.task.axes,
                path=plain,
                fuse_for=fuse_for,
            )
            details["difference_to_torch"] = once(work.track, "exporting", export)
            if held:
                carried = bnb.carry_over(onnx.files(plain), path.parent, held)
                details["quantized_nodes"] = carried
        _copy_around(before.entry.folder, folder)
        details["bytes_by_part"] = _bytes_by_part(folder, model)
        return _known(before) | {"details": details}

    key = {"input": before.entry.digest, "export": "onnx", "fused_for": fuse_for}
    return work.make("onnx", key, make)


def engine(work: Work, step: Export, before: Artifact) -> tuple[Entry, Entry]:
    """Return the artifact as a TensorRT engine, and the ONNX file that it is built from.

    Its profile holds the target's loads and the batches of the evaluation.
    """
    source = export(work, before, standard=True)
    settings = engine_settings(step)
    library, here = tensorrt.available(settings), tensorrt.gpu()
    axes = _axes(work)

    def make(folder: Path) -> dict[str, Any]:
        shutil.copytree(source.folder / onnx.MODEL.parent, folder / onnx.MODEL.parent)
        shapes = tensorrt.profile(folder / onnx.MODEL, axes)
        start = time.monotonic()
        about = tensorrt.build(folder / onnx.MODEL, folder, shapes, settings, work.track)
        build_seconds = time.monotonic() - start
        _copy_around(source.folder, folder)
        described = {key: about[key] for key in ("library", "built_on", "profile", "precisions")}
        return _known(before) | {"details": described | {"build_seconds": build_seconds}}

    key = {
        "input": source.digest,
        "export": "tensorrt",
        "settings": asdict(settings) | {"timing_cache": None},
        "axes": axes,
        "library": [library.__name__, library.__version__],
        "gpu": asdict(here) if here else None,
    }
    return work.make("tensorrt", key, make), source


def engine_settings(step: Export) -> tensorrt.Settings:
    """Return how the step's engine is built."""
    return tensorrt.Settings(**step.model_dump(exclude={"step", "format"}))


def _axes(work: Work) -> dict[str, tuple[int, int, int]]:
    """Return the least, the usual and the largest size of every dynamic axis.

    Usual is the largest load.
    """
    loads = work.recipe.target.loads
    largest = max(loads, key=lambda load: load.batch * load.sequence)
    axes = {"batch": (1, largest.batch, max(BATCH, *(load.batch for load in loads)))}
    if "sequence" in work.task.axes:
        longest = max(work.recipe.task.max_length, *(load.sequence for load in loads))
        axes["sequence"] = (1, largest.sequence, longest)
    return axes


def quantize(work: Work, step: Quantize, before: Artifact) -> Entry:
    """Return the artifact as quantized ONNX."""
    source = export(work, before, standard=step.standard)
    integer = quantization.METHODS[step.method].integer
    reduce_range = step.reduces_range(work.machine)
    options = quantization.Options(
        **step.options, reduce_range=reduce_range, calibration=partial(_calibration, work)
    )

    def make(folder: Path) -> dict[str, Any]:
        path = folder / onnx.MODEL
        path.parent.mkdir()
        details: dict[str, Any] = {"reduce_range": reduce_range} if integer else {}
        chosen = options
        if step.allowed is not None:
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
        "selection": [work.metric, work.evidence("selection")] if step.allowed else None,
    }
    return work.make("quantize", key, make)


def quantize_in_torch(work: Work, step: Quantize, before: Artifact) -> Entry:
    """Return the artifact in a format of bitsandbytes or of GPTQ, still a torch artifact.

    It is quantized on the CPU, so that the codes are the same whatever the target is.
    """

    def make(folder: Path) -> dict[str, Any]:
        whole = checkpoint.without_weights(before.entry.folder, work.task.auto_class)
        known = parts.places(whole)  # of what is quantized, nobody knows what could be cut
        _copy_around(before.entry.folder, folder)

        def write() -> dict[str, int]:
            load = partial(checkpoint.from_pretrained, before.entry.folder)
            if step.ends_the_chain:
                return gptq.quantize(load(), folder, _calibration(work), step.block_size)
            asked = bnb.configuration(step.method, whole)
            model = load(quantization_config=asked, device_map={"": "cpu"})
            checkpoint.save_pretrained(model, folder)
            return {"quantized_layers": bnb.count(model, step.method)}

        details: dict[str, Any] = dict(once(work.track, "quantizing", write))
        tensors = sorted(folder.glob("*.safetensors"))
        details["bytes_by_part"] = parts.bytes_of_tensors(tensors, known)
        return _known(before) | {"details": details}

    key = {
        "step": step.model_dump(mode="json"),
        "input": before.entry.digest,
        "data": work.evidence("calibration") if step.calibrated else None,
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
    assert step.allowed is not None
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
        lost = metrics.lost(work.metric, reference, metrics.score(work.metric, after.columns))
        kl_mean = fidelity(before, after, None).kl_mean
        return mixed.Loss(lost, lost if kl_mean is None else kl_mean)

    try:
        return mixed.leave_out(list(layers), measure, step.allowed, work.track)
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
