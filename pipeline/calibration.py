"""Run batches through a model and watch its layers.

Everything that pruning wants to know of a unit is seen at one place, the input of the matrix that
reads it: the gradient of a mask on the unit, and the second moments for the repair. One pass over
the data serves all layers at once.

B examples of a batch, T tokens, U units, I inputs of a matrix, w inputs of a unit (I = U w).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.accuracy import Track, silent
from benchmarks.tasks import Example, collate

Batch = dict[str, Tensor]


def batches(examples: Sequence[Example], padding: Mapping[str, int], size: int) -> Iterator[Batch]:
    """Yield inputs and labels of every window of the examples, `size` at a time."""
    windows = [{**w.inputs, **w.labels} for example in examples for w in example.windows]
    for start in range(0, len(windows), size):
        arrays = collate(windows[start : start + size], padding)
        yield {name: torch.from_numpy(array) for name, array in arrays.items()}


@contextmanager
def watching(
    modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `see(name, input)` whenever one of the modules runs, until the block ends."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: see(name, args[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mask_gradients(
    model: PreTrainedModel,
    readers: Mapping[str, nn.Module],
    counts: Mapping[str, int],
    data: Iterable[Batch],
    *,
    total: int,
    track: Track = silent,
) -> dict[str, Tensor]:
    """Return dL_n/dx_u for every window n and unit u `(N, U)`, from one backward pass a batch.

    x_u = 1 is a mask on the unit's slice s of the reader's input; its gradient is the sum of
    s * dL/ds over tokens and slice. The L_n add up to the model's own loss of the batch, a mean,
    times the windows of the batch: for a loss over tokens a longer window has a larger part.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    model.eval()
    found: dict[str, list[Tensor]] = {name: [] for name in readers}
    seen: dict[str, Tensor] = {}

    def see(name: str, states: Tensor) -> None:
        if not states.requires_grad:
            states.requires_grad_()
        seen[name] = states

    with watching(readers, see):
        for batch in track(data, "scoring units", total):
            size = len(next(iter(batch.values())))
            # The library's loss is a mean over the batch; the sum makes each example's gradient
            # that of its own loss.
            loss = model(**batch).loss * size
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"scoring: found the loss {loss.item()}, expected a number"
                )
            gradients = torch.autograd.grad(loss, list(seen.values()))
            for (name, states), gradient in zip(seen.items(), gradients, strict=True):
                products = (states.detach() * gradient).reshape(size, -1, states.shape[-1]).sum(1)
                found[name].append(products.reshape(size, counts[name], -1).sum(2))
            seen.clear()
    return {name: torch.cat(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class Moments:
    """Second moments of a reader's input with a 1 behind it.

    `fit` and `held_out` are sums of x xT in float64 `(I+1, I+1)`, over different windows.
    """

    fit: Tensor
    held_out: Tensor


HELD_OUT_EVERY = 5
"""One window of so many is held out, to choose the regularisation on."""


@torch.no_grad()
def moments(
    model: PreTrainedModel,
    readers: Mapping[str, nn.Module],
    data: Iterable[Batch],
    *,
    total: int,
    track: Track = silent,
) -> dict[str, Moments]:
    """Return the second moments of every reader's input, over the tokens that are not padding.

    Raises:
        FloatingPointError: an input is not finite.
    """
    model.eval()
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    parts: tuple[Tensor, Tensor]
    count = 0

    def see(name: str, states: Tensor) -> None:
        rows = states.double()
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
        if name not in sums:
            width = rows.shape[-1]
            sums[name] = rows.new_zeros(width, width), rows.new_zeros(width, width)
        for moment, chosen in zip(sums[name], parts, strict=True):
            part = rows[chosen].reshape(-1, rows.shape[-1])
            moment.addmm_(part.T, part)

    with watching(readers, see):
        for batch in track(data, "second moments", total):
            size = len(next(iter(batch.values())))
            held_out = torch.arange(count, count + size) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            count += size
            parts = ~held_out, held_out
            if "attention_mask" in batch:
                tokens = batch["attention_mask"].bool()
                parts = tokens & ~held_out[:, None], tokens & held_out[:, None]
            model(**batch)
    found = {name: Moments(*both) for name, both in sums.items()}
    for name, moment in found.items():
        if not torch.isfinite(moment.fit).all():
            raise FloatingPointError(f"{name}: found NaN or infinity, expected numbers")
    return found
