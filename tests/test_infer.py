"""infer.py of an artifact gives what torch and transformers give, of every task."""

import json
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from conftest import ROWS, WORDS, other_task
from PIL import Image
from transformers import AutoTokenizer, DeiTImageProcessorPil, ViTImageProcessorPil

from benchmarks.tasks import TASKS
from pipeline import from_pretrained, infer, run
from pipeline.manifest import Damaged, read, seal
from pipeline.verification import verify


def write_tags(folder):
    rows = [{"tokens": text.split(), "ner_tags": ["B-x" if w in WORDS[:3] else "O"
            for w in text.split()]} for text, _ in ROWS[:100]]  # fmt: skip
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return other_task(
        folder, "token-classification", "bert-tokens", id2label={0: "O", 1: "B-x"}, num_labels=2
    )


def write_questions(folder):
    rows = [
        {
            "question": "the film",
            "context": text,
            "answers": {"text": [text.split()[1]], "answer_start": [text.index(" ") + 1]},
        }
        for text, _ in ROWS[:100]
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return other_task(folder, "question-answering", "bert-answers")


def write_stories(folder):
    rows = [{"text": text} for text, _ in ROWS[:100]]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return other_task(folder, "causal-lm", "llama")


def publish(folder, content):
    """Export a model without a change, whatever it is good for, and return the artifact."""
    from pipeline.recipe import Recipe

    limit = {"max_size": 5.0}
    recipe = content | {"steps": [{"step": "export"}], "budget": limit}
    assert run(Recipe.model_validate(recipe), folder / "out").verdict.outcome == "pass"
    return folder / "out" / "artifact"


def test_infer_tags_words_as_torch_does(tmp_path):
    artifact = publish(tmp_path, write_tags(tmp_path))
    texts = [text for text, _ in ROWS[:5]]
    model, tokenizer = from_pretrained(tmp_path / "model"), AutoTokenizer.from_pretrained(artifact)
    for text, answer in zip(texts, infer.Model(artifact)(texts), strict=True):
        words = text.split()
        encoded = tokenizer([words], is_split_into_words=True, return_tensors="pt")
        encoded.pop("token_type_ids", None)
        expected = model(**encoded).logits[0].argmax(-1)[1:-1]  # a token a word
        assert answer == {"words": words, "tags": [["O", "B-x"][at] for at in expected]}


def test_infer_finds_answers_in_contexts_longer_than_a_window(tmp_path):
    artifact = publish(tmp_path, write_questions(tmp_path))
    context = " ".join(text for text, _ in ROWS[:4])
    (answer,) = infer.Model(artifact)(["the film"], [context])
    # The same by the task's own code, over the windows that transformers makes.
    task, tokenizer = TASKS["question-answering"], AutoTokenizer.from_pretrained(artifact)
    row = {"id": "0", "question": "the film", "context": context,
           "answers": {"text": [answer["answer"]],
                       "answer_start": [context.index(answer["answer"])]}}  # fmt: skip
    (example,) = task.encode([row], tokenizer, [], 16)
    assert len(example.windows) > 1
    model = from_pretrained(tmp_path / "model")
    outputs = []
    for window in example.windows:
        given = {k: torch.from_numpy(a)[None] for k, a in window.inputs.items()}
        outputs.append({k: v[0].detach().numpy() for k, v in model(**given).items()})
    assert task.judge(example, outputs).columns["exact_match"] == 1
    with pytest.raises(ValueError, match="found questions alone, expected a context"):
        infer.Model(artifact)(["the film"])


def test_infer_goes_on_with_a_text_as_torch_does(tmp_path):
    artifact = publish(tmp_path, write_stories(tmp_path))
    model, tokenizer = from_pretrained(tmp_path / "model"), AutoTokenizer.from_pretrained(artifact)
    text = ROWS[0][0]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    (answer,) = infer.Model(artifact)([text])
    texts = tokenizer.batch_decode([wanted[0], ids[0]], skip_special_tokens=True)
    assert answer["continuation"] == texts[0][len(texts[1]) :]
    fused = onnx.load(artifact / "onnx" / "model.onnx")
    assert "SimplifiedLayerNormalization" in {node.op_type for node in fused.graph.node}
    assert verify(artifact).graphs == 2  # Triton's copy is one
    _, about = read(artifact)
    onnx.save(fused, artifact / "onnx" / "model.onnx", save_as_external_data=True,
              location="model.onnx_data", size_threshold=1024)  # fmt: skip
    seal(artifact, about)
    assert verify(artifact).graphs == 2
    (artifact / "onnx" / "model.onnx_data").rename(artifact / "elsewhere.bin")
    seal(artifact, about)
    with pytest.raises(Damaged, match="expected them in a whole file of that folder"):
        verify(artifact)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_infer_writes_targets_as_torch_does(tmp_path, family):
    rows = [{"source": text, "target": " ".join(text.split()[:4])} for text, _ in ROWS[:100]]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = other_task(tmp_path, "seq2seq-lm", family)
    rules = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    rules |= {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(rules))
    artifact = publish(tmp_path, recipe)
    texts = [text for text, _ in ROWS[:3]]
    model, tokenizer = from_pretrained(tmp_path / "model"), AutoTokenizer.from_pretrained(artifact)
    expected = []
    for text in texts:
        given = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        ids = {name: given[name] for name in ("input_ids", "attention_mask")}
        wanted = model.generate(**ids, max_new_tokens=9, do_sample=False, num_beams=1)
        target = tokenizer.decode(wanted[0, 1:], skip_special_tokens=True)
        expected.append({"source": text, "target": target})
    assert len({answer["target"] for answer in expected}) > 1
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'datasets')));"
        "import runpy; runpy.run_path('infer.py', run_name='__main__')"
    )
    command = [sys.executable, "-P", "-c", script, *texts, "--tokens", "9"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=artifact)
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(line) for line in ran.stdout.splitlines()] == expected
    text = (artifact / "generation_config.json").read_text()
    rules = json.dumps(json.loads(text) | {"guidance_scale": 2.0})
    (artifact / "generation_config.json").write_text(rules)
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=artifact)
    assert ran.returncode == 1
    assert re.fullmatch(r"infer.py: .*found guidance_scale, expected no such rule .*\n", ran.stderr)
    (artifact / "generation_config.json").write_text(text)
    assert verify(artifact).graphs == 4  # two, and Triton's copies
    opened = infer.Model(artifact)
    assert infer.golden(artifact, opened.run) <= 1e-5
    golden = dict(np.load(artifact / "golden.npz"))
    golden["input.input_ids"][0, :3] = 7  # what the encoder reads counts
    np.savez(artifact / "golden.npz", allow_pickle=False, **golden)
    assert infer.golden(artifact, opened.run) > 1e-2


@pytest.mark.parametrize("processor", ["vit", "deit"])
def test_infer_sees_images_as_the_processor_does(tmp_path, processor):
    small = ViTImageProcessorPil(size={"height": 8, "width": 8})
    processor = small if processor == "vit" else DeiTImageProcessorPil()  # which crops
    processor.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (13, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    model = type("Model", (), {"folder": tmp_path})()
    np.testing.assert_allclose(infer.pixels(model, tmp_path / "image.png"), expected, atol=1e-6)


def test_infer_refuses_images_that_are_made_otherwise(tmp_path):
    about = {"do_resize": True, "size": {"shortest_edge": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match=r"preprocessor_config.json: found .*shortest_edge"):
        infer.pixels(type("Model", (), {"folder": tmp_path})(), tmp_path / "image.png")
