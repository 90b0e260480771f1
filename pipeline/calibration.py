"""Run batches through a model and watch its layers.

Everything that pruning wants to know of a unit is seen at one place, the input of the matrix that
reads it: the gradient of a mask on the unit, and the second moments for the repair. One pass over
the data serves all layers that are asked for at once.

B examples of a batch, T tokens, U units, I inputs of a matrix, w inputs of a unit (I = U w).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.accuracy import Track, silent
from benchmarks.examples import IGNORED, Example, collate

Batch = dict[str, Tensor]
BATCH: Final = 16
"""Windows a batch."""

Seen = list[tuple[str, Tensor, Tensor]]
"""Runs of readers: the name, its input, and where the gradient is asked for. A reader that layers
share runs several times."""


def batches(
    examples: Sequence[Example], padding: Mapping[str, int], size: int, *, every: int = 1
) -> Iterator[Batch]:
    """Yield inputs and labels of the windows of the examples, of one in so many, `size` at a time.

    With `every` of `HELD_OUT_EVERY` these are the windows that `moments` holds out.
    """
    windows = [{**w.inputs, **w.labels} for example in examples for w in example.windows]
    windows = windows[every - 1 :: every]
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
        ValueError: the data have no labels.
    """
    seen: Seen = []

    def see(name: str, states: Tensor) -> None:
        if not states.requires_grad:
            states.requires_grad_()
        seen.append((name, states.detach(), states))

    def each(name: str, states: Tensor, gradient: Tensor, size: int) -> Tensor:
        products = (states * gradient).reshape(size, -1, states.shape[-1]).sum(1)
        return products.reshape(size, counts[name], -1).sum(2)

    with watching(readers, see):
        return _by_reader(model, track(data, "scoring units", total), seen, each)


def change_gradients(
    model: PreTrainedModel,
    readers: Mapping[str, nn.Module],
    changes: Mapping[str, Tensor],
    data: Iterable[Batch],
    *,
    total: int,
    track: Track = silent,
) -> dict[str, Tensor]:
    """Return <dL_n/dW, D> for every window n and change D of a reader's matrix W `(N, C)`.

    It is what the change does to the window's loss, to first order. `changes` holds the D of each
    reader `(C, O, I)`, or `(C, O, I + 1)` with the bias as their last column. The L_n are those of
    `mask_gradients`; the windows' gradients `(O, I)` are made one at a time.

    Raises:
        FloatingPointError: a loss is not finite.
        ValueError: the data have no labels.
    """
    seen: Seen = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            seen.append((name, args[0].detach(), output))

        return see

    def each(name: str, states: Tensor, gradient: Tensor, size: int) -> Tensor:
        return _inner(states, gradient, changes[name], size)

    handles = [module.register_forward_hook(hook(name)) for name, module in readers.items()]
    try:
        return _by_reader(model, track(data, "scoring levels", total), seen, each)
    finally:
        for handle in handles:
            handle.remove()


def _by_reader(
    model: PreTrainedModel,
    data: Iterable[Batch],
    seen: Seen,
    each: Callable[[str, Tensor, Tensor, int], Tensor],
) -> dict[str, Tensor]:
    """Return what `each` makes of every run of a reader `(windows, ...)`, summed over its runs."""
    found: dict[str, list[Tensor]] = {}
    for size, loss in _losses(model, data):
        gradients = torch.autograd.grad(loss, [at for *_, at in seen])
        sums: dict[str, Tensor] = {}
        for (name, states, _), gradient in zip(seen, gradients, strict=True):
            part = each(name, states, gradient, size)
            sums[name] = sums[name] + part if name in sums else part
        for name, part in sums.items():
            found.setdefault(name, []).append(part)
        seen.clear()
    return {name: torch.cat(parts) for name, parts in found.items()}


def _inner(states: Tensor, gradient: Tensor, changes: Tensor, size: int) -> Tensor:
    """Return <g_n^T x_n, D> `(size, C)`: x a matrix's inputs, g the gradients of its outputs."""
    inputs = states.reshape(size, -1, states.shape[-1]).to(changes.dtype)
    if changes.shape[-1] > inputs.shape[-1]:
        inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)
    behind = gradient.reshape(size, -1, gradient.shape[-1]).to(changes.dtype)
    each = (g.T @ x for g, x in zip(behind, inputs, strict=True))
    return torch.stack([changes.flatten(1) @ of_window.flatten() for of_window in each])


def _losses(model: PreTrainedModel, data: Iterable[Batch]) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of windows of every batch, and the sum of their losses."""
    model.eval()
    for batch in data:
        size = len(next(iter(batch.values())))
        mean = model(**batch).loss
        if mean is None:
            raise ValueError("calibration: found no labels, expected labelled data to score with")
        loss = mean * size  # each example's gradient is that of its own loss
        if not torch.isfinite(loss):
            raise FloatingPointError(f"scoring: found the loss {loss.item()}, expected a number")
        yield size, loss


@dataclass(frozen=True)
class Moments:
    """Second moments of a reader's input with a 1 behind it.

    `fit` and `held_out` are sums of x xT in float64 `(I+1, I+1)`, over different windows.
    """

    fit: Tensor
    held_out: Tensor


HELD_OUT_EVERY = 5
"""One window of so many is held out, to choose the regularisation on."""


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
        ValueError: there are too few windows to hold one out.
    """
    model.eval()
    return moments_of(
        lambda batch: model(**batch),
        readers,
        track(data, "second moments", total),
        decodes=model.config.is_encoder_decoder,
    )


@torch.no_grad()
def moments_of(
    run: Callable[[Batch], object],
    readers: Mapping[str, nn.Module],
    data: Iterable[Batch],
    *,
    decodes: bool = False,
) -> dict[str, Moments]:
    """Return the second moments of the readers' inputs while `run` is called with every batch.

    `decodes`: readers with "decoder" in their name see the tokens of the decoder.

    Raises:
        FloatingPointError, ValueError: as for `moments`.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    batch: Batch = {}
    held_out = torch.zeros(0, dtype=torch.bool)
    count = 0

    def see(name: str, states: Tensor) -> None:
        # OPT's are flat; DeBERTa's projections read a table of positions, too, for all windows.
        of_batch = states.dim() == 2 or len(states) == len(held_out)  # noqa: PLR2004
        left_out = held_out if of_batch else torch.zeros(1, dtype=torch.bool)
        rows = states.double().reshape(len(left_out), -1, states.shape[-1])
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
        if name not in sums:
            width = rows.shape[-1]
            sums[name] = rows.new_zeros(width, width), rows.new_zeros(width, width)
        of_decoder = decodes and "decoder" in name
        tokens = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
        if of_decoder and tokens is None and "labels" in batch:
            tokens = batch["labels"] != IGNORED
        if tokens is None or tokens.shape != rows.shape[:2]:
            tokens = rows.new_ones(rows.shape[:2])
        for moment, chosen in zip(sums[name], (~left_out, left_out), strict=True):
            part = rows[tokens.bool() & chosen[:, None]]
            moment.addmm_(part.T, part)

    with watching(readers, see):
        for batch in data:
            size = len(next(iter(batch.values())))
            held_out = torch.arange(count, count + size) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            count += size
            run(batch)
    if count < HELD_OUT_EVERY:
        raise ValueError(
            f"calibration: found {count} windows, expected at least {HELD_OUT_EVERY}, of which one"
            " is held out"
        )
    found = {name: Moments(*both) for name, both in sums.items()}
    for name, moment in found.items():
        if not (moment.fit.isfinite().all() and moment.held_out.isfinite().all()):
            raise FloatingPointError(f"{name}: found NaN or infinity, expected numbers")
    return found
