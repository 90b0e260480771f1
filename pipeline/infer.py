"""Answers from the model in this folder; needs onnxruntime, numpy, and for text tokenizers.

    python infer.py "a text" ["another text"]        an answer each, a line of JSON each
    python infer.py --pair "a text" "its second"     two texts a question: question and context, say
    python infer.py --golden                         the recorded inputs again, beside the outputs

Images are given as files, and need pillow. A model that generates does so by greedy.py, which lies
beside it. The model is opened with the options that it was measured with, which inference.json
holds.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Answer = dict[str, Any]

GOLDEN = "golden.npz"
SETTINGS = "inference.json"
LONGEST_ANSWER = 30
"""Tokens of an extracted answer at most."""
LONGEST_CONTINUATION = 40
"""Tokens at most, unless told."""


class Model:
    """The model of a folder, open in ONNX Runtime; one that generates gives `tokens` at most."""

    def __init__(self, folder: Path, threads: int | None = None, tokens: int | None = None) -> None:
        self.folder, self.tokens = folder, tokens
        self.settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        encoder, graph = (folder / "onnx" / f"{name}.onnx" for name in ("encoder_model", "model"))
        self._encoder = self._open(encoder, threads) if encoder.is_file() else None
        self.decode = self._open(graph, threads)

    def _open(self, file: Path, threads: int | None) -> Callable[[Arrays], Arrays]:
        import onnxruntime

        providers = self.settings["providers"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or self.settings["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        for name, value in self.settings["session"].items():
            options.add_session_config_entry(name, value)
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        if (found := session.get_providers()[0]) != providers[0]:
            raise RuntimeError(f"found {found}, expected {providers[0]}")
        return partial(_run, session)

    def __call__(self, items: Sequence[Any], pairs: Sequence[str] | None = None) -> list[Answer]:
        """Return an answer for each text (with its second text in `pairs`) or image file."""
        return ANSWERS[self.settings["task"]](self, items, pairs)

    def run(self, given: Arrays) -> Arrays:
        """Return the graph's outputs, those of a decoder for its encoder's."""
        return self.decode(self.begun(given))

    def begun(self, given: Arrays) -> Arrays:
        """Return what the last graph takes: of a decoder, with what its encoder gives."""
        if self._encoder is None:
            return given
        return self.generation["decoder_inputs"](self._encoder, given)

    def generate(self, given: Arrays, tokens: int) -> list[int]:
        """Return the most probable tokens behind those that are given `(1, T)`."""
        rules = self.generation["rules"](self.folder)
        if self._encoder is not None:
            first = self.generation["start"](self.folder, rules)
            given = given | {"decoder_input_ids": np.array([[first]])}
        begun = self.begun(given)
        found = self.generation["greedy_search"](
            self.decode, begun, rules, tokens if self.tokens is None else self.tokens
        )
        return found[0, begun["input_ids"].shape[1] :].tolist()

    @cached_property
    def generation(self) -> dict[str, Any]:
        """What greedy.py of this folder defines."""
        return runpy.run_path(str(self.folder / "greedy.py"))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, which neither pads nor cuts unless it is told to."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def encode(self, items: Sequence[Any], pairs: Sequence[str] | None, **options: Any) -> Any:
        """Return the tokenizer's encodings; `options` are those of its truncation."""
        self.tokenizer.enable_truncation(self.settings["max_length"], **options)
        given = items if pairs is None else list(zip(items, pairs, strict=True))
        return self.tokenizer.encode_batch(given, is_pretokenized=isinstance(items[0], list))

    def batch(self, encodings: Sequence[Any]) -> Arrays:
        """Return what the graph takes of encodings, padded: `(B, longest)` each."""
        shape = len(encodings), max(len(encoding.ids) for encoding in encodings)
        tokens = np.full(shape, self.settings["pad"], np.int64)
        mask, kinds = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            tokens[row, :length], mask[row, :length] = encoding.ids, 1
            kinds[row, :length] = encoding.type_ids
        return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": kinds}


def golden(folder: Path, run: Callable[[Arrays], Mapping[str, NDArray[Any]]]) -> float:
    """Return the largest difference to the recorded outputs, relative to the largest output."""
    recorded = dict(np.load(folder / GOLDEN))
    given = {k.removeprefix("input."): a for k, a in recorded.items() if k[:6] == "input."}
    found, worst = run(given), 0.0
    for name, expected in recorded.items():
        if name.startswith("output."):
            array = found[name.removeprefix("output.")]
            if array.shape != expected.shape or not np.isfinite(array).all():
                return float("inf")
            scale = max(float(np.abs(expected).max()), 1e-6)
            worst = max(worst, float(np.abs(array - expected).max()) / scale)
    return worst


def classes(model: Model, items: Sequence[Any], pairs: Sequence[str] | None) -> list[Answer]:
    """Return the most probable label of each text."""
    return _labelled(model, model.batch(model.encode(items, pairs)))


def images(model: Model, items: Sequence[Any], pairs: Sequence[str] | None) -> list[Answer]:
    """Return the most probable label of each image file."""
    del pairs
    return _labelled(model, {"pixel_values": np.stack([pixels(model, item) for item in items])})


def pixels(model: Model, path: str | Path) -> NDArray[np.float32]:
    """Return an image file as the model takes it `(C, H, W)`."""
    from PIL import Image

    about = json.loads((model.folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    known = {f"do_{step}" for step in ("resize", "center_crop", "rescale", "normalize")}
    unknown = (
        {k for k, v in about.items() if k.startswith("do_") and v} - known - {"do_convert_rgb"}
    )
    if unknown or (about.get("do_resize") and about["size"].keys() != {"height", "width"}):
        raise ValueError(
            f"preprocessor_config.json: found {unknown or about['size']}, not known here"
        )
    image: Any = Image.open(path).convert("RGB")
    if about.get("do_resize"):
        size = about["size"]["width"], about["size"]["height"]
        image = image.resize(size, about.get("resample", 2))
    if about.get("do_center_crop"):
        wide, high = about["crop_size"]["width"], about["crop_size"]["height"]
        left, top = (image.width - wide) // 2, (image.height - high) // 2
        image = image.crop((left, top, left + wide, top + high))
    array = np.asarray(image, np.float32)
    if about.get("do_rescale"):
        array = array * np.float32(about["rescale_factor"])
    if about.get("do_normalize"):
        mean, spread = (np.asarray(about[name], np.float32) for name in ("image_mean", "image_std"))
        array = (array - mean) / spread
    return array.transpose(2, 0, 1)


def _labelled(model: Model, batch: Arrays) -> list[Answer]:
    shares = _softmax(model.run(batch)["logits"])
    names = model.settings["labels"]
    return [{"label": names[int(row.argmax())], "probability": float(row.max())} for row in shares]


def scores(model: Model, items: Sequence[Any], pairs: Sequence[str] | None) -> list[Answer]:
    """Return the number for each text."""
    outputs = model.run(model.batch(model.encode(items, pairs)))["logits"]
    return [{"score": float(row[0])} for row in outputs]


def tags(model: Model, items: Sequence[Any], pairs: Sequence[str] | None) -> list[Answer]:
    """Return the tag of each word; a text that is no list is split at its spaces."""
    del pairs
    words = [item if isinstance(item, list) else item.split() for item in items]
    encodings = model.encode(words, None)
    names, answers = model.settings["labels"], []
    logits = model.run(model.batch(encodings))["logits"]
    for row, encoding, given in zip(logits, encodings, words, strict=True):
        found, before = ["O"] * len(given), None  # what is cut off counts as outside
        for at, word in enumerate(encoding.word_ids):
            if word is not None and word != before:  # the first piece of a word carries its tag
                found[word] = names[int(row[at].argmax())]
            before = word
        answers.append({"words": given, "tags": found})
    return answers


def answers(model: Model, items: Sequence[Any], pairs: Sequence[str] | None) -> list[Answer]:
    """Return the part of the context, the second text, that answers each question."""
    if pairs is None:
        raise ValueError("found questions alone, expected a context for each (--pair)")
    stride = model.settings["max_length"] // 4
    encodings = model.encode(items, pairs, stride=stride, strategy="only_second")
    return [
        _answer(model, [encoding, *encoding.overflowing], context)
        for encoding, context in zip(encodings, pairs, strict=True)
    ]


def _answer(model: Model, windows: Sequence[Any], context: str) -> Answer:
    outputs, best, text = model.run(model.batch(windows)), -np.inf, ""
    for at, window in enumerate(windows):
        inside = np.array([sequence == 1 for sequence in window.sequence_ids])
        start, end = (outputs[name][at, : len(inside)] for name in ("start_logits", "end_logits"))
        ones = np.ones((len(inside), len(inside)), bool)
        allowed = np.triu(ones) & ~np.triu(ones, LONGEST_ANSWER) & inside & inside[:, None]
        scores = np.where(allowed, start[:, None] + end, -np.inf)
        first, last = np.unravel_index(scores.argmax(), scores.shape)
        if scores[first, last] > best:
            best = float(scores[first, last])
            text = context[window.offsets[first][0] : window.offsets[last][1]]
    return {"answer": text, "score": best}


def continuations(model: Model, items: Sequence[Any], pairs: Sequence[str] | None) -> list[Answer]:
    """Return each text's most probable next tokens, one after the other."""
    del pairs
    tokenizer = model.tokenizer
    begin = [] if model.settings["begin"] is None else [model.settings["begin"]]
    found = []
    for item in items:
        ids = begin + tokenizer.encode(item, add_special_tokens=False).ids
        given = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        whole = tokenizer.decode(ids + model.generate(given, LONGEST_CONTINUATION))
        found.append({"text": item, "continuation": whole[len(tokenizer.decode(ids)) :]})
    return found


def targets(model: Model, items: Sequence[Any], pairs: Sequence[str] | None) -> list[Answer]:
    """Return what each source text becomes: its translation, say, or its summary."""
    longest = model.settings["max_length"]
    found = []
    for item, encoding in zip(items, model.encode(items, pairs), strict=True):
        ids = model.generate(model.batch([encoding]), longest)
        found.append({"source": item, "target": model.tokenizer.decode(ids)})
    return found


def _run(session: Any, given: Arrays) -> Arrays:
    """Return a graph's outputs; a cache that is not given is empty."""
    fed = {}
    for node in session.get_inputs():
        if node.name in given:
            fed[node.name] = given[node.name]
        elif node.name == "position_ids":
            seen = np.maximum(np.cumsum(given["attention_mask"], axis=-1) - 1, 0)
            fed[node.name] = seen[:, -given["input_ids"].shape[1] :]
        else:
            _, heads, _, width = node.shape
            fed[node.name] = np.zeros((len(given["input_ids"]), heads, 0, width), np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, fed), strict=True))


def _softmax(logits: NDArray[Any]) -> NDArray[Any]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


ANSWERS: Mapping[str, Callable[[Model, Sequence[Any], Sequence[str] | None], list[Answer]]] = {
    "causal-lm": continuations,
    "image-classification": images,
    "question-answering": answers,
    "seq2seq-lm": targets,
    "text-classification": classes,
    "text-regression": scores,
    "token-classification": tags,
}


def main() -> None:
    """Answer what the command line asks."""
    parser = argparse.ArgumentParser(description="Answers from the model in this folder.")
    parser.add_argument("items", nargs="*", metavar="TEXT", help="texts, or image files")
    parser.add_argument("--pair", action="store_true", help="texts belong together in twos")
    parser.add_argument("--golden", action="store_true", help="run the recorded inputs again")
    parser.add_argument("--tokens", type=int, help="of a generated text at most")
    parser.add_argument("--threads", type=int, help="as measured, unless given")
    options = parser.parse_args()
    items, pairs = options.items, None
    if not options.golden and (not items or (options.pair and len(items) % 2)):
        parser.error("expected texts, with --pair an even number of them, or --golden")
    if options.pair:
        items, pairs = items[::2], items[1::2]
    try:
        model = Model(Path(__file__).parent, options.threads, options.tokens)
        if options.golden:
            difference, tolerance = golden(model.folder, model.run), model.settings["tolerance"]
            print(f"golden outputs: difference {difference:.1e}, at most {tolerance:.1e}")  # noqa: T201
            sys.exit(int(not difference <= tolerance))
        found = model(items, pairs)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        sys.exit(f"infer.py: {error}")
    for answer in found:
        print(json.dumps(answer, ensure_ascii=False))  # noqa: T201


if __name__ == "__main__":
    main()
