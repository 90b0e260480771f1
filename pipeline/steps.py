"""What each step does: an artifact in, an entry of the store out.

A step's key holds all that its result depends on; its `make` is run only if the store has no such
entry. The untouched model is the first artifact, made as if by a step. To prune and to train have a
file of their own, schedules.py.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from benchmarks.accuracy import once
from exporters import onnx
from pipeline import checkpoint, sources
from pipeline.checkpoint import ModelError
from pipeline.quantization import METHODS
from pipeline.recipe import ORIGINAL
from pipeline.settings import Finetune, Quantize, trained
from pipeline.store import MANIFEST, Entry
from pipeline.work import Artifact, Work


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


def export(work: Work, before: Artifact) -> Entry:
    """Return the artifact as ONNX, fused for the target's provider; one that is ONNX is done."""
    if before.format == "onnx":
        return before.entry

    def make(folder: Path) -> dict[str, Any]:
        model = checkpoint.from_pretrained(before.entry.folder)
        (folder / onnx.MODEL).parent.mkdir()
        export = partial(
            onnx.export,
            model,
            work.samples(),
            axes=work.task.axes,
            path=folder / onnx.MODEL,
            fuse_for=work.recipe.target.device,
        )
        difference = once(work.track, "exporting", export)
        _copy_around(before.entry.folder, folder)
        return _known(before) | {"details": {"difference_to_torch": difference}}

    key = {"input": before.entry.digest, "export": "onnx", "device": work.recipe.target.device}
    return work.make("onnx", key, make)


def quantize(work: Work, step: Quantize, before: Artifact) -> Entry:
    """Return the artifact as quantized ONNX."""
    source = export(work, before)

    def make(folder: Path) -> dict[str, Any]:
        (folder / onnx.MODEL).parent.mkdir()
        reduce_range = work.machine.saturates
        quantize = partial(
            METHODS[step.method],
            source.folder / onnx.MODEL,
            folder / onnx.MODEL,
            embeddings=step.embeddings,
            reduce_range=reduce_range,
        )
        count = once(work.track, "quantizing", quantize)
        _copy_around(source.folder, folder)
        details = {"integer_products": count, "reduce_range": reduce_range}
        return _known(before) | {"details": details}

    key = {
        "step": step.model_dump(mode="json"),
        "input": source.digest,
        "reduce_range": work.machine.saturates,
    }
    return work.make("quantize", key, make)


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
