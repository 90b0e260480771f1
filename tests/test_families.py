"""Every family: a cut is exact, whatever is cut, and survives saving and loading."""

import copy
import math

import onnx
import pytest
import torch
from tiny_models import FAMILIES, SHARED, SIZES, grouped, inputs, tiny
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from exporters import onnx as exporter
from pipeline import (
    from_pretrained,
    prune_heads,
    prune_layers,
    prune_neurons,
    prune_queries,
    save_pretrained,
    structure,
    surgery,
)
from pipeline.checkpoint import ModelError
from pipeline.structure import Group

# Relative to the largest logit. Sharp weights carry rounding on from layer to layer, so that fp32
# alone could not tell a small mistake from none; fp64 can.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Their graphs are written as another's are; an export takes as long as all other tests of a family.
ALIKE = {
    "camembert": "roberta",
    "deit": "vit",
    "electra": "bert",
    "falcon multi-query": "falcon grouped",
    "gemma": "gemma2",
    "marian": "bart",
    "mbart": "bart",
    "mistral": "llama",
    "qwen2": "llama",
    "smollm3": "llama",
    "xlm-roberta": "roberta",
}
EXPORTED = [
    pytest.param(family, marks=[pytest.mark.slow] if family in ALIKE else []) for family in FAMILIES
]
GENERATE = [f for f, (_, task, _) in FAMILIES.items() if "Classification" not in task]


@pytest.fixture(params=FAMILIES)
def every(request: pytest.FixtureRequest) -> str:
    """Give every family in turn."""
    return str(request.param)


def logits(model: PreTrainedModel, **given: torch.Tensor) -> torch.Tensor:
    given = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in (given or inputs(model)).items()
    }
    with torch.no_grad():
        return model(**given).logits


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    """Assert equal weights, and outputs that differ by rounding: memory is aligned otherwise."""
    tensors, others = one.state_dict(), other.state_dict()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert difference(logits(one), logits(other)) < 1e-6


def of_kind(model: PreTrainedModel, kind: str) -> list[Group]:
    return [group for group in structure.groups(model) if group.kind == kind]


def plan(model: PreTrainedModel, kind: str, *, emptied: bool) -> dict[str, list[int]]:
    """Return other units for each layer: one left, some left, and if asked for none left."""
    cuts = {}
    for at, group in enumerate(of_kind(model, kind)):
        sets = [range(1, group.of), range(0, group.of, 2), [], range(group.of - 1)]
        if emptied:
            sets = [range(group.of), *sets[1:]]
        cuts[group.path] = [*sets[at % 4]]
    return cuts


def mask(model: PreTrainedModel, kind: str, cuts: dict[str, list[int]]) -> None:
    """Zero the readers' columns of units: what a cut must be equal to."""
    for group in of_kind(model, kind):
        weight, width = structure.matrix(group.reader), group.width
        for unit in cuts[group.path]:
            weight.data[:, unit * width : (unit + 1) * width] = 0


def cut(model: PreTrainedModel, *, emptied: bool) -> PreTrainedModel:
    heads, neurons = (plan(model, kind, emptied=emptied) for kind in ("heads", "neurons"))
    prune_heads(model, heads)
    prune_neurons(model, neurons)
    return model


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("emptied", [False, True], ids=["some left", "none left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cut_equals_masked(every, attention, emptied, dtype):
    try:
        masked = tiny(every, attn_implementation=attention).to(dtype)
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        pytest.skip(f"{every} has no {attention} attention")
    whole = logits(masked)
    for kind in ("heads", "neurons"):
        mask(masked, kind, plan(masked, kind, emptied=emptied))
    model = cut(tiny(every, attn_implementation=attention).to(dtype), emptied=emptied)
    assert difference(logits(model), logits(masked)) < TOLERANCE[dtype]
    assert difference(logits(model), whole) > 1e-3


def test_cutting_nothing_changes_nothing(every):
    model = tiny(every)
    before = logits(model)
    for prune, kind in ((prune_heads, "heads"), (prune_neurons, "neurons")):
        prune(model, {group.path: [] for group in of_kind(model, kind)})
    assert torch.equal(logits(model), before)
    for kind in structure.KINDS:
        for group in of_kind(model, kind):
            surgery.keep(model, group, list(group.kept))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("emptied", [False, True], ids=["some left", "none left"])
def test_saved_and_loaded_is_the_same(every, emptied, tmp_path):
    model = cut(tiny(every), emptied=emptied)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    same(loaded, model)
    assert loaded.config.pruning == model.config.pruning
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path)


def test_cut_twice_is_cut_once_with_both(every, tmp_path):
    once, twice = tiny(every), tiny(every)
    first = {group.path: [0] for group in of_kind(once, "heads")}
    cut(once, emptied=True)
    prune_heads(once, first)
    prune_heads(twice, first)
    save_pretrained(twice, tmp_path)
    twice = cut(from_pretrained(tmp_path), emptied=True)
    same(once, twice)
    assert once.config.pruning == twice.config.pruning


def test_layers_are_cut_and_the_stock_class_loads_the_rest(every, tmp_path):
    model, whole = tiny(every), tiny(every)
    if every == "albert":
        with pytest.raises(ValueError, match="found layers that share their weights"):
            prune_layers(model, [0])
        return
    prune_layers(model, [f"{stack.layers}.1" for stack, _ in structure.stacks(model)])
    save_pretrained(model, tmp_path)
    same(from_pretrained(tmp_path), model)
    same(type(model).from_pretrained(tmp_path).eval(), model)
    assert difference(logits(model), logits(whole)) > 1e-3


@pytest.mark.parametrize("name", ["modernbert", "t5"])
def test_a_layer_that_others_need_stays(name):
    model = tiny(name)
    stack = structure.stacks(model)[0][0].layers
    with pytest.raises(ValueError, match=r"\.0: found layer 0, expected another one"):
        prune_layers(model, [f"{stack}.0"])


def test_layers_whose_attention_depends_on_their_number_stay():
    with pytest.raises(ValueError, match="h: found attention that is scaled by its layer's number"):
        prune_layers(tiny("gpt2", scale_attn_by_inverse_layer_idx=True), [1])


def test_a_layer_of_two_stacks_is_named_with_its_stack():
    model = tiny("bart")
    with pytest.raises(
        ValueError, match=r"expected encoder\.layers\.0 to encoder\.layers\.1 or de"
    ):
        prune_layers(model, [1])
    with pytest.raises(ValueError, match="heads: found layer 1, which has several, expected one"):
        prune_heads(model, {1: [0]})
    prune_layers(model, ["decoder.layers.0"])
    prune_heads(model, {"model.decoder.layers.0.encoder_attn": [0]})
    assert model.config.decoder_layers == 1


@pytest.mark.parametrize("queries", [[0], [0, 1, 2, 4, 6], [*range(8)]])
def test_query_heads_that_leave_uneven_groups_are_refused(queries):
    model = tiny("llama")
    before = model.num_parameters()
    with pytest.raises(ValueError, match="query heads left of a key/value head, expected as many"):
        prune_queries(model, {0: queries})
    assert model.num_parameters() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "found version 2, expected 1; a newer secateur wrote it"),
        ({"heads": {"encoder.layer.9.attention": {"kept": [0], "of": 4}}}, "no such module"),
    ],
)
def test_a_record_of_something_else_is_refused(change, message, tmp_path):
    model = tiny("bert")
    prune_heads(model, {0: [1]})
    model.config.pruning |= change
    save_pretrained(model, tmp_path)
    with pytest.raises(ModelError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["falcon multi-query", "falcon grouped", *SHARED])
def test_query_heads_go_from_every_group(name, tmp_path):
    model, masked = grouped(name), grouped(name)
    cuts = {}
    for at, group in enumerate(of_kind(model, "queries")):
        each = group.queries // group.heads
        cuts[group.path] = [head * each + at % each for head in range(group.heads)]
    mask(masked, "queries", cuts)
    prune_queries(model, cuts)
    assert difference(logits(model), logits(masked)) < TOLERANCE[torch.float32]
    if model.config.model_type != "falcon" or not model.config.multi_query:
        heads = {group.path: [1] for group in of_kind(model, "heads")}
        mask(masked, "heads", heads)
        prune_heads(model, heads)
        assert difference(logits(model), logits(masked)) < TOLERANCE[torch.float32]
    save_pretrained(model, tmp_path)
    same(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("emptied", [False, True], ids=["some left", "none left"])
@pytest.mark.parametrize("name", GENERATE)
def test_with_a_cache_as_without(name, emptied):
    check_cache(cut(tiny(name), emptied=emptied))


@pytest.mark.parametrize("name", ["gemma2", "llama", "falcon grouped"])
def test_with_a_cache_as_without_after_queries_and_layers_went(name):
    model = tiny(name)
    prune_queries(model, {2: [0, 2, 4, 6]})
    prune_layers(model, [1])
    prune_heads(model, {0: range(4)})
    check_cache(model)


def check_cache(model: PreTrainedModel) -> None:
    given = {k: v[:1] for k, v in inputs(model).items() if k != "attention_mask"}
    decoded = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    tokens = given.pop(decoded)
    whole = logits(model, **given, **{decoded: tokens})
    found, cache = [], None
    with torch.no_grad():
        for part in tokens.split([3, 2, tokens.shape[1] - 5], dim=1):
            step = {decoded: part, "past_key_values": cache, "use_cache": True}
            outputs = model(**given, **step)
            found.append(outputs.logits)
            cache = outputs.past_key_values
    assert difference(torch.cat(found, dim=1), whole) < 1e-5
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    first = next(iter(given.values())) if given else tokens
    with_cache, without = (model.generate(first, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_agrees_at_shapes_that_were_not_traced(name, tmp_path):
    model, path = cut(tiny(name), emptied=True), tmp_path / "model.onnx"
    samples = [
        {name: tensor[:count].numpy() for name, tensor in inputs(model, length).items()}
        for count, length in ((2, 11), (1, 7), (2, 19))
    ]
    axes = {
        name: ["batch"] if tensor.is_floating_point() else ["batch", "sequence"]
        for name, tensor in inputs(model).items()
    }
    assert exporter.export(model, samples, axes=axes, path=path, fuse_for="cpu") < 1e-4
    written = {
        tensor.name: math.prod(tensor.dims)
        for file in tmp_path.glob("*.onnx")
        for tensor in onnx.load(file).graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    stored, dense = (
        sum(tensor.numel() for tensor in m.state_dict().values()) for m in (model, tiny(name))
    )
    # Some graphs hold a few constants besides; an encoder and a decoder may share embeddings.
    assert sum(written.values()) < (stored + dense) / 2


def test_what_is_gone_is_its_share_of_every_matrix(every):
    model = tiny(every)
    before, gone = model.num_parameters(), 0
    for group in of_kind(model, "heads") + of_kind(model, "neurons"):
        if group.of == 1:
            continue  # Falcon's multi-query attention: all of it would go
        # Of every matrix and bias around them, all units have the same share.
        around = [p for linear, _ in group.writers for p in linear.parameters()]
        gone += sum(p.numel() // group.of for p in [*around, structure.matrix(group.reader)])
    heads, neurons = (
        {group.path: [0] for group in of_kind(model, kind) if group.of > 1}
        for kind in ("heads", "neurons")
    )
    prune_heads(model, heads)
    prune_neurons(model, neurons)
    assert before - model.num_parameters() == gone


def test_shards_in_bf16_load_as_they_were_saved(every, tmp_path):
    model = cut(tiny(every).to(torch.bfloat16), emptied=True)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_whisper_s_alignment_heads_are_numbered_anew_or_dropped(tmp_path):
    model = tiny("whisper")
    model.generation_config = GenerationConfig(alignment_heads=[[0, 1], [1, 0], [1, 3]])
    path = "model.decoder.layers.1.encoder_attn"
    prune_heads(model, {path: [0], "model.decoder.layers.1.self_attn": [1]})
    assert model.generation_config.alignment_heads == [[0, 1], [1, 2]]
    prune_layers(model, ["decoder.layers.0"])
    assert model.generation_config.alignment_heads == [[0, 2]]
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.generation_config.alignment_heads == [[0, 2]]
    prune_heads(loaded, {"model.decoder.layers.0.encoder_attn": range(4)})
    assert not hasattr(loaded.generation_config, "alignment_heads")


CROSSED = {
    "bert": (BertLMHeadModel, BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**FAMILIES["gpt2"][2], add_cross_attention=True)),
}


@pytest.mark.parametrize("emptied", [False, True], ids=["some left", "none left"])
@pytest.mark.parametrize("name", CROSSED)
def test_cross_attention_of_a_decoder(name, emptied):
    kind, config = CROSSED[name]
    model, masked = (kind(copy.deepcopy(config)).double() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for one, other in zip(model.parameters(), masked.parameters(), strict=True):
        noise = torch.randn(one.shape, generator=generator, dtype=torch.float64) * 0.3
        one.data, other.data = noise, noise.clone()
    model.eval(), masked.eval()
    states = torch.randn(2, 5, 32, generator=generator).double()
    tokens = inputs(model)["input_ids"]
    whole = logits(model, input_ids=tokens, encoder_hidden_states=states)
    assert len(of_kind(model, "heads")) == 6
    for kind in ("heads", "neurons"):
        mask(masked, kind, plan(masked, kind, emptied=emptied))
    cut(model, emptied=emptied)
    given = {"encoder_hidden_states": states}
    found = logits(model, input_ids=tokens, **given)
    assert difference(found, logits(masked, input_ids=tokens, **given)) < 1e-12
    assert difference(found, whole) > 1e-3
    with torch.no_grad():
        first = model(input_ids=tokens[:, :4], use_cache=True, **given)
        rest = model(input_ids=tokens[:, 4:], past_key_values=first.past_key_values, **given)
    assert difference(torch.cat([first.logits, rest.logits], dim=1), found) < 1e-12


def trained(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters that a gradient reaches, all of them finite."""
    model(**inputs(model)).logits.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    return {name for name, gradient in found.items() if bool(gradient.any())}


def test_a_loaded_model_trains(every, tmp_path):
    save_pretrained(cut(tiny(every), emptied=False), tmp_path)
    model = from_pretrained(tmp_path)
    left = {name for name, _ in model.named_parameters()}
    save_pretrained(tiny(every), tmp_path)
    assert trained(model) == trained(from_pretrained(tmp_path)) & left
