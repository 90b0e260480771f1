"""Cutting is exact, recorded, and refuses what cannot be."""

import pytest
import torch
from tiny_models import batch, tiny
from transformers import PreTrainedModel

from pipeline import (
    from_pretrained,
    prune_heads,
    prune_layers,
    prune_neurons,
    prune_queries,
    pruning,
    save_pretrained,
    structure,
    units,
)
from pipeline.criteria import CRITERIA
from pipeline.pruning import choose, choose_and_cut

HEADS = {0: [1], 1: [0, 2], 2: [0, 1, 3]}
NEURONS = {0: [5], 1: [*range(10, 30)], 2: [*range(47)]}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def mask(model: PreTrainedModel, kind: str, removed: dict[int, list[int]]) -> None:
    """Zero the readers' columns of units: what a cut must be equal to."""
    for group in structure.groups(model):
        if group.kind == kind and group.layer in removed:
            weight = structure.matrix(group.reader)
            width = weight.shape[1] // group.of
            for unit in removed[group.layer]:
                weight.data[:, unit * width : (unit + 1) * width] = 0


def test_units_counts_heads_and_neurons_in_module_order(family):
    found = units(tiny(family))
    assert list(found.heads.values()) == [4, 4, 4]
    assert list(found.neurons.values()) == [48, 48, 48]
    modules = [name for name, _ in tiny(family).named_modules()]
    for paths in (found.heads, found.neurons):
        places = [modules.index(path) for path in paths]
        assert places == sorted(places)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cut_equals_masked(family, attention):
    cut = tiny(family, attn_implementation=attention)
    masked = tiny(family, attn_implementation=attention)
    whole = logits(cut)
    mask(masked, "heads", HEADS)
    mask(masked, "neurons", NEURONS)
    prune_heads(cut, HEADS)
    prune_neurons(cut, NEURONS)
    assert list(units(cut).heads.values()) == [3, 2, 1]
    assert list(units(cut).neurons.values()) == [47, 28, 1]
    torch.testing.assert_close(logits(cut), logits(masked), atol=1e-5, rtol=1e-5)
    assert (logits(cut) - whole).abs().max() > 0.1


def test_cutting_nothing_changes_nothing(family):
    model = tiny(family)
    before = logits(model)
    prune_heads(model, {})
    prune_neurons(model, {0: []})
    assert torch.equal(logits(model), before)


def test_parameters_are_those_counted_by_hand():
    model = tiny("bert")
    before = model.num_parameters()
    prune_heads(model, {0: [0, 3], "bert.encoder.layer.2.attention": [1]})
    prune_neurons(model, {1: [0, 1, 2]})
    # A head: 8 rows of q, k, v with biases, 8 columns of the output. A neuron: 32 + 1 + 32.
    assert before - model.num_parameters() == 3 * (3 * 8 * 33 + 8 * 32) + 3 * 65


def test_cutting_twice_is_cutting_the_union(family):
    once, twice = tiny(family), tiny(family)
    prune_heads(once, {1: [0, 2], 2: [3]})
    prune_neurons(once, {1: [4, 7, 9]})
    prune_heads(twice, {1: [0]})
    prune_neurons(twice, {1: [4, 9]})
    prune_heads(twice, {1: [0, 2], 2: [3]})
    prune_neurons(twice, {1: [7]})
    assert torch.equal(logits(once), logits(twice))
    assert once.config.pruning == twice.config.pruning


def test_saved_and_loaded_is_the_same_and_can_be_cut_again(family, tmp_path):
    model, expected = tiny(family), tiny(family)
    prune_heads(model, {0: [1], 1: [0, 2]})
    prune_neurons(model, {2: [*range(13)]})
    prune_layers(model, [1])
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.pruning == model.config.pruning
    prune_heads(loaded, {0: [2], 2: [0]})
    prune_heads(expected, {0: [1, 2], 2: [0]})
    prune_neurons(expected, {2: [*range(13)]})
    prune_layers(expected, [1])
    assert torch.equal(logits(loaded), logits(expected))
    loaded(**batch()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_the_stock_class_refuses_a_pruned_folder(family, tmp_path):
    model = tiny(family)
    prune_heads(model, {0: [1]})
    save_pretrained(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path)


def test_a_model_without_layers_loads_in_the_stock_class(tmp_path):
    model = tiny("llama")
    prune_layers(model, [0])
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_generation_with_a_cache_equals_without():
    model = tiny("llama")
    prune_heads(model, {0: [1], 1: [0, 2]})
    prune_layers(model, [1])
    ids = batch()["input_ids"][:1]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ({7: [0]}, r"heads: found 7, expected one of \[0, 1, 2\]"),
        ({"encoder": [0]}, "heads: found 'encoder', expected one of"),
        ({0: [9]}, r"attention: found heads \[9\], expected numbers from 0 to 3"),
        ({"bert.encoder.layer.2": [0]}, r"heads: found 'bert\.encoder\.layer\.2'"),
    ],
)
def test_wrong_cuts_are_refused_and_cut_nothing(cuts, message):
    model = tiny("bert")
    before = model.num_parameters()
    with pytest.raises(ValueError, match=message):
        prune_heads(model, cuts)
    assert model.num_parameters() == before


def test_wrong_layers_are_refused():
    model = tiny("bert")
    with pytest.raises(
        ValueError, match=r"layers: found 3, expected encoder\.layer\.0 to encoder\.layer\.2"
    ):
        prune_layers(model, [3])
    with pytest.raises(ValueError, match=r"encoder\.layer: found all layers"):
        prune_layers(model, [0, 1, 2])


def test_choose_takes_the_lowest_but_leaves_one_in_each():
    chosen = choose({"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([0.4, 9.0, 8.0])}, 0.5)
    assert {path: sorted(places.tolist()) for path, places in chosen.items()} == {
        "a": [0, 1],
        "b": [0],
    }


def test_choose_rounds_what_is_left_and_cuts_alike_if_asked():
    scores = {"a": torch.arange(20.0), "b": torch.arange(20.0) + 100}
    counts = [len(places) for places in choose(scores, 0.3).values()]
    assert counts == [12, 0]
    assert [len(p) for p in choose(scores, 0.3, multiple=8).values()] == [12, 4]
    assert [len(p) for p in choose(scores, 0.3, uniform=True).values()] == [6, 6]
    assert choose(scores, 0.3, uniform=True)["b"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("repair", ["none", "bias", "least-squares"])
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_a_head_that_gives_nothing_goes_first(family, criterion, repair):
    if (family, repair) == ("llama", "bias"):
        pytest.skip("its matrices have no bias")
    model = tiny(family)
    dead = {0: [2], 1: [0]}
    for group in structure.groups(model):
        if group.kind == "heads" and group.layer in dead:
            for unit in dead[group.layer]:
                for linear, owners in group.writers:
                    structure.matrix(linear).data[owners == unit] *= 1e-3
    mask(model, "heads", dead)
    before = logits(model)
    labels = (
        {"labels": batch()["input_ids"]}
        if family in {"gpt2", "llama"}
        else {"labels": torch.tensor([0, 1])}
    )
    choice = choose_and_cut(
        model,
        {"heads": 2 / 12},
        criterion=criterion,
        repair=repair,
        data=lambda: iter([{**batch(), **labels}] * 5),
        total=5,
    )
    removed = {path: numbers for path, numbers in choice.removed.items() if numbers}
    assert list(removed.values()) == [[2], [0]]
    torch.testing.assert_close(logits(model), before, atol=1e-3, rtol=1e-3)


def cut_one_head(model, criterion, repair):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 99, (20, 4, 17), generator=generator)
    return choose_and_cut(
        model,
        {"heads": 1 / 12},
        criterion=criterion,
        repair=repair,
        data=lambda: ({"input_ids": each} for each in tokens),
        total=20,
    )


def test_one_of_two_equal_heads_is_free_when_repaired():
    model = tiny("bert")
    first = next(group for group in structure.groups(model) if group.kind == "heads")
    for linear, owners in first.writers:
        for tensor in linear.parameters():
            tensor.data[owners == 1] = tensor.data[owners == 3]
    before = logits(model)
    choice = cut_one_head(model, "reconstruction", "least-squares")
    removed = [numbers for numbers in choice.removed.values() if numbers]
    assert removed in ([[1]], [[3]])
    error_before, error_after = choice.repairs[first.path]
    assert error_after < 1e-3 * error_before
    torch.testing.assert_close(logits(model), before, atol=1e-2, rtol=1e-2)


def test_a_head_that_others_add_up_to_is_free_when_repaired():
    model = tiny("bert")
    first = next(group for group in structure.groups(model) if group.kind == "heads")
    attention = model.bert.encoder.layer[0].attention.self
    for linear, owners in first.writers:
        for tensor in linear.parameters():
            parts = [tensor.data[owners == head] for head in (2, 3)]
            for head in (1, 3):  # these three look at the same tokens
                tensor.data[owners == head] = parts[0]
            if linear is attention.value:
                tensor.data[owners == 3] = parts[1]
                tensor.data[owners == 1] = parts[0] - 2 * parts[1]
    before = logits(model)
    choice = cut_one_head(model, "reconstruction", "least-squares")
    assert [numbers for numbers in choice.removed.values() if numbers] in ([[1]], [[2]], [[3]])
    assert list(choice.removed) == [first.path]
    torch.testing.assert_close(logits(model), before, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("criterion", ["importance", "reconstruction"])
def test_second_moments_of_a_few_layers_at_once_give_the_same_cut(criterion, monkeypatch):
    found = []
    for held in (pruning.MOMENTS_BYTES, 1):
        monkeypatch.setattr(pruning, "MOMENTS_BYTES", held)
        model, passes = tiny("bert"), []

        def data():
            passes.append(1)  # noqa: B023 - called in this turn alone
            return iter(
                [{**batch(length), "labels": torch.tensor([0, 1])} for length in range(7, 12)]
            )

        choose_and_cut(
            model,
            {"heads": 0.5, "neurons": 0.5},
            criterion=criterion,
            repair="least-squares",
            data=data,
            total=5,
        )
        found.append((len(passes), logits(model)))
    (once, expected), (often, parted) = found
    assert torch.equal(expected, parted)
    assert once == 2
    assert often == (1 if criterion == "importance" else 6) + 6


def test_a_bias_that_is_not_there_cannot_be_repaired():
    model = tiny("llama")
    before = model.num_parameters()
    with pytest.raises(ValueError, match=r"repair: found no bias in model\.layers\.0\.self_attn"):
        cut_one_head(model, "magnitude", "bias")
    assert model.num_parameters() == before


def test_a_share_of_query_heads_is_refused():
    with pytest.raises(ValueError, match="queries: found a share, expected numbers"):
        choose_and_cut(
            tiny("llama"), {"queries": 0.5}, criterion="magnitude", repair="none",
            data=lambda: iter([]), total=0,
        )  # fmt: skip


def test_chance_follows_the_seed():
    found = []
    for seed in (0, 0, 1):
        model = tiny("bert")
        choice = choose_and_cut(
            model,
            {"neurons": 0.5},
            criterion="random",
            repair="none",
            seed=seed,
            data=lambda: iter([]),
            total=0,
        )
        found.append(choice.removed)
    assert found[0] == found[1] != found[2]


def test_numbers_may_be_those_of_torch_and_have_to_be_whole():
    model = tiny("bert")
    prune_heads(model, {0: torch.tensor([2, 1])})
    assert next(iter(units(model).heads.values())) == 2
    with pytest.raises(ValueError, match=r"heads: found 1\.5, expected whole numbers"):
        prune_heads(model, {1: [1.5]})
    with pytest.raises(ValueError, match="queries: found no grouped-query attention"):
        prune_queries(model, {1: [1]})
    with pytest.raises(ValueError, match="heads: found layer 0, which has several, expected one"):
        prune_heads(tiny("t5"), {0: [1]})


@pytest.mark.parametrize(
    ("prune", "given", "message"),
    [
        (prune_heads, [0], r"heads: found \[0\], expected a mapping, such as \{0: \[1, 2\]\}"),
        (prune_heads, {0: 3}, "heads: found 3, expected a list of numbers"),
        (prune_heads, {0: "3"}, "heads: found '3', expected a list of numbers"),
        (prune_heads, {0: [True]}, "heads: found True, expected whole numbers"),
        (prune_heads, {0.0: [1]}, r"heads: found 0\.0, expected whole numbers"),
        (prune_neurons, {None: [1]}, "neurons: found None, expected whole numbers"),
        (prune_layers, 1, "layers: found 1, expected a list of numbers"),
        (prune_layers, "1", "layers: found '1', expected a list of numbers"),
        (prune_layers, [True], "layers: found True, expected whole numbers"),
    ],
)
def test_what_is_no_cut_is_refused(prune, given, message):
    model = tiny("bert")
    before = model.num_parameters()
    with pytest.raises(ValueError, match=message):
        prune(model, given)
    assert model.num_parameters() == before


def test_a_layer_may_be_named_as_units_names_it():
    one, other = tiny("bert"), tiny("bert")
    prune_layers(one, ["bert.encoder.layer.1"])
    prune_layers(other, ["encoder.layer.1"])
    assert one.config.pruning == other.config.pruning
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("heads", [[0], [0, 1, 2, 3]])
def test_the_record_does_not_depend_on_the_order(heads):
    one, other = tiny("llama"), tiny("llama")
    queries = {1: [0, 2, 4, 6]}
    prune_queries(one, queries)
    prune_heads(one, {1: heads})
    prune_heads(other, {1: heads})
    prune_queries(other, queries)
    assert one.config.pruning == other.config.pruning
    assert torch.equal(logits(one), logits(other))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match="found a file, expected a folder"):
        save_pretrained(tiny("bert"), tmp_path / "model")
