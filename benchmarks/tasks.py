"""What a model is asked: rows to model inputs, and model outputs to what a metric reads.

A task is a row of `TASKS`: the class that transformers has for it, the columns it needs, how a row
becomes the windows that a model sees, and how the outputs for these windows are judged. It knows
neither which runtime predicts nor what a metric does with the columns.

N examples, W windows of an example, T tokens, C classes, V vocabulary.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL.Image import Image
from scipy.special import log_softmax
from seqeval.metrics.sequence_labeling import get_entities

from benchmarks.data import DataError, Row
from benchmarks.examples import IGNORED, Arrays, Example, Judgement, Window


@dataclass(frozen=True)
class Task:
    """A kind of task; `columns` maps each role to the column it has unless the recipe says so.

    `labelled` is the role whose values are labels; with `regression` the model's one output is a
    number. `decodes`: the model reads the target beside the source; see
    `examples.with_decoder_inputs`.
    """

    auto_class: str
    columns: Mapping[str, str]
    metrics: tuple[str, ...]
    encode: Callable[[Sequence[Row], Any, Sequence[str], int], list[Example]]
    judge: Callable[[Example, Sequence[Arrays]], Judgement]
    optional: frozenset[str] = frozenset()
    labelled: str | None = None
    regression: bool = False
    reduction: str = "none"
    axes: tuple[str, ...] = ("batch", "sequence")
    processor: str = "AutoTokenizer"
    decodes: bool = False


def label_names(rows: Sequence[Row], role: str) -> list[str]:
    """Return the names of the labels that occur, in the order of their ids.

    Integers are their own ids; other labels are sorted.
    """
    values = {value for row in rows for value in np.atleast_1d(row[role]).tolist()}
    if all(isinstance(value, int) for value in values):
        return [str(value) for value in range(max(values) + 1)]
    return sorted(str(value) for value in values)


def _label_id(value: object, names: Sequence[str], where: str) -> int:
    if isinstance(value, int):
        if 0 <= value < len(names):
            return value
    elif str(value) in names:
        return names.index(str(value))
    raise DataError(
        f"{where}: found label {value!r}, expected one of {list(names)}; name the labels in the"
        " order of the model's ids under task.labels"
    )


def _inputs(encoding: Mapping[str, Sequence[Any]], row: int) -> Arrays:
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: np.asarray(encoding[name][row], np.int64) for name in names if name in encoding}


def _texts(rows: Sequence[Row], role: str) -> list[str]:
    for row in rows:
        if not isinstance(row[role], str):
            raise DataError(f"{role}: found {row[role]!r}, expected text")
    return [row[role] for row in rows]


def _encode_text(
    rows: Sequence[Row], processor: Any, labels: Sequence[str], max_length: int
) -> list[Example]:
    examples = []
    for row, inputs in _tokenised(rows, processor, max_length):
        label = _label_id(row["label"], labels, "label")
        window = Window(inputs, {"labels": np.asarray(label, np.int64)})
        examples.append(Example(row["id"], (window,), {"label": label}))
    return examples


def _encode_scored(
    rows: Sequence[Row], processor: Any, labels: Sequence[str], max_length: int
) -> list[Example]:
    del labels
    examples = []
    for row, inputs in _tokenised(rows, processor, max_length):
        score = row["score"]
        if isinstance(score, bool) or not isinstance(score, int | float) or not np.isfinite(score):
            raise DataError(f"score: found {score!r}, expected a number")
        window = Window(inputs, {"labels": np.asarray(score, np.float32)})
        examples.append(Example(row["id"], (window,), {"score": float(score)}))
    return examples


def _tokenised(
    rows: Sequence[Row], processor: Any, max_length: int
) -> Iterator[tuple[Row, Arrays]]:
    """Yield rows of a text, or of two, with what the model sees of them."""
    pairs = _texts(rows, "text_pair") if "text_pair" in rows[0] else None
    texts = _texts(rows, "text")
    encoding = processor(texts, pairs, truncation=True, max_length=max_length)
    for index, row in enumerate(rows):
        yield row, _inputs(encoding, index)


def _encode_images(
    rows: Sequence[Row], processor: Any, labels: Sequence[str], max_length: int
) -> list[Example]:
    del max_length
    examples = []
    for row in rows:
        if not isinstance(row["image"], Image):
            found = type(row["image"]).__name__
            raise DataError(
                f"image: found {found}, expected images; a folder of them is read as such"
            )
        pixels = processor(row["image"].convert("RGB"), return_tensors="np")["pixel_values"][0]
        label = _label_id(row["label"], labels, "label")
        window = Window(
            {"pixel_values": np.asarray(pixels, np.float32)},
            {"labels": np.asarray(label, np.int64)},
        )
        examples.append(Example(row["id"], (window,), {"label": label}))
    return examples


def _judge_class(example: Example, outputs: Sequence[Arrays]) -> Judgement:
    logits = outputs[0]["logits"]
    prediction = int(np.argmax(logits))
    return Judgement(
        {"prediction": prediction, "label": example.reference["label"]},
        np.asarray([prediction]),
        log_softmax(np.asarray(logits, np.float64))[None],
    )


def _judge_score(example: Example, outputs: Sequence[Arrays]) -> Judgement:
    columns = {"predicted": float(outputs[0]["logits"][0]), "score": example.reference["score"]}
    return Judgement(columns, np.empty(0, np.int64))  # nothing is decided


def _encode_tokens(
    rows: Sequence[Row], processor: Any, labels: Sequence[str], max_length: int
) -> list[Example]:
    if wrong := [name for name in labels if not re.fullmatch("O|[BIESLU]-.+", name)]:
        raise DataError(
            f"tags: found the label {wrong[0]!r}, expected O, B-person, I-person and the like; name"
            " the labels in the order of the model's ids under task.labels"
        )
    words = [list(row["tokens"]) for row in rows]
    encoding = processor(words, is_split_into_words=True, truncation=True, max_length=max_length)
    examples = []
    for index, row in enumerate(rows):
        tags = [_label_id(tag, labels, "tags") for tag in row["tags"]]
        if len(tags) != len(row["tokens"]):
            raise DataError(
                f"tags: found {len(tags)} for {len(row['tokens'])} tokens, expected as many"
            )
        ids = encoding.word_ids(index)
        # The first piece of a word carries its tag.
        firsts = [
            word if word is not None and word != before else None
            for before, word in zip([None, *ids], ids, strict=False)
        ]
        targets = [IGNORED if word is None else tags[word] for word in firsts]
        window = Window(_inputs(encoding, index), {"labels": np.asarray(targets, np.int64)})
        reference = {
            "tags": [labels[tag] for tag in tags],
            "names": tuple(labels),
            "words": [word for word in firsts if word is not None],
        }
        examples.append(Example(row["id"], (window,), reference))
    return examples


def _judge_tags(example: Example, outputs: Sequence[Arrays]) -> Judgement:
    targets = example.windows[0].labels["labels"]
    logits = outputs[0]["logits"][: len(targets)][targets != IGNORED]
    decisions = np.argmax(logits, axis=-1)
    tags, names = example.reference["tags"], example.reference["names"]
    # Words that were not seen, behind the truncation for one, count as outside.
    seen = ["O"] * len(tags)
    for word, decision in zip(example.reference["words"], decisions, strict=True):
        seen[word] = names[decision]
    found, expected = set(get_entities(seen)), set(get_entities(tags))
    return Judgement(
        {
            "true_positives": len(found & expected),
            "false_positives": len(found - expected),
            "false_negatives": len(expected - found),
        },
        decisions,
        log_softmax(np.asarray(logits, np.float64), axis=-1),
    )


def _encode_questions(
    rows: Sequence[Row], processor: Any, labels: Sequence[str], max_length: int
) -> list[Example]:
    del labels
    examples = []
    for row in rows:
        encoding = processor(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=max_length,
            stride=max_length // 4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        answers = row["answers"]
        if not answers["text"]:
            raise DataError(
                "answers: found a question without an answer, expected at least one; leave such"
                " questions out"
            )
        start = int(answers["answer_start"][0])
        end = start + len(answers["text"][0])
        windows, offsets = [], []
        for index in range(len(encoding["input_ids"])):
            in_context = np.asarray([s == 1 for s in encoding.sequence_ids(index)])
            # (T, 2) characters of the context, (-1, -1) outside it.
            spans = np.where(in_context[:, None], encoding["offset_mapping"][index], -1)
            starts = np.flatnonzero((spans[:, 0] <= start) & (start < spans[:, 1]))
            ends = np.flatnonzero((spans[:, 0] < end) & (end <= spans[:, 1]))
            inside = len(starts) > 0 and len(ends) > 0
            target = {
                "start_positions": np.asarray(starts[0] if inside else 0, np.int64),
                "end_positions": np.asarray(ends[0] if inside else 0, np.int64),
            }
            windows.append(Window(_inputs(encoding, index), target))
            offsets.append(spans)
        reference = {"context": row["context"], "answers": answers["text"], "offsets": offsets}
        examples.append(Example(row["id"], tuple(windows), reference))
    return examples


LONGEST_ANSWER: Final = 30
"""Tokens of an extracted answer at most."""


def _judge_answer(example: Example, outputs: Sequence[Arrays]) -> Judgement:
    best, text, decision = -np.inf, "", (0, 0, 0)
    for window, (output, spans) in enumerate(
        zip(outputs, example.reference["offsets"], strict=True)
    ):
        length = len(spans)
        start, end = output["start_logits"][:length], output["end_logits"][:length]
        pairs = np.triu(np.ones((length, length), bool)) & ~np.triu(
            np.ones((length, length), bool), LONGEST_ANSWER
        )
        valid = spans[:, 0] >= 0
        scores = np.where(pairs & valid[:, None] & valid[None], start[:, None] + end[None], -np.inf)
        first, last = np.unravel_index(np.argmax(scores), scores.shape)
        if scores[first, last] > best:
            best = float(scores[first, last])
            text = example.reference["context"][spans[first, 0] : spans[last, 1]]
            decision = (window, int(first), int(last))
    answers = example.reference["answers"]
    return Judgement(
        {
            "exact_match": max(float(_normal(text) == _normal(answer)) for answer in answers),
            "answer_f1": max(_overlap(_normal(text), _normal(answer)) for answer in answers),
        },
        np.asarray([_span_code(decision)]),
    )


def _span_code(decision: tuple[int, int, int]) -> int:
    """Return one integer for (window, first token, last token), each below 2**20."""
    window, first, last = decision
    return (window << 40) | (first << 20) | last


def _normal(answer: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (SQuAD 1.1's rule)."""
    plain = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _overlap(found: str, expected: str) -> float:
    left, right = Counter(found.split()), Counter(expected.split())
    shared = (left & right).total()
    if not left or not right:
        return float(left == right)
    return 2 * shared / (left.total() + right.total())


def _encode_stories(
    rows: Sequence[Row], processor: Any, labels: Sequence[str], max_length: int
) -> list[Example]:
    del labels
    begin = getattr(processor, "bos_token_id", None)
    begin = [] if begin is None else [begin]
    texts = _texts(rows, "text")
    encoding = processor(texts, add_special_tokens=False)["input_ids"]
    examples = []
    for row, ids in zip(rows, encoding, strict=True):
        body = max_length - len(begin)
        chunks = [begin + ids[at : at + body] for at in range(0, len(ids), body)]
        windows = tuple(
            Window(
                {
                    "input_ids": np.asarray(chunk, np.int64),
                    "attention_mask": np.ones(len(chunk), np.int64),
                },
                {"labels": np.asarray(chunk, np.int64)},
            )
            for chunk in chunks
            if len(chunk) > 1
        )
        if windows:
            examples.append(Example(row["id"], windows))
    if not examples:
        raise DataError("text: found no text of two tokens or more, expected at least one")
    return examples


def _encode_pairs(
    rows: Sequence[Row], processor: Any, labels: Sequence[str], max_length: int
) -> list[Example]:
    del labels
    sources = processor(_texts(rows, "source"), truncation=True, max_length=max_length)
    # A start token comes in front.
    targets = processor(
        text_target=_texts(rows, "target"), truncation=True, max_length=max_length - 1
    )["input_ids"]
    examples = []
    for index, (row, target) in enumerate(zip(rows, targets, strict=True)):
        if not target or not sources["input_ids"][index]:
            raise DataError(
                f"source, target: found {row['source']!r} and {row['target']!r}, expected a token"
                " or more in each"
            )
        tokens = {"labels": np.asarray([*target, IGNORED], np.int64)}
        examples.append(Example(row["id"], (Window(_inputs(sources, index), tokens),)))
    return examples


def _judge_tokens(example: Example, outputs: Sequence[Arrays]) -> Judgement:
    nll, tokens, decisions = 0.0, 0, []
    for window, output in zip(example.windows, outputs, strict=True):
        read = window.inputs.get("decoder_input_ids", window.inputs["input_ids"])
        scored = len(read) - 1
        nll += float(np.sum(output["nll"][:scored], dtype=np.float64))
        tokens += scored
        decisions.append(output["next_token"][:scored])
    return Judgement({"nll": nll, "tokens": tokens}, np.concatenate(decisions))


TASKS: Final[Mapping[str, Task]] = {
    "text-classification": Task(
        auto_class="AutoModelForSequenceClassification",
        columns={"text": "text", "text_pair": "text_pair", "label": "label"},
        optional=frozenset({"text_pair"}),
        labelled="label",
        metrics=("accuracy", "macro_f1", "matthews"),
        encode=_encode_text,
        judge=_judge_class,
    ),
    "text-regression": Task(
        auto_class="AutoModelForSequenceClassification",
        columns={"text": "text", "text_pair": "text_pair", "score": "score"},
        optional=frozenset({"text_pair"}),
        regression=True,
        metrics=("spearman", "pearson"),
        encode=_encode_scored,
        judge=_judge_score,
    ),
    "token-classification": Task(
        auto_class="AutoModelForTokenClassification",
        columns={"tokens": "tokens", "tags": "ner_tags"},
        labelled="tags",
        metrics=("entity_f1",),
        encode=_encode_tokens,
        judge=_judge_tags,
    ),
    "question-answering": Task(
        auto_class="AutoModelForQuestionAnswering",
        columns={"question": "question", "context": "context", "answers": "answers"},
        metrics=("answer_f1", "exact_match"),
        encode=_encode_questions,
        judge=_judge_answer,
    ),
    "causal-lm": Task(
        auto_class="AutoModelForCausalLM",
        columns={"text": "text"},
        metrics=("perplexity",),
        encode=_encode_stories,
        judge=_judge_tokens,
        reduction="next_token",
    ),
    "seq2seq-lm": Task(
        auto_class="AutoModelForSeq2SeqLM",
        columns={"source": "source", "target": "target"},
        metrics=("perplexity",),
        encode=_encode_pairs,
        judge=_judge_tokens,
        reduction="next_token",
        decodes=True,
    ),
    "image-classification": Task(
        auto_class="AutoModelForImageClassification",
        columns={"image": "image", "label": "label"},
        labelled="label",
        metrics=("accuracy", "macro_f1", "matthews"),
        encode=_encode_images,
        judge=_judge_class,
        axes=("batch",),
        processor="AutoImageProcessor",
    ),
}
