"""ONNX files, run by ONNX Runtime."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporters import ExportError
from exporters.onnx import graph
from exporters.onnx.binding import resident
from exporters.onnx.greedy import decoder_inputs, greedy_search
from exporters.onnx.session import (
    MODEL,
    PROVIDERS,
    Arrays,
    encoder_file,
    files,
    in_parts,
    open_predictor,
    positions,
    predictor,
    runtime,
)

__all__ = [
    "MODEL",
    "PROVIDERS",
    "decoder_inputs",
    "encoder_file",
    "export",
    "files",
    "generated",
    "open_predictor",
    "predictor",
    "resident",
    "runtime",
    "verify",
]

TOLERANCE: Final = 1e-3
"""Largest difference to torch, relative to the largest output, that an fp32 export may have."""
GENERATED: Final = 8
"""So many tokens are generated to see whether torch would have chosen them."""


def export(
    model: Any,
    samples: Sequence[Arrays],
    *,
    axes: Sequence[str] | Mapping[str, Sequence[str]],
    path: Path,
    fuse_for: graph.Provider | None,
) -> float:
    """Write the model to `path` and return its largest relative difference to torch.

    A model that generates takes and gives a cache, see `cached`; of an encoder-decoder, `path` is
    the decoder, and the encoder lies beside it.

    Args:
        model: a `PreTrainedModel` in evaluation mode, in fp32, on the CPU; if it does not generate,
            its configuration is told to use no cache.
        samples: batches of inputs; the first is traced, the outputs for the others are compared, so
            they should have other shapes.
        axes: the names of the leading axes of every input, or of each, all dynamic: `batch` and
            `sequence`.
        path: the file to write; its folder must be there.
        fuse_for: the provider whose own operators may be used; None keeps to the standard ones.

    Raises:
        ExportError: the outputs differ by more than `TOLERANCE`.
    """
    import torch

    traced = {name: torch.from_numpy(np.asarray(a)) for name, a in samples[0].items()}
    named = axes if isinstance(axes, Mapping) else dict.fromkeys(traced, axes)
    if not model.can_generate():
        for module in model.modules():
            if getattr(getattr(module, "config", None), "use_cache", False):
                module.config.use_cache = False
        graph.write(model, traced, axes=named, path=path, fuse_for=fuse_for)
    else:
        from exporters.onnx import cached

        if model.config.is_encoder_decoder:
            given = {k: a for k, a in traced.items() if not k.startswith("decoder_")}
            cached.write_encoder_decoder(model, given, named, path, fuse_for)
        else:
            cached.write_decoder(model, path, fuse_for)
    return verify(model, samples[1:] or samples, path)


def verify(model: Any, samples: Sequence[Arrays], path: Path) -> float:
    """Return the largest difference to torch over the samples, relative to the largest output.

    A decoder is given its tokens in two parts, the second one with the cache of the first; then it
    generates, see `generated`.

    Raises:
        ExportError: it is more than `TOLERANCE`, or not a number.
    """
    run = _runner(model, path)
    worst = generated(model, samples[0], path) if model.can_generate() else 0.0
    for sample in samples:
        found = run(sample)
        outputs = _expected(model, sample)
        for name, array in found.items():
            expected = outputs[name]
            scale = max(float(np.abs(expected).max()), 1e-6)
            difference = float(np.abs(array - expected).max()) / scale
            if not difference <= TOLERANCE:
                shapes = {key: value.shape for key, value in sample.items()}
                raise ExportError(
                    f"{path.name}: output {name!r} differs from torch by {difference:.1e} of its"
                    f" largest value at {shapes}, expected at most {TOLERANCE:.0e}"
                )
            worst = max(worst, difference)
    return worst


def generated(model: Any, sample: Arrays, path: Path) -> float:
    """Return how far torch's logits of the tokens that are generated lie below its largest ones.

    Relative to the largest of all: 0 where torch would have chosen the same token. It is given all
    of them at once, without a cache, so that a tie cannot lead the two apart. Prompts are halves of
    the sample's rows, each with one token more of padding in front than the one before.

    Raises:
        ExportError: it is more than `TOLERANCE`, or not a number.
    """
    import torch

    options: dict[str, Any] = {"device": "cpu", "threads": torch.get_num_threads()}
    decode = predictor(path, **options)
    if model.config.is_encoder_decoder:
        whole = {k: v for k, v in sample.items() if not k.startswith("decoder_")}
        begun = {"decoder_input_ids": sample["decoder_input_ids"][:, :1]}
        given = decoder_inputs(predictor(encoder_file(path), **options), whole | begun)
        many = min(GENERATED, max(sample["decoder_input_ids"].shape[1] - 1, 1))
        tokens = greedy_search(decode, given, {}, many)
        logits = _expected(model, whole | {"decoder_input_ids": tokens})["logits"]
    else:
        rows, length = sample["input_ids"].shape
        half = max(length // 2, 1)
        padded = np.minimum(np.arange(rows), half - 1)
        mask = (np.arange(half)[None] >= padded[:, None]).astype(np.int64)
        given = {"input_ids": sample["input_ids"][:, :half], "attention_mask": mask}
        many = min(GENERATED, max(length - half, 1))
        tokens = greedy_search(decode, given, {}, many)
        mask = np.pad(mask, ((0, 0), (0, many)), constant_values=1)
        logits = _expected(model, {"input_ids": tokens, "attention_mask": mask})["logits"]
    logits, chosen = logits[:, -many - 1 : -1], tokens[:, -many:, None]
    below = logits.max(axis=-1) - np.take_along_axis(logits, chosen, axis=-1)[..., 0]
    worst = float(below.max() / max(np.abs(logits).max(), 1e-6))
    if not worst <= TOLERANCE:
        raise ExportError(
            f"{path.name}: generates tokens whose logits lie {worst:.1e} of the largest one below"
            f" torch's choice, expected at most {TOLERANCE:.0e}"
        )
    return worst


def _expected(model: Any, sample: Arrays) -> dict[str, Any]:
    """Return what torch gives for a sample."""
    import torch

    given = {k: torch.from_numpy(np.asarray(v)) for k, v in sample.items()}
    if model.can_generate() and not model.config.is_encoder_decoder:
        from exporters.onnx.cached import takes_positions

        if takes_positions(model):  # the graph takes them from the mask, torch does not
            given["position_ids"] = torch.from_numpy(positions(sample["attention_mask"]))
    with torch.inference_mode():
        outputs = model(**given)
    return {name: x.numpy() for name, x in outputs.items() if isinstance(x, torch.Tensor)}


def _runner(model: Any, path: Path) -> Callable[[Arrays], Arrays]:
    import torch

    options: dict[str, Any] = {"device": "cpu", "threads": torch.get_num_threads()}
    predict = predictor(path, **options)
    if not model.can_generate():
        return predict
    if not model.config.is_encoder_decoder:
        return lambda sample: in_parts(predict, sample, [sample["input_ids"].shape[1] // 2])
    encode = predictor(encoder_file(path), **options)

    def run(sample: Arrays) -> Arrays:
        tokens = sample["decoder_input_ids"]
        # It has no mask of its own: what pads its tokens stands behind them.
        return in_parts(predict, decoder_inputs(encode, sample), [tokens.shape[1] // 2])

    return run
