"""Text from an exported folder: greedy generation in ONNX Runtime, without torch.

What torch's `generate(do_sample=False, num_beams=1)` gives for the same inputs, by the rules in the
folder's `generation_config.json` (`config.json` where there is none). There is no sampling and
there are no beams, whatever that file asks for.

B batch, P tokens of the prompts, L new tokens, V vocabulary.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from exporters import ExportError
from exporters.onnx.session import MODEL, Arrays, cache, decoder_inputs, files, predictor

Rules = Mapping[str, Any]
"""What a generation configuration says, by the library's names, without what is not set."""

FILES: Final = ("generation_config.json", "config.json")
REFUSED: Final[Mapping[str, Any]] = {
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "guidance_scale": 1.0,
    "sequence_bias": None,
    "stop_strings": None,
    "token_healing": False,
    "watermarking_config": None,
}
"""Rules that change what greedy generation gives and are not known here, but for these values."""


def open_generator(folder: Path, *, device: str, threads: int) -> Callable[..., NDArray[Any]]:
    """Return a function that generates with the artifact in `folder`.

    It is called with what the tokenizer gives, as arrays, and `max_new_tokens`, and returns what
    torch's `generate` does: `(B, P + L)` token ids with the prompts in front, which are padded on
    the left, or of an encoder-decoder `(B, 1 + L)` with the start token in front. A row ends with
    an end-of-sequence token and is padded behind it; generation ends when all rows have ended.

    Raises:
        ExportError: there is no model in the folder, or no rules, or some that are not known here.
        MissingDependency: onnxruntime is not installed.
        NotHere: the device is not there.
    """
    decode, given, found = _opened(folder, device, threads)

    def generate(inputs: Arrays, *, max_new_tokens: int) -> NDArray[Any]:
        return greedy(decode, given(inputs), found, max_new_tokens)

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

        start = perf_counter_ns()
        greedy(stamped, given(inputs), endless, int(inputs["new_tokens"]))
        return {"token_ns": np.asarray(stamps) - start}

    return predict


def _opened(
    folder: Path, device: str, threads: int
) -> tuple[Any, Callable[[Arrays], dict[str, NDArray[Any]]], Rules]:
    """Return the decoder's predictor, what makes its inputs of prompts, and the rules."""
    found = rules(folder)
    *encoders, decode = (
        predictor(p, device=device, threads=threads) for p in files(folder / MODEL)
    )
    start = found.get("decoder_start_token_id", found.get("bos_token_id"))
    if encoders and start is None:
        raise ExportError(
            f"{folder}: found no decoder_start_token_id, expected one, the token that a decoder"
            " begins with; name it in generation_config.json"
        )

    def given(inputs: Arrays) -> dict[str, NDArray[Any]]:
        prompts = {name: np.asarray(array, np.int64) for name, array in inputs.items()}
        if encoders:
            prompts["decoder_input_ids"] = np.full((len(prompts["input_ids"]), 1), start)
            return decoder_inputs(encoders[0], prompts)
        prompts.setdefault("attention_mask", np.ones_like(prompts["input_ids"]))
        if not prompts["attention_mask"][:, -1].all():
            raise ValueError(
                "attention_mask: found prompts with padding behind them, expected it in front;"
                " give the tokenizer padding_side='left'"
            )
        return prompts

    return decode, given, found


def rules(folder: Path) -> Rules:
    """Return the rules of the model in a folder.

    Raises:
        ExportError: there are none, or some that are not known here.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise ExportError(
            f"{folder}: found none of {FILES}, expected one; it says what ends a text"
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    found = {name: value for name, value in content.items() if value is not None}
    unknown = [name for name, plain in REFUSED.items() if found.get(name, plain) != plain]
    if any(len(words) > 1 for words in found.get("bad_words_ids", ())):
        unknown.append("bad_words_ids of several tokens")
    if unknown:
        raise ExportError(
            f"{path}: found {', '.join(unknown)}, expected no such rule for greedy generation;"
            " take it out, or generate with torch"
        )
    return found


def greedy(
    decode: Any, given: Mapping[str, NDArray[Any]], found: Rules, max_new_tokens: int
) -> NDArray[Any]:
    """Return the tokens that were given and the likeliest next ones `(B, P + L)`.

    Args:
        decode: a decoder's predictor.
        given: its inputs for the prompts; of a decoder without an encoder the mask too.
        found: the rules.
        max_new_tokens: L at most.

    Raises:
        ExportError: the model gives no cache.
        ValueError: `max_new_tokens` is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: found {max_new_tokens}, expected 1 or more")
    tokens, fed = given["input_ids"], dict(given)
    ends = _ids(found.get("eos_token_id"))
    pad = found.get("pad_token_id", ends[0] if ends else 0)
    unfinished = np.ones(len(tokens), bool)
    for step in range(max_new_tokens):
        outputs = decode(fed)
        if not cache(outputs):
            raise ExportError(
                f"found the outputs {sorted(outputs)}, expected a cache beside the logits; the"
                " model is none that generates"
            )
        shown = fed.get("attention_mask", np.ones_like(tokens)).astype(bool)
        last = step == max_new_tokens - 1
        scores = _scores(found, tokens, shown, outputs["logits"][:, -1], step=step, last=last)
        chosen = np.where(unfinished, scores.argmax(axis=-1), pad)
        tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
        unfinished &= ~np.isin(chosen, ends)
        if not unfinished.any():
            break
        fed |= cache(outputs) | {"input_ids": chosen[:, None]}
        if "attention_mask" in fed:
            fed["attention_mask"] = np.pad(
                fed["attention_mask"], ((0, 0), (0, 1)), constant_values=1
            )
    return tokens


def _scores(
    found: Rules,
    tokens: NDArray[Any],
    shown: NDArray[Any],
    logits: NDArray[Any],
    *,
    step: int,
    last: bool,
) -> NDArray[Any]:
    """Return the logits of the next token as the rules change them `(B, V)`.

    In the order of the library, whose `generation/logits_process.py` says what each rule means.

    Args:
        found: the rules.
        tokens: all tokens so far `(B, T)`.
        shown: which of them are not padding in front `(B, T)`.
        logits: `(B, V)`.
        step: how many of the tokens are new.
        last: whether there will be no other one.
    """
    scores = logits.astype(np.float32)
    length, ends = tokens.shape[1], _ids(found.get("eos_token_id"))
    penalty, size = found.get("repetition_penalty", 1.0), found.get("no_repeat_ngram_size", 0)
    for row, seen in enumerate(tokens):
        if penalty != 1:
            ids = np.unique(seen[shown[row]])
            score = scores[row, ids]
            scores[row, ids] = np.where(score < 0, score * penalty, score / penalty)
        if size:
            scores[row, [*_repeating(seen.tolist(), size)]] = -np.inf
    scores[:, [word for (word,) in found.get("bad_words_ids", ()) if word not in ends]] = -np.inf
    if length < found.get("min_length", 0) or step < found.get("min_new_tokens", 0):
        scores[:, ends] = -np.inf
    first = found.get("forced_bos_token_id")
    if first is not None and length == 1:
        scores = _forced(scores, [first])
    if last and "forced_eos_token_id" in found:
        scores = _forced(scores, _ids(found["forced_eos_token_id"]))
    scores[:, _ids(found.get("suppress_tokens"))] = -np.inf
    if step == int(first is not None and length - step == 1):  # behind the forced one
        scores[:, _ids(found.get("begin_suppress_tokens"))] = -np.inf
    return scores


def _ids(value: int | Sequence[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _forced(scores: NDArray[Any], ids: Sequence[int]) -> NDArray[Any]:
    forced = np.full_like(scores, -np.inf)
    forced[:, ids] = 0
    return forced


def _repeating(seen: Sequence[int], size: int) -> Iterator[int]:
    """Yield the tokens that would end an n-gram of this size that was there before."""
    beginning = seen[len(seen) - size + 1 :]
    for at in range(len(seen) - size + 1):
        if seen[at : at + size - 1] == beginning:
            yield seen[at + size - 1]
