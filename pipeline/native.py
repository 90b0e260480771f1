"""Give a model that was cut alike in every layer a configuration that stock transformers loads.

That is possible where the family's configuration names the sizes that were cut, and nothing in the
model depends on which heads they were. It is tried, not looked up: the stock class is built from
the new configuration, on no device, and must want the tensors that there are.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from pipeline import pruning, structure, surgery
from pipeline.structure import Group, Kind


def configure(model: PreTrainedModel) -> None:
    """Write what is left into the configuration's own numbers, and drop the record of the cut.

    The units are numbered anew: what is left is the unpruned model from now on.

    Raises:
        ValueError: layers were cut differently, or the family's configuration cannot say it.
    """
    for group in structure.groups(model):
        refuse_numbered(group)
    numbers = _numbers(model)
    trial = copy.deepcopy(model.config)
    _set(trial, numbers)
    stock = getattr(transformers, type(model).__name__)
    try:
        # As a file would be read: some families have rules about their numbers.
        type(trial).from_dict(trial.to_dict())
        with torch.device("meta"):
            wanted = {n: tuple(t.shape) for n, t in stock(trial).state_dict().items()}
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        raise ValueError(f"uniform: {_cannot(model)}: {reason}") from error
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wanted != found:
        name = next(n for n in (*found, *wanted) if wanted.get(n) != found.get(n))
        raise ValueError(
            f"uniform: {_cannot(model)}: {name} would have the shape {wanted.get(name)}, and has"
            f" {found.get(name)}"
        )
    _set(model.config, numbers)


def rehearse(model: PreTrainedModel, fractions: Mapping[Kind, float], multiple: int) -> None:
    """Cut a model without weights as far as the real one will be, and configure it.

    Raises:
        ValueError: as `configure` would for the real one.
    """
    for kind, fraction in fractions.items():
        groups = {g.path: g for g in structure.groups(model) if g.kind == kind and g.kept}
        scores = {path: torch.zeros(len(group.kept)) for path, group in groups.items()}
        rounded = multiple if kind == "neurons" else 1
        for path, gone in pruning.choose(scores, fraction, uniform=True, multiple=rounded).items():
            kept = groups[path].kept
            surgery.keep(model, groups[path], list(kept[: len(kept) - len(gone)]))
    configure(model)


def refuse_numbered(group: Group) -> None:
    """Raise ValueError if heads of the group are gone, and each depends on its number."""
    if len(group.kept) < group.of and getattr(group.part, "mixed", None) is not None:
        raise ValueError(
            f"{group.path}: found heads that depend on their number, expected others; of this"
            " family cuts of neurons alone can be written"
        )


def _cannot(model: PreTrainedModel) -> str:
    return f"the configuration of {model.config.model_type} cannot say what was cut"


def _numbers(model: PreTrainedModel) -> dict[str, int]:
    """Return the configuration's names and new values of what was cut."""
    stacks, found = structure.stacks(model), dict[str, int]()

    def put(name: str, value: int, path: str) -> None:
        if name and hasattr(model.config, name) and found.setdefault(name, value) != value:
            raise ValueError(
                f"{path}: found {value} left, expected {found[name]} as elsewhere; only a uniform"
                " cut can be written for stock transformers"
            )

    for group in structure.groups(model):
        stack = next(s for s, _ in stacks if group.key.startswith(f"{s.layers}."))
        if not group.kept:
            raise ValueError(f"{group.path}: found no {group.kind} left, expected as elsewhere")
        if group.kind == "neurons":
            put(stack.neurons, len(group.kept), group.path)
        elif group.kind == "heads":
            put(stack.heads, group.queries, group.path)
            if isinstance(stack.groups, str):
                put(stack.groups, group.heads, group.path)
            if len(group.kept) < group.of or group.queries < group.queries_before:
                width = structure.matrix(group.reader).shape[1] // group.queries
                found["head_dim"] = width
    return {
        name: value for name, value in found.items() if value != getattr(model.config, name, None)
    }


def _set(config: Any, numbers: dict[str, int]) -> None:
    for name, value in numbers.items():
        setattr(config, name, value)
    config.pruning = None
