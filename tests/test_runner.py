"""The whole pipeline on a tiny trained model: what a run leaves, and what it does again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    ROWS,
    WORDS,
    edit_weights,
    other_task,
    secateur,
    sentences,
    write_recipe,
    write_rows,
)
from PIL import Image
from transformers import (
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from benchmarks import energy, speed
from benchmarks.figures import Ratio
from benchmarks.machine import Unavailable
from benchmarks.outcomes import Outcomes
from exporters.onnx.generation import open_generator
from pipeline import Recipe, from_pretrained, infer, run, units
from pipeline.checkpoint import ModelError
from pipeline.manifest import seal
from pipeline.store import verify


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Give a folder with a recipe that was run once, and the report."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(write_recipe(folder), folder / "out")


def test_a_run_leaves_artifact_and_reports(finished):
    folder, report = finished
    assert report.verdict.outcome == "pass"
    assert [stage.name for stage in report.stages] == [
        "finetune", "prune", "finetune-2", "quantize", "export",
    ]  # fmt: skip
    assert report.stages[0].score.value > 0.9
    written = json.loads((folder / "out" / "report.json").read_text())
    assert written["verdict"]["outcome"] == "pass"
    assert written["schema"] == 3
    for name in ("report.md", "report.html"):
        assert "finetune-2" in (folder / "out" / name).read_text()
    artifact = verify(folder / "out" / "artifact")
    assert artifact is not None
    assert artifact.about["verdict"]["outcome"] == "pass"
    assert (artifact.folder / "onnx" / "model.onnx").is_file()
    assert (artifact.folder / "tokenizer.json").is_file()


def test_the_artifact_gives_the_reported_score(finished):
    import onnxruntime

    folder, report = finished
    artifact = folder / "out" / "artifact"
    session = onnxruntime.InferenceSession(str(artifact / "onnx" / "model.onnx"))
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    right = 0
    for text, label in ROWS[800:]:
        encoded = tokenizer(text, truncation=True, max_length=16, return_tensors="np")
        inputs = {i.name: encoded[i.name].astype(np.int64) for i in session.get_inputs()}
        right += int(np.argmax(session.run(["logits"], inputs)[0]) == label)
    # Batches are padded where these are not, which moves int8 ranges a little.
    assert right / 600 == pytest.approx(report.stages[-1].score.value, abs=0.01)


def test_the_report_counts_what_was_cut(finished):
    _, report = finished
    dense, pruned = report.stages[0], report.stages[1]
    assert (sum(dense.heads), sum(pruned.heads)) == (12, 9)
    assert (sum(dense.neurons), sum(pruned.neurons)) == (144, 108)
    assert [len(kept) for kept in pruned.kept_heads] == list(pruned.heads)
    told = pruned.details
    for path, kept in zip(told["scored"], pruned.kept_heads, strict=True):
        assert len(told["scores"][path]) == len(told["scored"][path]) == 4
        assert {*told["scored"][path]} - {*told["removed"].get(path, ())} == {*kept}
    # A head: 3 x 8 x 33 + 8 x 32; a neuron: 32 + 1 + 32.
    assert dense.parameters - pruned.parameters == 3 * (3 * 8 * 33 + 8 * 32) + 36 * 65
    model = from_pretrained(pruned.folder)
    assert tuple(units(model).heads.values()) == pruned.heads
    assert pruned.size_bytes == (Path(pruned.folder) / "model.safetensors").stat().st_size


def test_the_untrained_speeds_are_ratios_of_one_interleaved_run(finished):
    _, report = finished
    first = report.stages[0].loads[0]
    assert first.speedup == Ratio(1.0, 1.0, 1.0)
    for stage in report.stages:
        (load,) = stage.loads
        assert load.latency_ms.samples == 12
        assert load.latency_ms.p90 is None
        assert load.speedup.low <= load.speedup.value <= load.speedup.high
    assert report.stages[3].loads[0].speedup == report.stages[4].loads[0].speedup


def test_a_second_run_is_served_from_the_store(finished):
    folder, report = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "stages").rglob("*.json")}
    again = run(folder / "recipe.yaml", folder / "out")
    after = {path: path.stat().st_mtime_ns for path in (folder / "out" / "stages").rglob("*.json")}
    assert after == before
    assert again == report


def test_a_changed_step_redoes_only_what_follows(finished, tmp_path):
    folder, report = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["steps"][1]["heads"] = 0.5
    names = {path.name for path in (tmp_path / "out" / "stages").iterdir()}
    again = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert sum(again.stages[1].heads) == 6
    assert again.stages[0].folder.endswith(Path(report.stages[0].folder).name)
    new = {path.name for path in (tmp_path / "out" / "stages").iterdir()} - names
    kinds = sorted(name.rpartition("-")[0] for name in new)
    assert kinds == ["finetune", "measured", "measured", "measured", "onnx", "onnx", "prune",
                     "quantize", "timed"]  # fmt: skip


def test_a_model_with_a_zeroed_layer_fails_the_gate(finished, tmp_path):
    """Break the retrained model in the store, seal it again, and go on from there."""
    folder, report = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    stage = tmp_path / "out" / "stages" / Path(report.stages[2].folder).name
    about = verify(stage).about

    def zero(tensors) -> None:
        for name in tensors:
            if "encoder.layer.1." in name and "weight" in name:
                tensors[name].zero_()

    edit_weights(stage, zero)
    seal(stage, about)
    done = secateur("run", folder / "recipe.yaml", "--output", tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert "fail against finetune" in done.stdout
    assert not (tmp_path / "out" / "artifact").exists()
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [check["outcome"] for check in written["verdict"]["checks"]] == ["fail", "pass"]


def test_outcomes_are_kept_for_every_example(finished):
    folder, report = finished
    (some,) = list((folder / "out" / "stages").glob("measured-*/outcomes.safetensors"))[:1]
    outcomes = Outcomes.load(some)
    assert len(outcomes.ids) == report.stages[0].score.examples == 600
    assert len(set(outcomes.ids)) == 600


def test_energy_is_judged_where_there_is_a_sensor(finished, tmp_path, monkeypatch):
    folder, _ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = write_recipe(tmp_path, budget={"max_energy": 5.0})
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    with pytest.raises(Unavailable, match=r"budget.max_energy: this machine has no energy counter"):
        run(path, tmp_path / "out")

    def one_watt():
        return time.monotonic_ns() // 1000

    monkeypatch.setattr(speed, "WINDOW_SECONDS", 0.05)
    monkeypatch.setattr(energy, "counters", lambda _: ([energy.Counter(one_watt, 1 << 63)], ""))
    report = run(path, tmp_path / "out")
    loads = report.stages[-1].loads
    checks = [check for check in report.verdict.checks if check.what.startswith("energy at ")]
    assert [(c.estimate, c.outcome) for c in checks] == [(x.energy.value, "pass") for x in loads]
    for load, before in zip(loads, report.stages[0].loads, strict=True):
        # As long as the calls, and what it takes to ask for them.
        assert load.joules > 0.5 * load.latency_ms.p50 / 1e3
        assert before.energy.value == 1
    assert "joules" in (tmp_path / "out" / "report.html").read_text()


KILLED = {"runtime": "torch", "loads": [{"batch": 2, "sequence": 8}], "rounds": 6, "threads": 1}


@pytest.mark.parametrize("wait_for", ["prune-*", "measured-*"])
def test_a_killed_run_goes_on_where_it_was(tmp_path, wait_for):
    steps = [
        {"step": "finetune", "epochs": 20, "learning_rate": 2e-3},
        {"step": "prune", "heads": 0.25},
    ]
    path = write_recipe(tmp_path, target=KILLED, steps=steps, budget={"max_size": 1.0})
    stages = tmp_path / "out" / "stages"
    command = [sys.executable, "-m", "pipeline", "run", path, "--output", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(stages.glob(wait_for)):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in stages.glob("*/manifest.json")}
    done = secateur("run", path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in finished} == finished


def test_a_torch_target_needs_no_onnx(tmp_path):
    steps = [{"step": "prune", "heads": 0.25, "criterion": "magnitude", "repair": "none"}]
    path = write_recipe(
        tmp_path,
        steps=steps,
        baseline="original",
        target={"runtime": "torch", "loads": [{"batch": 2, "sequence": 8}], "rounds": 6},
        budget={"max_drop": 0.9, "baseline_floor": -1.0},
    )
    report = run(path, tmp_path / "out")
    assert [stage.runtime for stage in report.stages] == ["torch", "torch"]
    assert (tmp_path / "out" / "artifact" / "model.safetensors").is_file()
    assert list((tmp_path / "out" / "stages").glob("onnx-*")) == []


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


@pytest.mark.slow
def test_the_reference_classifier_on_sst2(shared, tmp_path):
    recipe = {
        "model": {"source": str(shared / "models" / "minilm-sst2")},
        "task": {"kind": "text-classification", "data": str(shared / "data" / "sst2"),
                 "columns": {"text": "sentence"}, "max_length": 64, "overlap": "drop",
                 "splits": {"train": "train[2000:8000]", "calibration": "train[:512]",
                            "gate": "validation"}},
        "target": {"loads": [{"batch": 1, "sequence": 128}, {"batch": 8, "sequence": 128}]},
        "steps": [{"step": "prune", "heads": 0.33, "neurons": 0.33},
                  {"step": "finetune", "teacher": "original"},
                  {"step": "quantize", "embeddings": True}, {"step": "export"}],
        "budget": {"max_drop": 0.03, "min_speedup": 1.5, "max_size": 0.4},
    }  # fmt: skip
    report = run(Recipe.model_validate(recipe), tmp_path / "out")
    assert report.stages[0].score.value == pytest.approx(0.8979, abs=1e-4)  # its README's accuracy
    assert report.verdict.outcome == "pass"
