"""Families without a row are cut exactly or refused, with the reason."""

import copy

import pytest
import torch
import transformers
from tiny_models import GROUPED, IMAGES, SIZES, TOKENS, batch
from transformers import PreTrainedModel

from pipeline import (
    from_pretrained,
    prune_heads,
    prune_layers,
    prune_neurons,
    save_pretrained,
    selfcheck,
    structure,
    units,
)

LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 3,
}


def build(name: str, **sizes: object) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**GROUPED | TOKENS | sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(autouse=True)
def unlearned():
    """Let every test begin with the table alone."""
    structure.LEARNED.clear()
    yield
    structure.LEARNED.clear()


@pytest.mark.parametrize("name", ["Olmo", "Cohere", "StableLm", "Granite"])
def test_a_family_like_a_known_one_is_cut_as_that_is(name, tmp_path):
    model, masked = build(name), build(name)
    assert [*units(model).heads.values()] == [4, 4, 4]
    with torch.no_grad():
        for group in structure.groups(masked):
            if group.kind != "queries":
                structure.matrix(group.reader)[:, : group.width] = 0
    prune_heads(model, {layer: [0] for layer in range(3)})
    prune_neurons(model, {layer: [0] for layer in range(3)})
    with torch.no_grad():
        found, expected = (m(**batch()).logits for m in (model, masked))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    save_pretrained(model, tmp_path)
    structure.LEARNED.clear()  # as in another process
    with torch.no_grad():
        again = from_pretrained(tmp_path)(**batch()).logits
    torch.testing.assert_close(again, found, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        (
            "Olmo2",
            {},
            r"Olmo2ForCausalLM: found the family 'olmo2', .*: [qk]_norm\.weight is a norm over",
        ),
        ("DeepseekV3", LATENT, r"kv_a_proj_with_mqa makes keys and values of all heads from one"),
        ("GraniteSWA", {}, r"sinks has a value for every head, which is not known here"),
        (
            "GptOss",
            {"num_local_experts": 2, "num_experts_per_tok": 1},
            "its layers lie at none of the places that are known",
        ),
        ("Mamba", {}, "its layers lie at none of the places that are known"),
        (
            "GPTNeoXJapanese",
            {"num_attention_heads": 4},
            r"a cut copy does not run \(not enough values to unpack",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(name, sizes, message):
    model = build(name, **sizes)
    before = model.num_parameters()
    with pytest.raises(ValueError, match=message):
        prune_heads(model, {0: [0]})
    assert model.num_parameters() == before


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("Xmod", {}, r"an uncut copy does not run either \(Input language unknown"),
        ("Longformer", {"attention_window": [4] * 3}, "an uncut copy does not run either .*Expec"),
        ("ConvBert", {}, r"a cut copy does not run \(shape"),
    ],
)
def test_a_reason_that_is_not_known_is_the_error_itself(name, sizes, message):
    kind = getattr(transformers, f"{name}ForMaskedLM")
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    with pytest.raises(ValueError, match=message):
        units(kind(config))


def test_one_model_does_not_vouch_for_the_next():
    assert [*units(build("StableLm")).heads.values()] == [4, 4, 4]
    with pytest.raises(ValueError, match="which cannot be cut"):
        units(build("StableLm", qk_layernorm=True))
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32}
    config = transformers.PLBartConfig(**sizes, vocab_size=99, encoder_ffn_dim=8, decoder_ffn_dim=8)
    decoder = transformers.PLBartForCausalLM(copy.deepcopy(config))
    both = transformers.PLBartForConditionalGeneration(config)
    assert (len(units(decoder).heads), len(units(both).heads)) == (2, 6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            transformers.EsmForMaskedLM(transformers.EsmConfig(**SIZES | {"pad_token_id": 0})),
            r"found esm\.contact_head\.regression\.weight of the shape .* in a model with fewer",
        ),
        (
            transformers.BeitForImageClassification(transformers.BeitConfig(**IMAGES)),
            r"layers: no layer can be cut out: out_features must be a subset",
        ),
    ],
    ids=["esm", "beit"],
)
def test_layers_stay_where_a_model_with_fewer_could_not_be_loaded(model, message):
    before = model.num_parameters()
    with pytest.raises(ValueError, match=message):
        prune_layers(model, [1])
    assert model.num_parameters() == before
    prune_heads(model, {1: [0]})


def test_what_was_checked_is_not_checked_again_at_every_load(tmp_path, monkeypatch):
    model = build("Granite")
    prune_heads(model, {0: [0]})
    prune_layers(model, [1])
    assert model.config.pruning["like"] == "gemma"
    save_pretrained(model, tmp_path)
    structure.LEARNED.clear()
    monkeypatch.setattr(selfcheck, "_difference", lambda _: "checked again")
    loaded = from_pretrained(tmp_path)
    assert loaded.config.pruning == model.config.pruning
    prune_heads(loaded, {0: [1]})
    assert [*units(loaded).heads.values()] == [2, 4]
    loaded.config.pruning |= {"like": "no-such"}
    with pytest.raises(ValueError, match="found the row 'no-such', which is not known here"):
        units(loaded)
