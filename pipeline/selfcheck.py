"""Families without a row: try the rows that there are, on a small copy with random weights.

A row fits if its modules are there and if, on the copy, a cut gives what zeroing gives. The copy
has the model's classes and hidden width, two layers, few neurons and a small vocabulary, in fp64;
one is alive at a time. So the cost does not grow with the number of layers, but with the square of
the hidden width.
"""

import copy
import re
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline import structure, surgery
from pipeline.architectures import ARCHITECTURES, Architecture, Attention, Ffn, Stack, borrowed

LAYERS: Final = 2
VOCABULARY: Final = 64
NEURONS: Final = 64
FAILURES: Final = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    AssertionError,
)
"""What a forward raises that was given what it does not expect."""
TOLERANCE: Final = 1e-8
"""Largest difference relative to the largest output, in fp64; some norms compute in fp32."""


def ensure(model: PreTrainedModel) -> None:
    """Find a row for the model, if the table has none for its family.

    Raises:
        ValueError: no row fits, and why.
    """
    family = model.config.model_type
    if family in ARCHITECTURES or structure.like(model) is not None:
        return
    name = type(model).__name__
    key = structure.fingerprint(model)
    reasons = []
    for other in _rows(model):
        structure.LEARNED[key] = other
        reason: str | None = "its check did not end"
        try:
            reason = _difference(model)
        finally:
            if reason is not None:
                del structure.LEARNED[key]
        if reason is None:
            return
        reasons.append(reason)
    why = reasons[0] if reasons else _unlike_any(model)
    raise ValueError(
        f"{name}: found the family {family!r}, which cannot be cut: {why}; families that can be:"
        f" {', '.join(sorted(ARCHITECTURES))}"
    )


def _rows(model: PreTrainedModel) -> list[str]:
    """Return the families whose modules are in the model, one for each row."""
    found: dict[str, Architecture] = {}
    for family, row in ARCHITECTURES.items():
        fits = not callable(row) and all(_fits(model, stack) for stack in row)
        if fits and (borrowed(family) not in found.values()):
            found[family] = borrowed(family)
    return [*found]


def _fits(model: PreTrainedModel, stack: Stack) -> bool:
    if not structure.has(model.base_model, stack.layers) or not hasattr(model.config, stack.heads):
        return False
    layer = next(model.base_model.get_submodule(stack.layers).children(), nn.Identity())
    found = [part for part in stack.attentions if structure.has(layer, part.path)]
    parts: list[Attention | Ffn] = [*found, stack.ffn]
    return bool(found) and all(
        structure.has(layer, part.path) and _has_all(layer.get_submodule(part.path), part)
        for part in parts
    )


def _has_all(module: nn.Module, part: Attention | Ffn) -> bool:
    inputs = part.inputs[:3] if isinstance(part, Attention) else part.inputs[:1]
    return all(structure.has(module, path) for path in [part.output, *(m.path for m in inputs)])


def _difference(model: PreTrainedModel) -> str | None:
    """Return why a cut of the copy is not what zeroing is; None if it is."""
    try:
        whole = _outputs(model, lambda _: None)
    except FAILURES as error:
        return f"an uncut copy does not run either ({_said(error)})"
    try:
        expected, found = _outputs(model, _zero), _outputs(model, _cut)
    except FAILURES as error:
        return _leftover(model) or f"a cut copy does not run ({_said(error)})"
    if torch.equal(whole, expected):
        return "its outputs do not depend on what would be cut"
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        return _leftover(model) or f"a cut head or neuron changes the others ({difference:.1e})"
    return None


def _said(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _goes(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return which units are cut on trial: all of every first layer, the first of the others."""
    found = {}
    for stack, layers in structure.stacks(model):
        for group in structure.groups(model):
            if group.kind != "queries" and group.key.startswith(f"{stack.layers}."):
                empties = group.layer == 0 and len(layers) > 1
                gone = group.of if empties else min(1, group.of - 1)
                found[group.path] = [*range(gone)]
    return found


def _zero(model: PreTrainedModel) -> None:
    gone = _goes(model)
    for group in structure.groups(model):
        if group.kind != "queries":
            places = torch.isin(surgery.owners(group), torch.tensor(gone[group.path]))
            structure.matrix(group.reader).data[:, places] = 0


def _cut(model: PreTrainedModel) -> None:
    gone = _goes(model)
    for group in structure.groups(model):
        if group.kind != "queries" and gone[group.path]:
            surgery.keep(model, group, [*range(len(gone[group.path]), group.of)])


def _outputs(model: PreTrainedModel, change: Callable[[PreTrainedModel], None]) -> Tensor:
    """Return what a copy gives that was changed."""
    with torch.device("cpu"), torch.no_grad():
        small = _copy(model)
        change(small)
        outputs = small(**example(model, 2, 9))
        return next(value for value in outputs.values() if isinstance(value, Tensor))


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a small model of the same class, in fp64, the same each time."""
    config = copy.deepcopy(model.config)
    config.pruning = None
    for stack, layers in structure.stacks(model):
        surgery.shorten(config, stack, len(layers), list(range(min(LAYERS, len(layers)))))
        neurons = getattr(config, stack.neurons, None)
        if isinstance(neurons, int):
            setattr(config, stack.neurons, min(neurons, NEURONS))
    if hasattr(config, "vocab_size"):
        config.vocab_size = VOCABULARY
        for name in _tokens(config):
            setattr(config, name, 0)
    kind = type(model)
    small: PreTrainedModel = kind(config)
    generator = torch.Generator().manual_seed(0)
    small.config.pruning = {"like": structure.like(model)}
    small = small.double()
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5 * 2)
            else:
                parameter.copy_(noise * 0.2 + (1.0 if name.endswith("norm.weight") else 0.0))
    return small.eval()


def _tokens(config: PretrainedConfig) -> list[str]:
    return [
        name
        for name, value in config.to_dict().items()
        if re.search("token_id", name) and isinstance(value, int)
    ]


def example(model: PreTrainedModel, batch: int, sequence: int) -> dict[str, Tensor]:
    """Return random inputs of the kind that the model takes, floating ones in fp64.

    Raises:
        ValueError: it takes neither text nor images nor sound.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (batch, sequence), generator=generator)
    config: Any = model.config
    if model.main_input_name == "input_features":
        shape = batch, config.num_mel_bins, 2 * config.max_source_positions
        given = {"input_features": torch.randn(*shape, generator=generator).double()}
    elif model.main_input_name == "input_ids":
        given = {"input_ids": tokens}
    elif model.main_input_name == "pixel_values":
        sides = config.image_size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        pixels = torch.randn(batch, config.num_channels, height, width, generator=generator)
        given = {"pixel_values": pixels.double()}
    else:
        raise ValueError(f"the input {model.main_input_name!r} is not one that can be made up")
    return given | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})


def _leftover(model: PreTrainedModel) -> str | None:
    """Return which parameter of an attention belongs to heads, and is not cut with them."""
    try:
        groups = structure.groups(model)
    except AttributeError:
        return "its layers are of several kinds"
    for group in groups:
        if group.kind != "heads":
            continue
        paths = [written.path for written in group.part.inputs] + [group.part.output]
        # What the output projection shares a block with sees the layer's states, not the heads.
        outside = [f"{path}." for path in (*paths, group.part.output.rpartition(".")[0]) if path]
        heads, inputs = group.queries, structure.matrix(group.reader).shape[1]
        for name, parameter in group.module.named_parameters():
            if any(name.startswith(path) for path in outside):
                continue
            is_norm = parameter.dim() == 1 and re.search("norm|ln", name, re.IGNORECASE)
            if is_norm and len(parameter) in {inputs, inputs * group.heads // heads}:
                return f"{name} is a norm over all heads at once, which a cut would change"
            if heads in parameter.shape:
                return f"{name} has a value for every head, which is not known here"
    return None


def _unlike_any(model: PreTrainedModel) -> str:
    for name, _ in model.named_modules():
        if name.endswith(("kv_b_proj", "kv_a_proj_with_mqa")):
            return f"{name} makes keys and values of all heads from one (latent attention)"
    return "its layers lie at none of the places that are known"
