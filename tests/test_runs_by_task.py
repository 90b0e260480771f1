"""Runs of every kind of task but text classification: how they are judged, what they leave."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROWS, WORDS, other_task, sentences, write_rows
from PIL import Image
from transformers import (
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from benchmarks.outcomes import Outcomes
from exporters.onnx.generation import open_generator
from pipeline import Recipe, from_pretrained, infer, run, units
from pipeline.checkpoint import ModelError


def texts(count: int) -> list[list[str]]:
    return [text.split() for text, _ in sentences(count, seed=5)]


def test_token_classification_runs(tmp_path):
    names = ["O", "B-mood", "B-thing"]
    recipe = other_task(
        tmp_path, "token-classification", "bert-tokens",
        id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
    )  # fmt: skip
    recipe["target"]["runtime"] = "torch"
    del recipe["steps"][2]
    rows = [
        {"tokens": words, "ner_tags": ["B-mood" if w in WORDS[:6] else "O" for w in words]}
        for words in texts(120)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert report.stages[0].score.metric == "entity_f1"
    assert report.verdict.checks[0].what == "entity_f1 drop"
    assert report.stages[0].fidelity.flips is None
    assert report.stages[-1].fidelity.agreement > 0.5


def test_text_regression_runs_and_its_artifact_gives_numbers(tmp_path):
    recipe = other_task(tmp_path, "text-regression", "bert", num_labels=1)
    good, bad = WORDS[:3], WORDS[3:6]
    rows = [
        {"text": text, "score": sum((w in good) - (w in bad) for w in text.split())}
        for text, _ in ROWS
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = {"train": "train[:700]", "calibration": "train[700:800]", "gate": "train[1200:]"}
    recipe["task"]["splits"] = splits
    recipe["steps"].insert(0, {"step": "finetune", "epochs": 20, "learning_rate": 2e-3})
    recipe["steps"][2]["teacher"] = "finetune"
    recipe["steps"][3] = {"step": "export"}
    report = run(Recipe.model_validate(recipe | {"baseline": "finetune"}), tmp_path / "out")
    assert report.stages[0].score.metric == "spearman"
    assert report.stages[0].score.value > 0.5
    assert report.verdict.checks[0].what == "spearman drop"
    assert report.stages[-1].fidelity.agreement is None
    kept = Outcomes.load(tmp_path / "out" / "evidence" / "candidate.safetensors")
    answers = infer.Model(tmp_path / "out" / "artifact")([row["text"] for row in rows[1200:]])
    found = [answer["score"] for answer in answers]
    assert found == pytest.approx(kept.columns["predicted"].tolist(), abs=1e-3)


def test_a_regression_takes_one_output(tmp_path):
    recipe = other_task(tmp_path, "text-regression", "bert", num_labels=3)
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "good film", "score": 1.0}))
    recipe["task"]["splits"] = {"gate": "train"}
    recipe["steps"] = [{"step": "quantize"}]
    with pytest.raises(ModelError, match="found a model with 3 outputs, expected one"):
        run(Recipe.model_validate(recipe), tmp_path / "out")


def test_question_answering_runs(tmp_path):
    recipe = other_task(tmp_path, "question-answering", "bert-answers")
    del recipe["steps"][1]
    rows = []
    for words in texts(120):
        context = " ".join(words * 3)  # longer than a window
        answers = {"text": [words[1]], "answer_start": [context.index(words[1])]}
        rows.append({"question": words[0], "context": context, "answers": answers})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert report.stages[0].score.metric == "answer_f1"
    assert report.verdict.checks[0].what == "answer_f1 drop"
    assert 0 <= report.stages[-1].score.value <= 1


def test_causal_lm_runs_and_is_judged_by_perplexity(tmp_path):
    recipe = other_task(tmp_path, "causal-lm", "llama")
    del recipe["steps"][1]
    recipe["budget"] = {"max_perplexity_ratio": 10.0}
    rows = [{"text": " ".join(words)} for words in texts(120)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert report.stages[0].score.metric == "perplexity"
    assert report.verdict.checks[0].what == "perplexity ratio"
    ratio = report.stages[-1].score.value / report.stages[0].score.value
    assert report.verdict.checks[0].estimate == pytest.approx(ratio)
    # Not by our own code: the dense model's own loss, a text at a time.
    model = from_pretrained(tmp_path / "model", "AutoModelForCausalLM")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    total, tokens = 0.0, 0
    for row in rows[60:]:
        ids = tokenizer(row["text"], return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert report.stages[0].score.value == pytest.approx(np.exp(total / tokens), rel=1e-3)


@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        ("t5", {"method": "int8-static"}),
        ("bart", {"method": "int8-dynamic", "embeddings": True}),
    ],
)
def test_seq2seq_lm_runs_and_its_artifact_generates(tmp_path, family, quantize):
    recipe = other_task(tmp_path, "seq2seq-lm", family)
    rows = [(" ".join(words), " ".join(words[::-1][:4])) for words in texts(160)]
    write_rows(tmp_path / "data.csv", rows, "source,target")
    recipe["task"]["data"] = str(tmp_path / "data.csv")
    recipe["task"]["splits"] = {"train": "train[:60]", "calibration": "train[60:100]",
                                "gate": "train[100:]"}  # fmt: skip
    recipe["target"]["loads"] = [{"batch": 2, "sequence": 16}, {"batch": 1, "sequence": 8}]
    recipe["steps"][2] |= quantize
    recipe |= {"baseline": "finetune", "budget": {"max_perplexity_ratio": 50.0}}
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert report.verdict.outcome == "pass"
    trained, quantized = report.stages
    model = from_pretrained(trained.folder)
    assert sum(trained.heads) < 6 * 4
    assert len(units(model).heads) == 6  # of encoder, decoder, and across
    assert [load.sequence for load in trained.loads] == [16, 8]
    # Not by our own code: the model's own loss, a pair at a time.
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    total, tokens = 0.0, 0
    for source, target in rows[100:]:
        given = tokenizer(source, truncation=True, max_length=16, return_tensors="pt")
        labels = tokenizer(target, return_tensors="pt").input_ids
        ids = {name: given[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            total += float(model(**ids, labels=labels).loss) * labels.shape[1]
        tokens += labels.shape[1]
    assert trained.score.value == pytest.approx(np.exp(total / tokens), rel=1e-3)
    graphs = Path(quantized.folder, "onnx")
    names = ["encoder_model.onnx", "model.onnx"]
    assert sorted(path.name for path in graphs.iterdir()) == names
    assert quantized.size_bytes == sum((graphs / name).stat().st_size for name in names)
    parts = quantized.details["bytes_by_part"]
    assert 0.3 * quantized.size_bytes < sum(parts.values()) < quantized.size_bytes
    # What was exported on the way generates what torch does, and the artifact generates too.
    (exported,) = (tmp_path / "out" / "stages").glob("onnx-*")
    given = tokenizer([source for source, _ in rows[:5]], padding=True, return_tensors="pt")
    ids = {name: given[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**ids, max_new_tokens=9, do_sample=False, num_beams=1)
    inputs = {name: array.numpy() for name, array in ids.items()}
    found = [
        open_generator(folder, device="cpu", threads=1)(inputs, max_new_tokens=9)
        for folder in (exported, tmp_path / "out" / "artifact")
    ]
    assert found[0].tolist() == expected.tolist()
    assert found[1].shape[0] == 5


def test_a_model_that_cannot_shift_labels_is_refused(tmp_path):
    recipe = other_task(tmp_path, "seq2seq-lm", "t5")
    recipe["budget"] = {"max_perplexity_ratio": 2.0}
    (tmp_path / "data.jsonl").write_text(
        "\n".join(json.dumps({"source": " ".join(w), "target": w[0]}) for w in texts(120))
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["decoder_start_token_id"] = None
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="found no way from labels to what the decoder reads"):
        run(Recipe.model_validate(recipe), tmp_path / "out")


def test_image_classification_runs(tmp_path):
    images = tmp_path / "images"
    generator = np.random.default_rng(0)
    for name, base in (("dark", 40), ("light", 200)):
        (images / "train" / name).mkdir(parents=True)
        for at in range(40):
            pixels = generator.integers(base - 40, base + 40, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / "train" / name / f"{at}.png")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = ViTConfig(**sizes, id2label={0: "dark", 1: "light"}, label2id={"dark": 0, "light": 1})
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    recipe = {
        "model": {"source": str(tmp_path / "model")},
        "task": {"kind": "image-classification", "data": str(images),
                 "splits": {"train": "train[:30]+train[50:]", "gate": "train[30:50]"}},
        "target": {"loads": [{"batch": 2}], "rounds": 6, "threads": 1},
        "steps": [{"step": "finetune", "epochs": 3, "learning_rate": 1e-3}, {"step": "quantize"}],
        "budget": {"max_size": 2.0},
    }  # fmt: skip
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert report.verdict.outcome == "pass"
    assert report.stages[-1].loads[0].sequence is None
    assert report.stages[1].score.value > 0.9


def test_the_tiny_llama_on_stories(shared, tmp_path):
    """A real decoder: prune by key/value group, int8, ONNX, perplexity."""
    recipe = {
        "model": {"source": str(shared / "models" / "stories260k")},
        "task": {"kind": "causal-lm", "data": str(shared / "data/tinystories/validation.txt.gz"),
                 "max_length": 256, "overlap": "drop",
                 "splits": {"train": "train[:2000]", "calibration": "train[2000:2200]",
                            "gate": "train[3000:3600]"}},
        "target": {"loads": [{"batch": 1, "sequence": 128}], "rounds": 6},
        "steps": [{"step": "prune", "heads": 0.1, "neurons": 0.1},
                  {"step": "finetune", "learning_rate": 3e-4, "teacher": "original"},
                  {"step": "quantize"}, {"step": "export"}],
        "budget": {"max_perplexity_ratio": 1.25},
    }  # fmt: skip
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert sum(report.stages[1].heads) == 18  # of 5 layers x 4 groups
    # Its README: 5.3 for all of the text as stored, in other windows.
    assert 4 < report.stages[0].score.value < 7
    assert report.verdict.outcome == "pass"
