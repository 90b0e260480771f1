"""Text from an exported folder: greedy generation in ONNX Runtime, see `greedy`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.onnx.greedy import decoder_inputs, greedy_search, rules, start
from exporters.onnx.session import MODEL, Arrays, files, predictor


def open_generator(folder: Path, *, device: str, threads: int) -> Callable[..., NDArray[Any]]:
    """Return a function that generates with the artifact in `folder`.

    It is called with what the tokenizer gives, as arrays, and `max_new_tokens`, and returns what
    torch's `generate` does: `(B, P + L)` token ids with the prompts in front, which are padded on
    the left, or of an encoder-decoder `(B, 1 + L)` with the start token in front. A row ends with
    an end-of-sequence token and is padded behind it; generation ends when all rows have ended.

    Raises:
        ExportError: there is no model in the folder that ONNX Runtime opens.
        MissingDependency: onnxruntime is not installed.
        NotHere: the device is not there.
        ValueError: there are no rules, or some that are not known here.
    """
    found = rules(folder)
    *encoders, decode = (
        predictor(p, device=device, threads=threads) for p in files(folder / MODEL)
    )
    first = start(folder, found) if encoders else None

    def generate(inputs: Arrays, *, max_new_tokens: int) -> NDArray[Any]:
        given = {name: np.asarray(array, np.int64) for name, array in inputs.items()}
        if encoders:
            given["decoder_input_ids"] = np.full((len(given["input_ids"]), 1), first)
            given = decoder_inputs(encoders[0], given)
        else:
            given.setdefault("attention_mask", np.ones_like(given["input_ids"]))
            if not given["attention_mask"][:, -1].all():
                raise ValueError(
                    "attention_mask: found prompts with padding behind them, expected it in front;"
                    " give the tokenizer padding_side='left'"
                )
        return greedy_search(decode, given, found, max_new_tokens)

    return generate
