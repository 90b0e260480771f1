"""Models larger than memory: weights in 4 bits by GPTQ, block by block.

From safetensors to a folder of the format that gptq.py writes with optimum and GPTQModel, which is
what opens it; to write it takes neither. Memory holds one block in fp32, the second moments of what
each of its matrices reads, and three times the widest of them. They are those of the model as it
lies in the files, so that one pass over the blocks does: what GPTQModel makes up for, and this does
not, is what the matrices before have lost.

K inputs, N outputs, G groups of inputs that share a scale.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPTQConfig
from transformers.pytorch_utils import Conv1D

from benchmarks.accuracy import Track, silent
from pipeline import blocks, checkpoint, gptq, tensors, weight_only
from pipeline.blocks import Blocks, Keeping, return_what_is_freed, write_around
from pipeline.calibration import Batch, Moments
from pipeline.checkpoint import ModelError
from pipeline.quantization import QuantizationError
from pipeline.store import publish

IN_A_WORD: Final = 8
"""Codes of 4 bits in an integer of 32, the first in its lowest bits."""


def quantize_by_blocks(
    source: str | Path,
    folder: str | Path,
    *,
    data: Callable[[], Iterable[Batch]],
    block_size: int = 128,
    activations: Keeping = "disk",
    track: Track = silent,
) -> dict[str, int]:
    """Write a model with its matrices in 4 bits, without ever holding more than one of its blocks.

    All else stays in the type of the source. Returns how many matrices are quantized, and how many
    are left, since the format does not hold them.

    Args:
        source: a folder with a model.
        folder: a new one, written as a whole or not at all.
        data: gives the calibration batches, anew each time.
        block_size: inputs of an output that share a scale; there are no zero points.
        activations: where the states between blocks wait: on the `disk` of `folder`, or in memory.
        track: shows progress.

    Raises:
        FloatingPointError: an activation is not finite.
        ModelError: there is no such model, it does not go block by block, no matrix of it fits the
            format, or nothing opens it in this format; `folder` is there already.
        ValueError: there are too few calibration windows.
    """
    source, folder = Path(source), Path(folder)
    if folder.exists():
        raise ModelError(f"{folder}: there already, expected a new folder")
    return_what_is_freed()
    this = blocks.open_blocks(source)
    try:
        names, left = gptq.chosen(this.path, this.layers, block_size)
    except QuantizationError as error:
        raise ModelError(f"{source}: {error}") from error
    paths = [f"{this.name(at)}.{name}" for at in range(len(this.layers)) for name in names]
    if any(isinstance(this.model.get_submodule(path), Conv1D) for path in paths):
        raise ModelError(
            f"{source}: found {type(this.model).__name__}, whose matrices transformers does not"
            " open in this format; use a recipe with int4-weights"
        )
    about = _about(this, block_size, paths if left else None)

    def readers(path: str) -> dict[str, Any]:
        return {name: this.model.get_submodule(f"{path}.{name}") for name in names}

    def make(unfinished: Path) -> None:
        states = unfinished / ".activations"
        kept = states if activations == "disk" else None
        walk = blocks.walk(
            this, readers, data, kept, what="quantizing, block by block", track=track
        )
        copied = dict(this.saved)
        with tensors.Writer(unfinished, _layout(this, paths, block_size)) as writer:
            for path, seen in walk:
                for name, module in readers(path).items():
                    stem = copied.pop(f"{path}.{name}.weight").removesuffix("weight")
                    gram, matrix = _gram(seen.pop(name)), module.weight.detach().numpy().T
                    for part, tensor in _quantized(matrix, gram, block_size).items():
                        writer.write(stem + part, [tensor.reshape(-1)])
            for name, written in copied.items():
                writer.write(written, tensors.chunks(this.places[name]))
        rmtree(states, ignore_errors=True)
        planned: Any = checkpoint.without_weights(source)
        planned.config.quantization_config = about
        write_around(source, planned, unfinished)
        text = json.dumps(about, indent=2, default=str) + "\n"
        (unfinished / "quantize_config.json").write_text(text, encoding="utf-8")

    publish(make, folder, {"source": str(source), "step": "quantize"})
    return {"quantized_layers": len(paths), "left_layers": left}


def _about(this: Blocks, block_size: int, paths: list[str] | None) -> dict[str, Any]:
    """Return what the format's readers are told; `paths` are the matrices, if others are left."""
    about: dict[str, Any] = GPTQConfig(
        bits=gptq.BITS,
        group_size=block_size,
        damp_percent=weight_only.DAMPING,
        act_group_aware=False,
        true_sequential=False,
        block_name_to_quantize=this.path,
    ).to_dict()
    # Given to the constructor, they would make it look for optimum, which is not needed here.
    about["modules_in_block_to_quantize"] = paths and [paths]
    return about


def _layout(this: Blocks, paths: Iterable[str], block_size: int) -> dict[str, Tensor]:
    """Return shapes and types of all that is written, by the names in the files."""
    found = {
        written: torch.empty(place.shape, dtype=place.dtype, device="meta")
        for name, written in this.saved.items()
        for place in [this.places[name]]
    }
    for path in paths:
        name = this.saved[f"{path}.weight"]
        del found[name]
        outputs, inputs = this.places[f"{path}.weight"].shape
        groups = inputs // block_size
        shapes = {
            "qweight": ((inputs // IN_A_WORD, outputs), torch.int32),
            "qzeros": ((groups, outputs // IN_A_WORD), torch.int32),
            "scales": ((groups, outputs), torch.float16),
            "g_idx": ((inputs,), torch.int32),
        }
        for part, (shape, dtype) in shapes.items():
            stem = name.removesuffix("weight")
            found[stem + part] = torch.empty(shape, dtype=dtype, device="meta")
    return found


def _gram(seen: Moments) -> NDArray[np.float64]:
    """Return the second moments `(K, K)` over all windows, without the 1 behind the inputs."""
    gram: NDArray[np.float64] = (seen.fit + seen.held_out)[:-1, :-1].numpy()
    return gram


def _quantized(
    matrix: NDArray[np.float32], gram: NDArray[np.float64], block_size: int
) -> dict[str, Tensor]:
    """Return the format's tensors of a matrix `(K, N)`, by the second moments of its inputs.

    `qweight` `(K/8, N)`, `qzeros` `(G, N/8)`, `scales` `(G, N)`, `g_idx` `(K,)`. Zero points are
    stored less one (https://github.com/AutoGPTQ/AutoGPTQ, qlinear_cuda.py).
    """
    codes, scales, zeros = weight_only.gptq(matrix, gram, block_size, symmetric=True)
    return {
        "qweight": torch.from_numpy(_packed(codes)),
        "qzeros": torch.from_numpy(_packed(zeros.T - 1).T.copy()),
        "scales": torch.from_numpy(scales.astype(np.float16)),
        "g_idx": torch.arange(len(matrix), dtype=torch.int32) // block_size,
    }


def _packed(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return codes `(8 R, C)` as words `(R, C)`."""
    parts = codes.reshape(-1, IN_A_WORD, codes.shape[1]).astype(np.uint32)
    shifts = np.arange(IN_A_WORD, dtype=np.uint32)[:, None] * gptq.BITS
    return np.bitwise_or.reduce(parts << shifts, axis=1).view(np.int32)
