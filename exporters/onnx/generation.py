"""Text from an exported folder: greedy generation in ONNX Runtime, see `greedy`."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.onnx.binding import keeping_cache
from exporters.onnx.greedy import Rules, decoder_inputs, greedy_search, rules, start
from exporters.onnx.session import MODEL, Arrays, files


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
    decode, given, found = _opened(folder, device, threads)

    def generate(inputs: Arrays, *, max_new_tokens: int) -> NDArray[Any]:
        return greedy_search(decode, given(inputs), found, max_new_tokens)

    return generate


def open_timed(folder: Path, *, device: str, threads: int) -> Callable[[Arrays], Arrays]:
    """Return a predictor that generates, and tells when.

    It takes prompts and `new_tokens`, how many each of them gets, whatever would end a text; it
    gives `token_ns` `(L,)`, the nanoseconds after which each was there. For errors see
    `open_generator`.
    """
    decode, given, found = _opened(folder, device, threads)
    endless = {name: rule for name, rule in found.items() if not name.endswith("eos_token_id")}

    def predict(inputs: Arrays) -> Arrays:
        stamps: list[int] = []

        def stamped(fed: Arrays) -> Arrays:
            outputs: Arrays = decode(fed)
            stamps.append(perf_counter_ns())
            return outputs

        start_ns = perf_counter_ns()
        greedy_search(stamped, given(inputs), endless, int(inputs["new_tokens"]))
        return {"token_ns": np.asarray(stamps) - start_ns}

    return predict


def _opened(
    folder: Path, device: str, threads: int
) -> tuple[Any, Callable[[Arrays], dict[str, NDArray[Any]]], Rules]:
    """Return the decoder's predictor, what makes its inputs of prompts, and the rules."""
    found = rules(folder)
    *encoders, decode = (
        keeping_cache(p, device=device, threads=threads) for p in files(folder / MODEL)
    )
    first = start(folder, found) if encoders else None

    def given(inputs: Arrays) -> dict[str, NDArray[Any]]:
        prompts = {name: np.asarray(array, np.int64) for name, array in inputs.items()}
        if encoders:
            prompts["decoder_input_ids"] = np.full((len(prompts["input_ids"]), 1), first)
            return decoder_inputs(encoders[0], prompts)
        prompts.setdefault("attention_mask", np.ones_like(prompts["input_ids"]))
        if not prompts["attention_mask"][:, -1].all():
            raise ValueError(
                "attention_mask: found prompts with padding behind them, expected it in front;"
                " give the tokenizer padding_side='left'"
            )
        return prompts

    return decode, given, found
