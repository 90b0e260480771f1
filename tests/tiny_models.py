"""Tiny models of every family that can tell right surgery from wrong.

With the library's own initialisation attention is uniform, and a wrongly cut head changes the
logits by 1e-7. Here weights are sharp, biases and norms are not 0 and 1, and the batch is padded;
`tiny` makes sure that the logits vary before any test relies on it.
"""

import torch
import transformers
from transformers import PreTrainedModel

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
SHARING = SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4}
GROUPED = SHARING | {"head_dim": 8}
BOTH_SIDES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 99,
    "decoder_start_token_id": 0,
}
IMAGES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}
TYPED = ["sliding_attention", "full_attention", "sliding_attention"]
FALCON = SIZES | {"alibi": False}
# Family, and after a dash what is special about this one -> class before `For...`, task, sizes.
FAMILIES = {
    "albert": ("Albert", "SequenceClassification", SIZES | {"embedding_size": 16}),
    "bart": ("Bart", "ConditionalGeneration", BOTH_SIDES),
    "bert": ("Bert", "SequenceClassification", SIZES),
    "bloom": (
        "Bloom",
        "CausalLM",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99},
    ),
    "camembert": ("Camembert", "SequenceClassification", SIZES),
    "deberta-v2": (
        "DebertaV2",
        "SequenceClassification",
        SIZES
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "share_att_key": True,
        },
    ),
    "deberta-v2 own keys": (
        "DebertaV2",
        "SequenceClassification",
        SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "deit": ("DeiT", "ImageClassification", IMAGES),
    "distilbert": (
        "DistilBert",
        "SequenceClassification",
        {
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 48,
            "vocab_size": 99,
            "max_position_embeddings": 64,
        },
    ),
    "electra": ("Electra", "SequenceClassification", SIZES | {"embedding_size": 16}),
    "falcon": ("Falcon", "CausalLM", FALCON | {"multi_query": False}),
    "falcon multi-query": ("Falcon", "CausalLM", FALCON | {"multi_query": True}),
    "falcon grouped": (
        "Falcon",
        "CausalLM",
        FALCON | {"new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 4},
    ),
    "falcon alibi": ("Falcon", "CausalLM", FALCON | {"multi_query": False, "alibi": True}),
    "gemma": ("Gemma", "CausalLM", GROUPED),
    "gemma2": ("Gemma2", "CausalLM", GROUPED | {"sliding_window": 6, "layer_types": TYPED}),
    "gemma3_text": (
        "Gemma3",
        "CausalLM",
        GROUPED | {"sliding_window": 6, "layer_types": TYPED},
    ),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 48,
            "vocab_size": 99,
            "n_positions": 64,
        },
    ),
    "gpt_neox": ("GPTNeoX", "CausalLM", SIZES),
    "llama": ("Llama", "CausalLM", SHARING),
    "marian": ("Marian", "MTModel", BOTH_SIDES | {"decoder_vocab_size": 99}),
    "mbart": ("MBart", "ConditionalGeneration", BOTH_SIDES),
    "mistral": ("Mistral", "CausalLM", GROUPED | {"sliding_window": 6}),
    "modernbert": (
        "ModernBert",
        "SequenceClassification",
        SIZES | {"global_attn_every_n_layers": 2, "local_attention": 8},
    ),
    "mpnet": ("MPNet", "SequenceClassification", SIZES),
    "mt5": (
        "MT5",
        "ConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "opt": (
        "OPT",
        "CausalLM",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "vocab_size": 99,
            "max_position_embeddings": 64,
        },
    ),
    "pegasus": ("Pegasus", "ConditionalGeneration", BOTH_SIDES),
    "phi": ("Phi", "CausalLM", SIZES),
    "phi3": ("Phi3", "CausalLM", SHARING),
    "qwen2": ("Qwen2", "CausalLM", SHARING),
    "qwen3": ("Qwen3", "CausalLM", GROUPED),
    "roberta": ("Roberta", "SequenceClassification", SIZES),
    "smollm3": ("SmolLM3", "CausalLM", SHARING),
    "t5": ("T5", "ConditionalGeneration", T5),
    "vit": ("ViT", "ImageClassification", IMAGES),
    "whisper": (
        "Whisper",
        "ConditionalGeneration",
        BOTH_SIDES | {"max_source_positions": 11, "max_target_positions": 64, "num_mel_bins": 8},
    ),
    "xlm-roberta": ("XLMRoberta", "SequenceClassification", SIZES),
}
SHARED = ["gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3"]
SHARED += ["smollm3"]
HEADS = {
    "bert-tokens": ("Bert", "TokenClassification", SIZES),
    "bert-answers": ("Bert", "QuestionAnswering", SIZES),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS |= {"cls_token_id": 1, "sep_token_id": 2}


def tiny(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a small model of the family with sharp weights, whose logits vary."""
    name, task, sizes = (FAMILIES | HEADS)[family]
    ending = task if task.endswith("Model") else f"For{task}"
    kind = getattr(transformers, CONFIGS.get(name, f"{name}Config"))
    torch.manual_seed(seed)
    model = getattr(transformers, name + ending)(kind(**sizes | TOKENS | changes))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # sinusoids are computed, and not saved
                continue
            spread = 0.3 if parameter.dim() > 1 else 0.2
            if "norm" in parameter_name.lower() or "ln_" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * spread)
    model.eval()
    with torch.no_grad():
        outputs = model(**inputs(model))
    logits = outputs.logits if "logits" in outputs else outputs.start_logits
    assert (logits[0] - logits[1]).abs().max() > 0.1
    return model


def grouped(family: str) -> PreTrainedModel:
    """Return a tiny model whose query heads share key/value heads, where the family has such."""
    sharing = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return tiny(family, **sharing if family == "phi" else {})


def batch(length: int = 11) -> dict[str, torch.Tensor]:
    """Return two sequences, the second one padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, length - 3 :], mask[1, length - 3 :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs(model: PreTrainedModel, length: int = 11) -> dict[str, torch.Tensor]:
    """Return two inputs of what the model takes: text, one of them padded, images or sound."""
    generator = torch.Generator().manual_seed(2)
    decoded = {"decoder_input_ids": torch.randint(3, 99, (2, length - 4), generator=generator)}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 22, generator=generator)} | decoded
    return batch(length) | (decoded if model.config.is_encoder_decoder else {})
