"""Checkpoints in the format of GPTQ, made by optimum with GPTQModel; they end a chain.

A layer's matrices are quantized one after the other, each on what it is given once those before it
are quantized (Frantar et al. 2022, https://arxiv.org/abs/2210.17323). What comes out is the folder
that the ecosystem's servers know: 4-bit codes, and a scale for every group of inputs of an output.
Stock transformers opens it where nothing was cut; no exporter reads it.

The format packs 32 bits at a time, so that a matrix fits it only if its inputs and its outputs are
multiples of 32, and optimum takes a matrix only if it does so in every layer. What does not, as
after cuts to odd widths, stays in floating point, and the configuration says so.
"""

import math
import os
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.examples import Arrays
from exporters import MissingDependency
from exporters.onnx.graph import quiet
from pipeline.quantization import QuantizationError

METHOD: Final = "gptq"
BITS: Final = 4
PACKED: Final = 32
"""The inputs, and the outputs, of a matrix are a multiple of this."""


def require() -> None:
    """Raise MissingDependency if a library is not installed; to import them takes many seconds."""
    for name in ("optimum", "gptqmodel"):
        if find_spec(name) is None:
            raise MissingDependency(
                f"{name}: not installed; {METHOD} needs the extra: pip install -e '.[gptq]'"
            )


def library() -> ModuleType:
    """Return the module `optimum.gptq`.

    Raises:
        MissingDependency: it, or GPTQModel, which does its work, is not installed.
    """
    require()
    # Else a C++ compiler is looked for, and run for a minute, to pack the codes a little faster.
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    with quiet():
        return import_module("optimum.gptq")


def asked_for(config: Any) -> bool:
    """Return whether a model's quantization configuration, as read or as made, is the format's."""
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return bool(method == METHOD)


def quantize(
    model: PreTrainedModel, folder: Path, batches: Iterable[Arrays], block_size: int
) -> dict[str, int]:
    """Write the model in the format, and return how many matrices are quantized and are left.

    Args:
        model: in floating point, on the CPU; it is used up.
        folder: where config.json and the tensors go.
        batches: inputs without padding.
        block_size: inputs of an output that share a scale.

    Raises:
        MissingDependency: optimum or GPTQModel is not installed.
        QuantizationError: no matrix fits the format.
    """
    where, layers = _stack(model)
    names, left = chosen(where, layers, block_size)
    paths = [f"{where}.{at}.{name}" for at in range(len(layers)) for name in names]
    gptq = library()
    with quiet():
        quantizer = gptq.GPTQQuantizer(
            bits=BITS,
            group_size=block_size,
            dataset=[{k: torch.from_numpy(a) for k, a in batch.items()} for batch in batches],
            block_name_to_quantize=where,
            modules_in_block_to_quantize=[[name] for name in names],
        )
        quantizer.quantize_model(model)
        # The library reads names as endings, and `output.dense` is the ending of two in BERT; the
        # name of the stack it leaves out, and of the format it tells the one that `save` changes.
        quantizer.modules_in_block_to_quantize = [paths] if left else None
        quantizer.dataset = None
        told = quantizer.to_dict() | {"block_name_to_quantize": where, "format": "gptq"}
        setattr(model.config, "quantization_config", told)  # noqa: B010 - not declared
        quantizer.save(model, folder)
    return {"quantized_layers": len(paths), "left_layers": left}


def chosen(where: str, layers: nn.ModuleList, block_size: int) -> tuple[list[str], int]:
    """Return the names of the matrices that fit the format in every layer, in their order.

    And how many matrices of all layers are left.

    Raises:
        QuantizationError: none fits.
    """
    fitting = [_fitting(layer, block_size) for layer in layers]
    names = [name for name in fitting[0] if all(fits.get(name) for fits in fitting)]
    if not names:
        raise QuantizationError(
            f"{METHOD}: found no matrix in {where} whose inputs and outputs are multiples of"
            f" {PACKED}, and its inputs of block_size {block_size}, in every layer, expected one at"
            f" least; cut neurons to multiples of {math.lcm(PACKED, block_size)}, or take a smaller"
            " block size"
        )
    return names, sum(map(len, fitting)) - len(names) * len(layers)


def _stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the model's layers and their path: of its lists of modules, the largest."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not lists:
        raise QuantizationError(
            f"{METHOD}: found no list of layers in {type(model).__name__}, expected one"
        )
    return max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _fitting(layer: nn.Module, block_size: int) -> dict[str, bool]:
    """Return the names of a layer's matrices, in their order, and whether each fits the format."""
    found = {}
    for name, module in layer.named_modules():
        if type(module) is nn.Linear or isinstance(module, Conv1D):
            first, last = module.weight.shape
            inputs, outputs = (last, first) if type(module) is nn.Linear else (first, last)
            found[name] = not (inputs % PACKED or outputs % PACKED or inputs % block_size)
    return found
