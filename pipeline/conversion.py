"""A model folder becomes an engine without a recipe: nothing is measured, and nothing judged.

What `optimum-cli export tensorrt` does. A recipe does more; this is for who measures elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from benchmarks.accuracy import Track, silent
from exporters import onnx, tensorrt
from pipeline import sources
from pipeline.checkpoint import ModelError, from_pretrained
from pipeline.store import publish

TRACED = ((2, 12), (3, 7), (1, 16))
"""Batch and tokens of what is traced, and of what is compared with torch."""


def convert(
    source: str,
    folder: Path,
    *,
    batch: Sequence[int],
    sequence: Sequence[int],
    settings: tensorrt.Settings,
    track: Track = silent,
) -> dict[str, Any]:
    """Write the engine of a model, with the ONNX file that it is built from, and return `ENGINE`.

    Args:
        source: a folder, cut or not, or a hub id, of an encoder that reads tokens.
        folder: where it is written, as a whole or not at all.
        batch: of the profile: least, usual, largest.
        sequence: the same for tokens.
        settings: of the engine.
        track: shows progress.

    Raises:
        ModelError: there is no such model, or it generates or reads no tokens.
        ExportError: the engine cannot be built.
        MissingDependency, NotHere: this machine cannot build it.
    """
    model = from_pretrained(source)
    if model.can_generate() or model.main_input_name != "input_ids":
        raise ModelError(f"{source}: found {type(model).__name__}, expected an encoder of text")
    tokenizer = sources.processor(source, "AutoTokenizer", None)
    samples = [_inputs(model, tokenizer.model_input_names, *shape) for shape in TRACED]
    axes = {"batch": _three(batch, "batch"), "sequence": _three(sequence, "sequence")}
    places = getattr(model.config, "max_position_embeddings", None)
    if places is not None and sequence[-1] > places:
        raise ModelError(
            f"--sequence: found {sequence[-1]} tokens, expected at most {places}, the positions of"
            f" {source}"
        )
    told: dict[str, Any] = {}

    def make(target: Path) -> None:
        path = target / onnx.MODEL
        path.parent.mkdir()
        onnx.export(model, samples, axes=tuple(axes), path=path, fuse_for=None)
        shapes = tensorrt.profile(path, axes)
        told.update(tensorrt.build(path, target, shapes, settings, track))
        model.config.save_pretrained(target)
        tokenizer.save_pretrained(target)

    about = {"source": sources.identity(source, None), "verdict": {"outcome": "not measured"}}
    publish(make, folder, about)
    return told


def _inputs(model: PreTrainedModel, names: Sequence[str], rows: int, length: int) -> dict[str, Any]:
    shape, generator = (rows, length), np.random.default_rng(length)
    made = {
        "input_ids": generator.integers(0, model.config.vocab_size, shape),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
    }
    return {name: array for name, array in made.items() if name in names}


def _three(sizes: Sequence[int], what: str) -> tuple[int, int, int]:
    least, usual, largest = sizes
    if not 1 <= least <= usual <= largest:
        raise ModelError(f"--{what}: found {[*sizes]}, expected three rising numbers from 1 on")
    return least, usual, largest
