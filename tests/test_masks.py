"""Masks and movement find planted units, reach their targets, and are what they say."""

import pytest
import torch
from conftest import sentences, write_model
from tiny_models import tiny
from transformers import AutoTokenizer

from benchmarks.examples import padding
from benchmarks.tasks import TASKS
from pipeline import masks, structure
from pipeline.finetuning import finetune

FRACTIONS = {"heads": 0.5, "neurons": 0.25}


def groups(model):
    return [group for group in structure.groups(model) if FRACTIONS.get(group.kind)]


@pytest.fixture
def setting(tmp_path):
    model = write_model(tmp_path)
    rows = [{"text": text, "label": label, "id": "0" * 64} for text, label in sentences(200)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    examples = TASKS["text-classification"].encode(rows, tokenizer, ("0", "1"), 16)
    return model, examples, padding(tokenizer)


@pytest.mark.parametrize("name", masks.LEARNERS)
def test_a_head_that_gives_nothing_is_found(setting, name):
    model, examples, pad = setting
    for group in groups(model):
        if group.kind == "heads":  # heads 1 and 2 of every layer write nothing that is read
            structure.matrix(group.reader).data[:, group.width : 3 * group.width] = 0
    for _ in range(3):
        finetune(model, examples, pad, epochs=1, learning_rate=1e-3, batch_size=16)
    for group in groups(model):
        if group.kind == "heads":
            structure.matrix(group.reader).data[:, group.width : 3 * group.width] = 0
    learner = masks.LEARNERS[name](groups(model), FRACTIONS)
    options = {"epochs": 8, "learning_rate": 1e-6, "batch_size": 16}
    finetune(model, examples, pad, learner=learner, **options)
    found = [s for path, s in learner.scores().items() if path.endswith("attention")]
    if name == "movement":
        for scores in found:  # nothing moves towards zero that is zero
            assert scores.abs()[[1, 2]].max() < 0.05 * scores.abs()[[0, 3]].min()
    else:
        flat = torch.stack(found)
        assert flat[:, [0, 3]].mean() > flat[:, [1, 2]].mean()


@pytest.mark.parametrize("name", ["hard-concrete", "exact-k"])
def test_masks_reach_the_share_and_stay_in_the_columns(setting, name):
    model, examples, pad = setting
    learner = masks.LEARNERS[name](groups(model), FRACTIONS)
    options = {"epochs": 30, "learning_rate": 1e-4, "batch_size": 16}
    finetune(model, examples, pad, learner=learner, **options)
    model.eval()
    learner.begin(1.0)
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 7, 3]])}
    with torch.no_grad():
        masked = model(**inputs).logits
        learner.finish()
        torch.testing.assert_close(model(**inputs).logits, masked)
    closed = {kind: [] for kind in FRACTIONS}
    for group in groups(model):
        columns = structure.matrix(group.reader).reshape(-1, len(group.kept), group.width)
        closed[group.kind] += (columns.abs().amax((0, 2)) < 1e-3).tolist()
    for kind, share in FRACTIONS.items():
        assert sum(closed[kind]) / len(closed[kind]) == pytest.approx(share, abs=0.2)


def test_soft_top_k_sums_to_k_and_has_the_right_derivative():
    torch.manual_seed(0)
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def masked(values):
        return masks.soft_top_k(values, 4 / 9, 0.3, False)  # noqa: FBT003

    assert float(masked(logits).detach().sum()) == pytest.approx(4)
    torch.autograd.gradcheck(masked, logits, eps=1e-5, atol=1e-6)
    sharp = masks.soft_top_k(logits, 4 / 9, 1.0, False)  # noqa: FBT003
    assert sharp.topk(4).indices.sort().values.equal(logits.topk(4).indices.sort().values)


def test_hard_concrete_is_open_as_often_as_the_formula_says():
    torch.manual_seed(0)
    logits = torch.full((200_000,), -0.7)
    drawn = masks.hard_concrete(logits, 0.5, 0.0, True)  # noqa: FBT003
    open_share = torch.sigmoid(logits[0] - torch.tensor(0.1 / 1.1).log() / 3)
    assert float((drawn > 0).float().mean()) == pytest.approx(float(open_share), abs=0.005)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_movement_is_the_sum_over_all_parameters_of_a_unit(family):
    model = tiny(family)
    found = [group for group in structure.groups(model) if group.kind in {"heads", "neurons"}]
    learner = masks.Movement(found, {"heads": 1, "neurons": 1})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    learner.see()
    for group in found:
        expected = -structure.by_unit(group).sum(1)
        torch.testing.assert_close(learner.scores()[group.path], expected)
