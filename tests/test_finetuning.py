"""Training learns, imitates, repeats itself, and says when it fails."""

import json

import numpy as np
import pytest
import torch
from conftest import sentences, write_model
from safetensors import safe_open
from tiny_models import batch, inputs, tiny
from torch.nn import functional
from transformers import AutoTokenizer

from benchmarks.accuracy import silent
from benchmarks.examples import padding
from benchmarks.tasks import TASKS
from pipeline import masks, prune_heads, structure
from pipeline.distillation import Teacher, Weights, distillation, hidden_distance, loss
from pipeline.finetuning import TrainingError, _weights, finetune

ROWS = [{"text": text, "label": label, "id": "0" * 64} for text, label in sentences(200)]


@pytest.fixture
def setting(tmp_path):
    model = write_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    examples = TASKS["text-classification"].encode(ROWS, tokenizer, ("0", "1"), 16)
    return model, examples, padding(tokenizer)


def train(setting, **changes):
    model, examples, pad = setting
    options = {"epochs": 1, "learning_rate": 2e-3, "batch_size": 16} | changes
    return finetune(model, examples, pad, **options)


def test_the_loss_falls(setting):
    first = train(setting)
    for _ in range(3):
        last = train(setting)
    assert last.loss < 0.85 * first.loss
    assert not setting[0].training


def test_the_same_seed_gives_the_same_weights(tmp_path):
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        model = write_model(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        examples = TASKS["text-classification"].encode(ROWS, tokenizer, ("0", "1"), 16)
        train((model, examples, padding(tokenizer)), seed=seed)
        weights.append(model.classifier.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_in_bf16_models_compute_and_losses_do_not(setting, tmp_path, monkeypatch):
    model = setting[0]
    teacher = Teacher(write_model(tmp_path / "teacher"), 1.0, task_weight=0.5, hidden_weight=0.1)
    kinds = {"student": set(), "teacher": set()}
    for name, each in (("student", model), ("teacher", teacher.model)):
        each.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
            lambda _, __, output, name=name: kinds[name].add(output.dtype)
        )
    summed = set()
    divergence = functional.kl_div
    monkeypatch.setattr(
        functional,
        "kl_div",
        lambda *a, **k: summed.update(x.dtype for x in a) or divergence(*a, **k),
    )
    first = train(setting, precision="bf16", teacher=teacher)
    assert summed == {torch.float32}
    assert kinds == {"student": {torch.bfloat16}, "teacher": {torch.bfloat16}}
    for _ in range(3):
        last = train(setting, precision="bf16", teacher=teacher)
    assert last.loss < 0.85 * first.loss
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    train(setting)
    assert torch.float32 in kinds["student"]


def test_frozen_embeddings_stay(setting):
    table = setting[0].get_input_embeddings().weight
    before = table.detach().clone()
    train(setting, freeze_embeddings=True)
    assert torch.equal(table, before)
    assert table.requires_grad
    train(setting)
    assert not torch.equal(table, before)


def test_a_pruned_student_comes_near_its_teacher(setting, tmp_path):
    model, examples, pad = setting
    for _ in range(3):
        train(setting)
    teacher = write_model(tmp_path / "teacher")
    teacher.load_state_dict(model.state_dict())
    prune_heads(model, {0: [0], 1: [1, 2], 2: [3]})
    inputs = {
        "input_ids": torch.tensor(
            np.stack([e.windows[0].inputs["input_ids"][:5] for e in examples])
        )
    }

    def distance() -> float:
        with torch.no_grad():
            return float(distillation(model(**inputs).logits, teacher(**inputs).logits, 1.0, None))

    before = distance()
    guide = Teacher(teacher, temperature=2.0, task_weight=0.0, hidden_weight=0.1)
    for _ in range(3):
        finetune(model, examples, pad, epochs=1, learning_rate=1e-3, batch_size=16, teacher=guide)
    assert distance() < 0.7 * before


@pytest.mark.parametrize("beside", ["nothing", "patience", *masks.LEARNERS])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, beside):
    file = tmp_path / "checkpoint"

    def trained(name, track=silent, **options):
        model = write_model(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        examples = TASKS["text-classification"].encode(ROWS, tokenizer, ("0", "1"), 16)
        setting = model, examples, padding(tokenizer)
        learnt = {}
        if beside == "patience":
            options |= {
                "evaluate": lambda: -float(model.classifier.weight.detach().norm()),
                "patience": 9,
            }
        elif beside in masks.LEARNERS:
            groups = [g for g in structure.groups(model) if g.kind != "queries"]
            learner = masks.LEARNERS[beside](groups, {"heads": 0.5, "neurons": 0.25})
            options["learner"], learnt = learner, learner.tensors()
        result = train(setting, epochs=6, track=track, save_seconds=0.01, **options)
        return model.state_dict() | learnt, result

    def interrupted(steps, what, total):
        for step in steps:
            if step == 50:
                raise KeyboardInterrupt
            yield step

    whole, result = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("killed", interrupted, checkpoint=file)
    with safe_open(file, "pt") as stored:
        assert 1 <= json.loads(stored.metadata()["state"])["step"] <= 50
    stored = file.read_bytes()
    resumed, again = trained("resumed", checkpoint=file)
    assert again == result
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for at in (
        (len(stored) // 2, 9, 2) if beside == "nothing" else ()
    ):  # a damaged one counts as none
        file.write_bytes(stored[:at] + bytes([stored[at] ^ 4]) + stored[at + 1 :])
        resumed, again = trained("damaged", checkpoint=file)
        assert again == result
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_best_weights_are_kept_and_patience_ends_training(setting):
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2])
    seen = []

    def evaluate():
        seen.append(setting[0].classifier.weight.detach().clone())
        return next(scores)

    result = train(setting, epochs=4, evaluate=evaluate, evaluations=10, patience=3)
    assert list(result.scores.values()) == [0.1, 0.5, 0.4, 0.3, 0.2]
    assert result.step == list(result.scores)[1]
    assert torch.equal(setting[0].classifier.weight, seen[1])


def test_means_of_processes_average_to_that_of_the_batch():
    labels = [[1, -100, 2], [-100, 3], [4, 5, 6, 7], [8, 9], [-100, -100, 1]]
    batch = [{"labels": np.array(of), "attention_mask": np.ones(len(of))} for of in labels]
    classes = [{"labels": np.array(1), "attention_mask": np.ones(len(of))} for of in labels]

    def weights(model, windows):
        return [_weights(model, windows[at::2], windows, 2) for at in (0, 1)]

    tagger, writer, classifier = tiny("bert-tokens"), tiny("llama"), tiny("bert")
    assert weights(tagger, batch) == [
        Weights(own=2 * n / 10, logits=2 * n / 10, tokens=2 * m / 14, targets=2 * n / 10)
        for n, m in ((7, 10), (3, 4))
    ]
    # The first token of a text is foretold by none.
    assert [each.own for each in weights(writer, batch)] == [2 * 5 / 7, 2 * 2 / 7]
    assert weights(classifier, classes) == [
        Weights(own=2 * n / 5, logits=2 * n / 5, tokens=2 * m / 14, targets=2 * n / 5)
        for n, m in ((3, 10), (2, 4))
    ]
    assert _weights(classifier, [], classes[:1], 2) == Weights(0, 0, 0, 0)


def test_a_part_without_labels_adds_nothing():
    """The mean over no label is NaN; the labels of the batch are another process's then."""
    model = tiny("llama")
    given = inputs(model)
    nothing = given | {"labels": torch.full_like(given["input_ids"], -100)}
    found = loss(model, nothing, None, Weights(0, 0, 0, 0))
    found.backward()
    assert found == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert loss(model, nothing, None).isnan()  # and where they should be there it is told


def test_distillation_is_the_scaled_divergence():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    p, q = (functional.softmax(x / 2, -1) for x in (teacher, student))
    by_hand = 4 * ((p * (p.log() - q.log())).sum(-1) * mask).sum() / 7
    torch.testing.assert_close(distillation(student, teacher, 2.0, mask), by_hand)
    assert float(distillation(teacher, teacher, 2.0, mask)) == pytest.approx(0, abs=1e-6)


def test_of_one_output_it_is_the_squared_difference():
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [4.0]])
    assert float(distillation(student, teacher, 2.0, None)) == (0.25 + 4) / 2


@pytest.mark.parametrize(("task_weight", "hidden_weight"), [(0.0, 0.0), (0.3, 0.0), (0.3, 0.7)])
def test_the_loss_is_the_weighted_sum_of_its_terms(tmp_path, task_weight, hidden_weight):
    student, teacher = write_model(tmp_path / "a"), write_model(tmp_path / "b", seed=1)
    given = batch(9) | {"labels": torch.tensor([0, 1])}
    given["input_ids"] = given["input_ids"] % 10
    guide = Teacher(teacher, 2.0, task_weight, hidden_weight)
    with torch.no_grad():
        own, other = (m(**given, output_hidden_states=True) for m in (student, teacher))
        found = loss(student, given, guide)
    expected = task_weight * own.loss + (1 - task_weight) * distillation(
        own.logits, other.logits, 2.0, None
    )
    states = own.hidden_states, other.hidden_states
    expected = expected + hidden_weight * hidden_distance(*states, given["attention_mask"])
    torch.testing.assert_close(found, expected)


def test_both_stacks_of_an_encoder_decoder_are_compared():
    student, teacher = tiny("t5"), tiny("t5", seed=1)
    given = inputs(student)
    labels = given["decoder_input_ids"].clone()
    labels[1, 4:] = -100
    given["labels"] = labels
    with torch.no_grad():
        own, other = (m(**given, output_hidden_states=True) for m in (student, teacher))
        found = loss(student, given, Teacher(teacher, 2.0, 0.3, 0.7))
    encoders = hidden_distance(
        own.encoder_hidden_states, other.encoder_hidden_states, given["attention_mask"]
    )
    decoders = hidden_distance(
        own.decoder_hidden_states, other.decoder_hidden_states, labels != -100
    )
    expected = 0.3 * own.loss + 0.7 * (encoders + decoders) / 2
    expected += 0.7 * distillation(own.logits, other.logits, 2.0, labels != -100)
    torch.testing.assert_close(found, expected)


def test_hidden_distance_matches_layers_by_depth():
    states = [torch.full((1, 1, 4), float(at)) for at in range(1, 6)]
    assert float(hidden_distance(states, states, None)) == 0
    assert float(hidden_distance([states[0], states[2], states[4]], states, None)) == 0
    doubled = [2 * state for state in states]
    assert float(hidden_distance(doubled, states, None)) == pytest.approx(1.0)


def test_a_loss_that_is_not_a_number_names_the_step(setting):
    setting[0].classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="finetune: found the loss nan at step 1"):
        train(setting)


def test_gradients_that_are_not_numbers_name_the_step(setting):
    weight, steps = setting[0].classifier.weight, []

    def overflow(gradient):
        steps.append(1)
        return gradient * torch.inf if len(steps) == 3 else gradient

    handle = weight.register_hook(overflow)
    with pytest.raises(TrainingError, match=r"found gradients of the norm .* at step 3"):
        train(setting)
    handle.remove()
