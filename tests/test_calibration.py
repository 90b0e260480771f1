"""What is seen of a layer is what autograd and the data say."""

import pytest
import torch
from tiny_models import FAMILIES, batch, inputs, tiny

from pipeline import pruning, structure
from pipeline.calibration import change_gradients, mask_gradients, moments


def readers(model):
    return {
        group.path: group.reader
        for group in [g for g in structure.groups(model) if g.kind != "queries"]
    }


def labelled(model):
    """Return a batch of what the model takes, with labels of its task."""
    given = inputs(model)
    name = type(model).__name__
    if "Classification" in name:
        return given | {"labels": torch.tensor([0, 1])}
    return given | {"labels": given.get("decoder_input_ids", given.get("input_ids"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_gradients_equal_autograd_on_a_mask(family):
    model = tiny(family)
    data = labelled(model)
    groups = [g for g in structure.groups(model) if g.kind != "queries"]
    counts = {group.path: len(group.kept) for group in groups}
    found = mask_gradients(model, readers(model), counts, [data], total=1)

    for group in [groups[0], groups[-1]]:
        mask = torch.ones(2, counts[group.path], requires_grad=True)
        width = group.width
        handle = group.reader.register_forward_pre_hook(
            lambda _, args, mask=mask, width=width: (
                (
                    args[0].reshape(2, -1, args[0].shape[-1])
                    * mask.repeat_interleave(width, 1)[:, None]
                ).reshape(args[0].shape),
            )
        )
        loss = model(**data).loss * 2
        (expected,) = torch.autograd.grad(loss, mask)
        handle.remove()
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[group.path], expected, rtol=1e-3, atol=1e-4 * scale)
        assert scale > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_to_take_a_units_columns_away_changes_a_loss_as_its_mask_says(family):
    model = tiny(family)
    data = labelled(model)
    groups = [g for g in structure.groups(model) if g.kind != "queries"]
    counts = {group.path: len(group.kept) for group in groups}
    changes = {}
    for group in groups:
        weight = pruning.reader(group)
        away = weight.new_zeros(len(group.kept), *weight.shape)
        for unit in range(len(group.kept)):
            of_unit = torch.arange(unit * group.width, (unit + 1) * group.width)
            away[unit, :, of_unit] = -weight[:, of_unit]
        changes[group.path] = away
    masks = mask_gradients(model, readers(model), counts, [data], total=1)
    found = change_gradients(model, readers(model), changes, [data], total=1)
    for path, expected in masks.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[path], -expected, rtol=1e-3, atol=1e-4 * scale)


def test_change_gradients_foretell_losses_bias_and_all():
    model = tiny("bert")
    data = labelled(model)
    group = structure.groups(model)[-1]
    weight = pruning.reader(group).clone()
    change = 2e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    (found,) = change_gradients(model, {"it": group.reader}, {"it": change[None]}, [data], total=1)[
        "it"
    ].sum(0, keepdim=True)
    losses = []
    for sign in (1, -1):
        pruning.write_reader(group, weight + sign * change)
        with torch.no_grad():
            losses.append(float(model(**data).loss) * 2)
    assert float(found) == pytest.approx((losses[0] - losses[1]) / 2, rel=1e-2)
    assert abs(float(found)) > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_count_the_tokens_of_their_own_side(family):
    model = tiny(family)
    found = moments(model, readers(model), [labelled(model)] * 3, total=3)
    given = inputs(model)
    for path, seen in found.items():
        decodes = model.config.is_encoder_decoder and "decoder" in path
        mask = None if decodes else given.get("attention_mask")
        tokens = given.get("decoder_input_ids") if decodes else mask
        count = float(seen.fit[-1, -1] + seen.held_out[-1, -1])
        if mask is not None:
            assert count % (3 * int(mask.sum())) == 0  # ALBERT's layers add up
        elif tokens is not None:
            assert count == 3 * tokens.numel()
        assert seen.held_out[-1, -1] > 0


def test_too_few_windows_to_hold_one_out_are_refused():
    model = tiny("bert")
    with pytest.raises(ValueError, match="calibration: found 4 windows, expected at least 5"):
        moments(model, readers(model), [batch()] * 2, total=2)


def test_what_is_not_finite_where_it_is_held_out_is_an_error():
    model = tiny("bert")
    data = [batch() for _ in range(3)]
    model.bert.embeddings.word_embeddings.weight.data[5] = torch.nan
    for given in data:
        given["input_ids"][given["input_ids"] == 5] = 6
    data[2]["input_ids"][0, 1] = 5  # the fifth window
    with pytest.raises(FloatingPointError, match="found NaN or infinity"):
        moments(model, readers(model), data, total=3)


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


def test_moments_of_a_decoder_leave_out_what_its_labels_do():
    model = tiny("t5")
    given = inputs(model)
    tokens, ends = given["decoder_input_ids"], (7, 4)
    labels = tokens.clone()
    labels[1, 4:] = -100
    path = "decoder.block.1.layer.1.EncDecAttention"
    found = moments(model, {path: readers(model)[path]}, [given | {"labels": labels}] * 3, total=3)
    # The second of two rows is padded, and the fifth of six is held out: one of the first kind.
    assert float(found[path].held_out[-1, -1]) == ends[0]
    assert float(found[path].fit[-1, -1]) == 2 * ends[0] + 3 * ends[1]


def test_moments_that_are_not_numbers_are_an_error():
    model = tiny("bert")
    model.bert.embeddings.word_embeddings.weight.data[:] = torch.nan
    with pytest.raises(FloatingPointError, match="attention: found NaN or infinity"):
        moments(model, readers(model), [batch()] * 3, total=3)


def test_a_loss_that_is_not_a_number_is_an_error():
    model = tiny("bert")
    model.classifier.weight.data[0, 0] = torch.nan
    data = {**batch(), "labels": torch.tensor([0, 1])}
    counts = dict.fromkeys(readers(model), 1)
    with pytest.raises(FloatingPointError, match="scoring: found the loss nan"):
        mask_gradients(model, readers(model), counts, [data], total=1)
