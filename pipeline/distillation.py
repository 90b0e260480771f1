"""Losses that make a student imitate its teacher.

    L = a task + (1 - a) T^2 KL(teacher / T || student / T) + h mean_l |s_l - t_l|^2 / |t_l|^2

Hinton et al. 2015, section 2, https://arxiv.org/abs/1503.02531; the last term compares hidden
states, whose width no cut changes.

C classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.examples import IGNORED


@dataclass(frozen=True)
class Teacher:
    """The model to imitate, and how; `temperature` as in the module's formula, weights a and h."""

    model: PreTrainedModel
    temperature: float
    task_weight: float
    hidden_weight: float


@dataclass(frozen=True)
class Weights:
    """What the means of a process weigh, so that their average over all is the mean of the batch.

    `own` is that of the task's own loss, `logits` of the imitation of logits; `tokens` and
    `targets` are those of hidden states, over what is read and, in a decoder, what is written.
    """

    own: float = 1.0
    logits: float = 1.0
    tokens: float = 1.0
    targets: float = 1.0


def loss(
    model: nn.Module,
    inputs: dict[str, Tensor],
    teacher: Teacher | None,
    weights: Weights = Weights(),
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Tensor:
    """Return the loss of the module's formula `()`; without a teacher the task's own.

    In bf16 the models compute, not the loss.
    """
    states = teacher is not None and teacher.hidden_weight > 0
    device = next(iter(inputs.values())).device.type
    cast = partial(torch.autocast, device, torch.bfloat16, enabled=precision == "bf16")
    with cast():
        outputs = model(**inputs, output_hidden_states=states)
    own: Tensor = weights.own * outputs.loss
    if not weights.own and not torch.isfinite(outputs.loss):
        own = 0 * outputs.logits.sum()  # a mean over no label: others have those of this batch
    if teacher is None:
        return own
    with torch.no_grad(), cast():
        target = teacher.model(**inputs, output_hidden_states=states)
    other = weights.logits * imitation(outputs, target, inputs, temperature=teacher.temperature)
    total = teacher.task_weight * own + (1 - teacher.task_weight) * other
    if states:
        total = total + teacher.hidden_weight * _states_apart(outputs, target, inputs, weights)
    return total


def _states_apart(
    outputs: Mapping[str, Any],
    target: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    weights: Weights,
) -> Tensor:
    """Return `hidden_distance` `()`; of an encoder-decoder the mean of that of both stacks."""
    mask = inputs.get("attention_mask")
    masks = {
        "hidden_states": (mask, weights.tokens),
        "encoder_hidden_states": (mask, weights.tokens),
    }
    if "labels" in inputs:
        masks["decoder_hidden_states"] = inputs["labels"] != IGNORED, weights.targets
    found = [
        weight * hidden_distance(outputs[name], target[name], counted)
        for name, (counted, weight) in masks.items()
        if name in outputs
    ]
    return torch.stack(found).mean()


def imitation(
    outputs: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    temperature: float,
) -> Tensor:
    """Return the divergence of all logits from the teacher's, where they count `()`."""
    labels = inputs.get("labels")
    counted = inputs.get("attention_mask")
    if labels is not None and labels.dim() > 1:
        counted = labels != IGNORED
    found = [
        distillation(outputs[name], target[name], temperature, counted)
        for name in ("logits", "start_logits", "end_logits")
        if name in outputs
    ]
    return torch.stack(found).mean()  # of start and end, as the library's loss is


@torch.inference_mode()
def divergence(
    model: PreTrainedModel, dense: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]
) -> float:
    """Return KL(dense || model) of the outputs, the mean over batches, in nats.

    Raises:
        FloatingPointError: it is not finite.
    """
    found = [imitation(model(**b), dense(**b), b, temperature=1.0) for b in batches]
    mean = float(torch.stack(found).mean())
    if not math.isfinite(mean):
        raise FloatingPointError(f"divergence: found {mean}, expected a number")
    return mean


def distillation(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None
) -> Tensor:
    """Return T^2 KL(teacher / T || student / T), averaged over positions `()`.

    `student` and `teacher` are logits `(..., C)`; `mask` `(...)` says which positions count. One
    output is a number, and of it this is the squared difference.
    """
    student, teacher = _wide(student), _wide(teacher)
    if student.shape[-1] == 1:
        return _mean((student - teacher).square().squeeze(-1), mask)
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, dim=-1),
        functional.log_softmax(teacher / temperature, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return temperature**2 * _mean(divergence, mask)


def hidden_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None
) -> Tensor:
    """Return the mean over layers and positions of |s - t|^2 / |t|^2 `()`.

    With fewer layers in the student, each is compared with the teacher's at the same relative
    depth.
    """
    total = _wide(student[0]).new_zeros(())
    for at, state in enumerate(map(_wide, student)):
        matching = _wide(teacher[round(at * (len(teacher) - 1) / max(len(student) - 1, 1))])
        error = (state - matching).square().sum(-1) / matching.square().sum(-1).clamp_min(1e-12)
        total = total + _mean(error, mask)
    return total / len(student)


def _wide(values: Tensor) -> Tensor:
    """Return what 16 bits hold in 32, what is wider as it is."""
    return values.float() if values.dtype.itemsize == 2 else values  # noqa: PLR2004 - bytes


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp_min(1)
