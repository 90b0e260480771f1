"""What was cut, in transformers' schema for layers of different sizes, for other software.

transformers 5.23 reads `per_layer_config`, but builds none of the families here by it;
https://github.com/huggingface/transformers/pull/45332 would, and names the parts of a layer.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from pipeline import structure
from pipeline.architectures import Stack
from pipeline.native import refuse_numbered
from pipeline.structure import Group


def per_layer_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return the configuration with what was cut under `per_layer_config`.

    An entry is named by its layer's place in the model as it is now. It has the numbers of heads,
    key/value heads and neurons that differ, and under `skip` what is empty.

    Raises:
        ValueError: the schema cannot say what was cut.
    """
    stacks, config = structure.stacks(model), model.config
    stack, layers = stacks[0]
    shared = not stack.count or len(layers) < getattr(config, stack.count)
    if shared or len(stacks) > 1:
        what = "layers that share their weights" if shared else "two stacks of layers"
        raise ValueError(
            f"{type(model).__name__}: found {what}, expected one stack; per_layer_config cannot say"
            " what was cut"
        )
    written = config.to_dict()
    written.pop("pruning", None)
    entries: dict[str, dict[str, Any]] = {}
    attentions: dict[str, str] = {}
    for group in structure.groups(model):
        refuse_numbered(group)
        at = group.key.removeprefix(f"{stack.layers}.").partition(".")[0]
        if group.kind == "heads" and attentions.setdefault(at, group.path) != group.path:
            raise ValueError(
                f"{group.path}: found a second attention in a layer, expected one; per_layer_config"
                " cannot say what was cut"
            )
        entry = entries.setdefault(at, {})
        if group.kept:
            entry |= _entry(model, stack, group, written)
        elif getattr(group.reader, "bias", None) is None:
            entry.setdefault("skip", []).append("mlp" if group.kind == "neurons" else "attention")
        else:
            raise ValueError(
                f"{group.path}: found nothing left but a bias, expected some {group.kind} or no"
                " bias; per_layer_config cannot say what was cut"
            )
        if group.kept and group.kind == "heads":
            written["head_dim"] = structure.matrix(group.reader).shape[1] // group.queries
    return written | {"per_layer_config": {at: entry for at, entry in entries.items() if entry}}


def _entry(
    model: PreTrainedModel, stack: Stack, group: Group, written: Mapping[str, Any]
) -> dict[str, int]:
    """Return the numbers of one group that differ from the model's, by the names in its file."""
    numbers = {}
    if group.kind == "neurons":
        numbers = {stack.neurons: len(group.kept)}
    elif group.kind == "heads":
        numbers = {stack.heads: group.queries}
        if isinstance(stack.groups, str) and hasattr(model.config, stack.groups):
            numbers[stack.groups] = group.heads
    stored = {model.config.attribute_map.get(name, name): n for name, n in numbers.items()}
    if len(group.kept) < group.of and not written.keys() >= stored.keys():
        raise ValueError(
            f"{group.path}: found no number of {group.kind} in the configuration of"
            f" {model.config.model_type}, expected one; per_layer_config cannot say what was cut"
        )
    return {name: number for name, number in stored.items() if written.get(name, number) != number}
