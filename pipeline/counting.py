"""Multiply-adds of a model, counted from the shapes of what it computes; no weight is read."""

from collections.abc import Mapping
from itertools import chain

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from pipeline import selfcheck


def total(model: PreTrainedModel, sequence: int) -> float:
    """Return the multiply-adds of one input of `sequence` tokens."""
    return float(sum(multiply_adds(model, sequence).values()))


def multiply_adds(model: PreTrainedModel, sequence: int) -> dict[str, int]:
    """Return the multiply-adds of every module less those in it; under "" what is in none.

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError: its inputs cannot
            be made up, or its forward asks for values that no shape tells.
    """
    # Fake tensors know shapes alone, as `meta` does, but also the constants that forwards read.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        weights = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in chain(model.named_parameters(), model.named_buffers())
        }
        inputs = {
            name: torch.empty(tensor.shape, dtype=torch.float32)
            if tensor.is_floating_point()
            else torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in selfcheck.example(model, 1, sequence).items()
        }
        with FlopCounterMode(display=False) as counter:
            functional_call(model, weights, kwargs=inputs)
    counts = counter.get_flop_counts()
    prefix = f"{type(model).__name__}."
    own = {
        name.removeprefix(prefix): sum(of_kind.values())
        for name, of_kind in counts.items()
        if name.startswith(prefix)
    }
    # A module's count holds those of the modules in it; lists of layers have none of their own.
    for name, flops in list(own.items()):
        if (outer := nearest(name, own)) is not None:
            own[outer] -= flops
    found = {name: flops // 2 for name, flops in own.items()}
    return found | {"": sum(counts["Global"].values()) // 2 - sum(found.values())}


def nearest(name: str, names: Mapping[str, object]) -> str | None:
    """Return the longest of the names that `name` lies in."""
    while outer := name.rpartition(".")[0]:
        if outer in names:
            return outer
        name = outer
    return None
