"""Rows to windows and outputs to judgements, against cases counted by hand."""

import numpy as np
import pytest
from conftest import write_model
from PIL import Image
from transformers import AutoTokenizer, ViTImageProcessorPil

from benchmarks.data import DataError
from benchmarks.examples import IGNORED, Example, Window, collate, padding, with_decoder_inputs
from benchmarks.tasks import TASKS, label_names

ID = "0" * 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_model(folder)
    return AutoTokenizer.from_pretrained(folder)


def encode(kind, rows, processor, labels=("0", "1"), max_length=16):
    return TASKS[kind].encode([{"id": ID, **row} for row in rows], processor, labels, max_length)


def test_texts_become_windows_with_their_label(tokenizer):
    rows = [{"text": "good film", "label": 1}, {"text": "bad " * 30, "label": "0"}]
    first, second = encode("text-classification", rows, tokenizer)
    assert first.windows[0].inputs["input_ids"].tolist() == [2, 4, 10, 3]
    assert first.windows[0].labels["labels"] == 1
    assert len(second.windows[0].inputs["input_ids"]) == 16


def test_pairs_are_told_apart(tokenizer):
    (example,) = encode(
        "text-classification", [{"text": "good", "text_pair": "bad", "label": 0}], tokenizer
    )
    assert example.windows[0].inputs["input_ids"].tolist() == [2, 4, 3, 7, 3]


@pytest.mark.parametrize("label", [2, -1, "great"])
def test_an_unknown_label_is_said(tokenizer, label):
    with pytest.raises(
        DataError, match=rf"label: found label {label!r}, expected one of \['0', '1'\]"
    ):
        encode("text-classification", [{"text": "good", "label": label}], tokenizer)


def test_a_class_is_judged_by_its_largest_logit(tokenizer):
    (example,) = encode("text-classification", [{"text": "good", "label": 1}], tokenizer)
    judged = TASKS["text-classification"].judge(example, [{"logits": np.asarray([0.0, np.log(3)])}])
    assert judged.columns == {"prediction": 1, "label": 1}
    assert np.exp(judged.log_probabilities[0]) == pytest.approx([0.25, 0.75])


def test_numbers_are_encoded_and_judged_as_they_are(tokenizer):
    rows = [
        {"text": "good film", "text_pair": "bad", "score": 3.5},
        {"text": "", "text_pair": "", "score": 2},
    ]
    first, second = encode("text-regression", rows, tokenizer)
    assert first.windows[0].inputs["input_ids"].tolist() == [2, 4, 10, 3, 7, 3]
    assert [each.windows[0].labels["labels"].item() for each in (first, second)] == [3.5, 2.0]
    assert first.windows[0].labels["labels"].dtype == np.float32
    judged = TASKS["text-regression"].judge(first, [{"logits": np.asarray([3.25])}])
    assert judged.columns == {"predicted": 3.25, "score": 3.5}
    assert len(judged.decisions) == 0
    assert judged.log_probabilities is None


@pytest.mark.parametrize("score", ["high", True, float("nan")])
def test_a_score_that_is_no_number_is_said(tokenizer, score):
    with pytest.raises(DataError, match=f"score: found {score!r}, expected a number"):
        encode("text-regression", [{"text": "good", "score": score}], tokenizer)


def test_images_become_pixels():
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    row = {"image": Image.new("L", (20, 30), 255), "label": "dog"}
    (example,) = encode("image-classification", [row], processor, ("cat", "dog"))
    pixels = example.windows[0].inputs["pixel_values"]
    assert (pixels.shape, pixels.dtype, float(pixels.max())) == ((3, 8, 8), np.float32, 1.0)
    assert example.windows[0].labels["labels"] == 1


TAGS = ("O", "B-person", "I-person", "B-place")


def test_the_first_piece_of_a_word_carries_its_tag(tokenizer):
    row = {"tokens": ["good", "film-plot", "a"], "tags": ["O", "B-person", "I-person"]}
    (example,) = encode("token-classification", [row], tokenizer, TAGS)
    # [CLS] good film - plot a [SEP]
    expected = [IGNORED, 0, 1, IGNORED, IGNORED, 2, IGNORED]
    assert example.windows[0].labels["labels"].tolist() == expected


def test_entities_are_counted_as_wholes(tokenizer):
    row = {"tokens": ["good", "film", "a", "bad"], "tags": ["B-person", "I-person", "O", "B-place"]}
    (example,) = encode("token-classification", [row], tokenizer, TAGS)
    # Predicted: a person of one word, a place where one is.
    logits = np.eye(4)[[0, 1, 0, 0, 3, 0]] * 9.0
    judged = TASKS["token-classification"].judge(example, [{"logits": logits}])
    assert judged.columns == {"true_positives": 1, "false_positives": 1, "false_negatives": 1}
    assert judged.decisions.tolist() == [1, 0, 0, 3]


def test_words_behind_the_truncation_count_as_missed(tokenizer):
    row = {"tokens": ["good"] * 20, "tags": ["O"] * 19 + ["B-place"]}
    (example,) = encode("token-classification", [row], tokenizer, TAGS, max_length=8)
    judged = TASKS["token-classification"].judge(example, [{"logits": np.eye(4)[[0] * 8]}])
    assert judged.columns["false_negatives"] == 1


def test_a_word_without_a_piece_moves_no_other(tokenizer):
    row = {"tokens": ["good", " ", "film"], "tags": ["O", "O", "B-place"]}
    (example,) = encode("token-classification", [row], tokenizer, TAGS)
    judged = TASKS["token-classification"].judge(example, [{"logits": np.eye(4)[[0, 0, 3, 0]]}])
    assert judged.columns == {"true_positives": 1, "false_positives": 0, "false_negatives": 0}


def test_tags_that_are_no_entities_are_refused(tokenizer):
    row = {"tokens": ["good"], "tags": [0]}
    with pytest.raises(DataError, match="tags: found the label '0', expected O, B-person"):
        encode("token-classification", [row], tokenizer, ("0", "1"))
    with pytest.raises(DataError, match="tags: found 1 for 2 tokens"):
        encode("token-classification", [{"tokens": ["a", "the"], "tags": ["O"]}], tokenizer, TAGS)


def test_columns_of_another_type_are_refused(tokenizer):
    with pytest.raises(DataError, match="text: found 3, expected text"):
        encode("text-classification", [{"text": 3, "label": 0}], tokenizer)
    with pytest.raises(DataError, match="image: found str, expected images"):
        encode("image-classification", [{"image": "cat.png", "label": 0}], None)


def test_a_question_without_an_answer_is_refused(tokenizer):
    row = QUESTION | {"answers": {"text": [], "answer_start": []}}
    with pytest.raises(DataError, match="answers: found a question without an answer"):
        encode("question-answering", [row], tokenizer)


CONTEXT = "the film a great actor the scene bad plot fine"
QUESTION = {
    "question": "good film",
    "context": CONTEXT,
    "answers": {"text": ["great actor"], "answer_start": [CONTEXT.index("great actor")]},
}


def test_an_answer_is_found_in_one_window(tokenizer):
    (example,) = encode("question-answering", [QUESTION], tokenizer, max_length=32)
    (window,) = example.windows
    # [CLS] good film [SEP] the film a great actor ...: tokens 7 and 8
    assert (window.labels["start_positions"], window.labels["end_positions"]) == (7, 8)
    length = len(window.inputs["input_ids"])
    output = {"start_logits": np.eye(length)[7], "end_logits": np.eye(length)[8]}
    judged = TASKS["question-answering"].judge(example, [output])
    assert judged.columns == {"exact_match": 1.0, "answer_f1": 1.0}


def test_an_answer_is_judged_over_all_windows(tokenizer):
    (example,) = encode("question-answering", [QUESTION], tokenizer, max_length=12)
    assert len(example.windows) > 1
    outputs = []
    for at, window in enumerate(example.windows):
        length = len(window.inputs["input_ids"])
        # Only the last window is sure: of "plot", in its context.
        token = int(np.flatnonzero(window.inputs["input_ids"] == 11)[-1]) if at else 0
        weight = 5.0 if at == len(example.windows) - 1 else 0.0
        outputs.append(
            {name: np.eye(length)[token] * weight for name in ("start_logits", "end_logits")}
        )
    judged = TASKS["question-answering"].judge(example, outputs)
    assert judged.columns == {"exact_match": 0.0, "answer_f1": 0.0}


def test_a_half_right_answer_scores_its_overlap(tokenizer):
    (example,) = encode("question-answering", [QUESTION], tokenizer, max_length=32)
    length = len(example.windows[0].inputs["input_ids"])
    output = {"start_logits": np.eye(length)[8], "end_logits": np.eye(length)[8]}  # "actor"
    judged = TASKS["question-answering"].judge(example, [output])
    assert judged.columns["answer_f1"] == pytest.approx(2 / 3)


def test_long_texts_are_several_windows_and_every_token_is_scored_once(tokenizer):
    (example,) = encode("causal-lm", [{"text": "good film bad plot " * 5}], tokenizer, max_length=8)
    assert [len(w.inputs["input_ids"]) for w in example.windows] == [8, 8, 4]
    outputs = [{"nll": np.full(7, 0.5), "next_token": np.arange(7)} for _ in example.windows]
    judged = TASKS["causal-lm"].judge(example, outputs)
    assert judged.columns == {"nll": 0.5 * 17, "tokens": 17}
    assert len(judged.decisions) == 17


def test_a_target_is_what_the_decoder_gives_and_reads_one_place_later(tokenizer):
    rows = [{"source": "good film", "target": "bad"}, {"source": "plot " * 30, "target": "a " * 30}]
    examples = encode("seq2seq-lm", rows, tokenizer)
    assert examples[0].windows[0].inputs["input_ids"].tolist() == [2, 4, 10, 3]
    assert examples[0].windows[0].labels["labels"].tolist() == [2, 7, 3, IGNORED]
    shifts = []

    def shift(labels):
        shifts.append(labels.tolist())
        return np.asarray([1, *labels[:-1]])

    first, second = with_decoder_inputs(examples, shift)
    assert shifts[0] == [2, 7, 3, IGNORED]
    assert first.windows[0].inputs["decoder_input_ids"].tolist() == [1, 2, 7, 3]
    assert [*first.windows[0].inputs] == ["input_ids", "attention_mask", "decoder_input_ids"]
    assert len(second.windows[0].inputs["input_ids"]) == 16
    assert len(second.windows[0].inputs["decoder_input_ids"]) == 16
    outputs = [{"nll": np.arange(9.0), "next_token": np.arange(9)}]  # padded
    judged = TASKS["seq2seq-lm"].judge(first, outputs)
    assert judged.columns == {"nll": 0.0 + 1 + 2, "tokens": 3}
    assert judged.decisions.tolist() == [0, 1, 2]


def test_a_pair_without_a_token_is_said():
    def bare(texts=None, text_target=None, **_):
        words = [[len(w) for w in text.split()] for text in texts or text_target]
        return {"input_ids": words}

    with pytest.raises(DataError, match="source, target: found 'a film' and '', expected a token"):
        encode("seq2seq-lm", [{"source": "a film", "target": ""}], bare)


def test_no_text_is_said(tokenizer):
    with pytest.raises(DataError, match="text: found no text of two tokens or more"):
        encode("causal-lm", [{"text": ""}], tokenizer)


def test_collate_pads_to_the_longest():
    batch = collate(
        [
            {"input_ids": np.asarray([1, 2]), "labels": np.asarray(1)},
            {"input_ids": np.asarray([3]), "labels": np.asarray(0)},
        ],
        {"input_ids": 9},
    )
    assert batch["input_ids"].tolist() == [[1, 2], [3, 9]]
    assert batch["labels"].tolist() == [1, 0]


def test_padding_of_labels_does_not_count(tokenizer):
    assert padding(tokenizer)["input_ids"] == 0
    assert padding(tokenizer)["labels"] == IGNORED
    assert padding(tokenizer)["decoder_input_ids"] == 0


def test_labels_are_named_in_the_order_of_their_ids():
    assert label_names([{"label": 2}, {"label": 0}], "label") == ["0", "1", "2"]
    assert label_names([{"label": "no"}, {"label": "maybe"}], "label") == ["maybe", "no"]
    assert label_names([{"tags": ["O", "B-x"]}, {"tags": ["O"]}], "tags") == ["B-x", "O"]


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_names_a_class_and_a_metric_that_exist(kind):
    import transformers

    from benchmarks.metrics import METRICS
    from benchmarks.worker import REDUCTIONS

    task = TASKS[kind]
    assert hasattr(transformers, task.auto_class)
    assert set(task.metrics) <= METRICS.keys()
    assert task.reduction in REDUCTIONS
    assert task.optional <= task.columns.keys()
    assert isinstance(Example(ID, (Window({}, {}),)).windows, tuple)
