"""What is seen of a layer is what autograd and the data say."""

import pytest
import torch
from conftest import batch, tiny

from pipeline import structure
from pipeline.calibration import mask_gradients, moments


def readers(model):
    return {
        group.path: group.reader
        for group in [g for g in structure.groups(model) if g.kind != "queries"]
    }


def test_mask_gradients_equal_autograd_on_a_mask(family):
    model = tiny(family)
    labels = batch()["input_ids"] if family in {"gpt2", "llama"} else torch.tensor([0, 1])
    data = {**batch(), "labels": labels}
    groups = [g for g in structure.groups(model) if g.kind != "queries"]
    counts = {group.path: len(group.kept) for group in groups}
    found = mask_gradients(model, readers(model), counts, [data], total=1)

    for group in groups[:2]:
        mask = torch.ones(2, counts[group.path], requires_grad=True)
        width = group.width
        handle = group.reader.register_forward_pre_hook(
            lambda _, args, mask=mask, width=width: (
                args[0].reshape(2, -1, args[0].shape[-1])
                * mask.repeat_interleave(width, 1)[:, None],
            )
        )
        loss = model(**data).loss * 2
        (expected,) = torch.autograd.grad(loss, mask)
        handle.remove()
        torch.testing.assert_close(found[group.path], expected, rtol=1e-4, atol=1e-5)
        assert expected.abs().max() > 1e-3


def test_moments_leave_padding_out_and_hold_windows_out():
    model = tiny("bert")
    path = "bert.encoder.layer.1.attention"
    reader = readers(model)[path]
    seen = []
    handle = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    # Ten windows of two kinds: the fifth is of the whole kind, the tenth of the padded one.
    found = moments(model, {path: reader}, [batch()] * 5, total=5)[path]
    handle.remove()

    def moment(row: int) -> torch.Tensor:
        rows = seen[0][row][batch()["attention_mask"][row].bool()].double()
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
        return rows.T @ rows

    torch.testing.assert_close(found.fit, 4 * moment(0) + 4 * moment(1))
    torch.testing.assert_close(found.held_out, moment(0) + moment(1))


def test_moments_that_are_not_numbers_are_an_error():
    model = tiny("bert")
    model.bert.embeddings.word_embeddings.weight.data[:] = torch.nan
    with pytest.raises(FloatingPointError, match="attention: found NaN or infinity"):
        moments(model, readers(model), [batch()], total=1)


def test_a_loss_that_is_not_a_number_is_an_error():
    model = tiny("bert")
    model.classifier.weight.data[0, 0] = torch.nan
    data = {**batch(), "labels": torch.tensor([0, 1])}
    counts = dict.fromkeys(readers(model), 1)
    with pytest.raises(FloatingPointError, match="scoring: found the loss nan"):
        mask_gradients(model, readers(model), counts, [data], total=1)
