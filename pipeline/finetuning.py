"""Recover accuracy by training, with the unpruned model as teacher.

The order of the data and all that is random in a step follow from the seed and the step's number
alone. So a training that was killed goes on from its last checkpoint to the same weights, bit for
bit on a CPU, and no state of a random generator is ever stored. Several processes, as torchrun or
accelerate start them, share each batch; the weights as well (FSDP2) where accelerate is told to.
What trains is then a copy of the model in parts, and the model itself, whole, takes its weights.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.accuracy import Track, silent
from benchmarks.examples import IGNORED, Arrays, Example, collate
from pipeline import processes, sharding
from pipeline.distillation import Teacher, Weights, loss
from pipeline.resuming import Clock, State

LARGEST_NORM: Final = 1.0
"""Gradients are scaled down to this norm."""
_LEARNER: Final = "learner."


class TrainingError(RuntimeError):
    """Training went wrong: the loss is no longer a number."""


class Learner(Protocol):
    """A module that learns, while the model trains, which units to cut; see `masks`."""

    @property
    def watches(self) -> bool:
        """Whether `see` looks at the model's weights and their gradients."""

    def options(self) -> list[dict[str, Any]]:
        """Return its parameters with the options of the optimizer for them."""

    def begin(self, done: float) -> None:
        """Be told, before each step, which share of the training is done."""

    def penalty(self) -> Tensor:
        """Return what is added to the loss of this step `()`."""

    def see(self) -> None:
        """Look at the gradients of this step."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what it has learnt so far, to be stored and changed in place."""


@dataclass(frozen=True)
class Trained:
    """How a training went.

    `loss` is its mean over all steps; `scores` are what `evaluate` gave, by the step; the weights
    are those after `step`.
    """

    loss: float
    step: int
    scores: dict[int, float]


def finetune(
    model: PreTrainedModel,
    examples: Sequence[Example],
    padding: Mapping[str, int],
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    precision: Literal["fp32", "bf16"] = "fp32",
    freeze_embeddings: bool = False,
    teacher: Teacher | None = None,
    learner: Learner | None = None,
    evaluate: Callable[[], float] | None = None,
    evaluations: int = 10,
    patience: int = 3,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    save_seconds: float = 30.0,
    track: Track = silent,
) -> Trained:
    """Train the model in place, and leave it in evaluation mode.

    Args:
        model: changed in place.
        examples: what to train on; every window is one training example.
        padding: padding values, by the names of inputs and labels.
        epochs: passes over the examples; a fraction ends within one.
        learning_rate: the highest; it rises from 0 during `warmup` and falls to 0 linearly.
        batch_size: windows a step, of all processes together.
        warmup: the share of all steps in which the learning rate rises.
        weight_decay: AdamW's, of matrices.
        precision: of matrix products and of what follows them up to the next norm or sum, in both
            models; losses, weights and the optimizer stay as they are.
        freeze_embeddings: leave the embedding tables as they are.
        teacher: what to imitate beside the task's own loss; where weights are shared out, its are
            too, and stay so.
        learner: what learns beside the model which of its units can go.
        evaluate: scores the model as it is, higher is better; the best weights are kept then.
        evaluations: how often that is done, at even distances.
        patience: after so many evaluations without a better score training ends.
        seed: of the order and of dropout.
        device: "cpu" or "cuda".
        checkpoint: a file for what is needed to go on after a kill; if it is there, training does.
        save_seconds: the least time between two checkpoints.
        track: shows progress.

    Raises:
        TrainingError: the loss is not finite; the message names the step.
    """
    windows = [{**w.inputs, **w.labels} for example in examples for w in example.windows]
    # An emptied attention or FFN leaves a norm that no loss reaches.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[unused])
    total = max(1, math.ceil(epochs * math.ceil(len(windows) / batch_size)))
    looks = {math.ceil(total * at / evaluations) for at in range(1, evaluations + 1)}
    with _frozen(model, embeddings=freeze_embeddings):
        trained = _spread(model, teacher, accelerator.device)
        state = _begin(trained, learner, learning_rate, weight_decay)
        parallel = accelerator.prepare(model) if trained is model else trained
        if checkpoint is not None and checkpoint.exists():
            state.resume(checkpoint)
        clock = Clock(save_seconds)
        bar = iter(track(range(total), "training", total))
        for step, chosen in enumerate(_order(windows, batch_size, total, seed)):
            next(bar, None)
            if step < state.step:
                continue
            if _no_better(state.scores, patience):
                break
            state.rate(_rate(step, total, warmup))
            set_seed(seed + step + 1)
            if learner is not None:
                learner.begin(step / total)  # all processes draw the same masks
            if accelerator.num_processes > 1:  # and each its own dropout
                own = (step + 1) * accelerator.num_processes + accelerator.process_index
                set_seed(seed + own)
            batch = [windows[at] for at in chosen]
            mine = batch[accelerator.process_index :: accelerator.num_processes]
            weights = _weights(model, mine, batch, accelerator.num_processes)
            trained.train()
            # All of them take every step, without a part in it as well.
            inputs = _batch(mine or batch[:1], padding, accelerator.device)
            found = loss(parallel, inputs, teacher, weights, precision)
            _step(found, model, state, learner, accelerator)
            if evaluate is not None and state.step in looks:
                _look(model, evaluate, state, accelerator)
            if checkpoint is not None and state.saves(clock):
                with clock:
                    state.save(checkpoint)
        for _ in bar:  # to its end, where training ended before
            pass
        state.take_best()
        state.give(model)
    model.eval()
    kept = max(state.scores, key=lambda at: state.scores[at], default=state.step)
    return Trained(state.total_loss / state.step, kept, state.scores)


@contextmanager
def _frozen(model: PreTrainedModel, *, embeddings: bool) -> Iterator[None]:
    """Leave the embedding tables out of training, if told to."""
    tables = list(model.get_input_embeddings().parameters()) if embeddings else []
    tables = [table for table in tables if table.requires_grad]
    for table in tables:
        table.requires_grad_(False)  # noqa: FBT003 - torch takes no keyword
    try:
        yield
    finally:
        for table in tables:
            table.requires_grad_(True)  # noqa: FBT003


def _spread(
    model: PreTrainedModel, teacher: Teacher | None, device: torch.device
) -> PreTrainedModel:
    """Put model and teacher on the device, and return what trains: the model, or a copy in parts.

    In parts nothing else could be done with it: it cannot be saved, nor scored by one process.
    """
    others = [] if teacher is None else [teacher.model.eval()]
    if not processes.sharded():
        for each in (model, *others):
            nn.Module.to(each, device)
        return model
    nn.Module.to(model, "cpu")
    copied = copy.deepcopy(model)
    for each in (copied, *others):
        sharding.share_out(each, device)
    return copied


def _step(
    found: Tensor,
    model: PreTrainedModel,
    state: State,
    learner: Learner | None,
    accelerator: Accelerator,
) -> None:
    """Go one step down from the loss that was found."""
    if learner is not None:
        found = found + learner.penalty()
    if not torch.isfinite(found):
        raise TrainingError(
            f"finetune: found the loss {found.item()} at step {state.step + 1}, expected a number;"
            " lower the learning rate"
        )
    accelerator.backward(found)
    if learner is not None:
        _learn(learner, model, state, accelerator)
    weights = [p for name, p in state.named.items() if not name.startswith(_LEARNER)]
    norm = sharding.whole(accelerator.clip_grad_norm_(weights, LARGEST_NORM))
    if not torch.isfinite(norm):
        raise TrainingError(
            f"finetune: found gradients of the norm {float(norm)} at step {state.step + 1},"
            " expected a number; lower the learning rate"
        )
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    state.total_loss += float(accelerator.reduce(found.detach(), "mean"))


def _begin(
    model: PreTrainedModel, learner: Learner | None, learning_rate: float, weight_decay: float
) -> State:
    """Return the state before the first step; biases and norms do not decay."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [parameter for parameter in named.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in named.values() if parameter.dim() <= 1]
    options: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    tensors: dict[str, Tensor] = dict(named)
    tensors |= {
        name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()
    }
    if learner is not None:
        options += learner.options()
        tensors |= {f"{_LEARNER}{name}": tensor for name, tensor in learner.tensors().items()}
    optimizer = torch.optim.AdamW(options, lr=learning_rate, fused=True)
    for group in optimizer.param_groups:
        group["highest"] = group["lr"]
    trained = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter)}
    return State(model, tensors, optimizer, trained)


def _order(
    windows: Sequence[Arrays], batch_size: int, total: int, seed: int
) -> Iterator[list[int]]:
    """Yield the windows of each of `total` steps; texts of like length share a batch."""
    lengths = [len(w["input_ids"]) if "input_ids" in w else 1 for w in windows]
    step, epoch = 0, 0
    while step < total:
        generator = torch.Generator().manual_seed(seed + epoch)
        order = get_length_grouped_indices(lengths, batch_size, generator=generator)
        starts = torch.arange(0, len(order), batch_size)
        for at in starts[torch.randperm(len(starts), generator=generator)][: total - step]:
            yield order[at : at + batch_size]
            step += 1
        epoch += 1


def _rate(step: int, total: int, warmup: float) -> float:
    """Return the learning rate of a step as a share of the highest: up, then down to 0."""
    rising = math.ceil(warmup * total)
    return step / rising if step < rising else (total - step) / max(1, total - rising)


def _weights(
    model: PreTrainedModel, mine: Sequence[Arrays], batch: Sequence[Arrays], processes: int
) -> Weights:
    """Return the weights of the means of a process's part of a batch."""

    def of(count: Callable[[Arrays], int]) -> float:
        return processes * sum(map(count, mine)) / max(sum(map(count, batch)), 1)

    windows = of(lambda _: 1)
    read = of(lambda w: int(w["attention_mask"].sum())) if "attention_mask" in batch[0] else windows
    if "labels" not in batch[0] or batch[0]["labels"].ndim == 0:
        return Weights(windows, windows, read, windows)
    labelled = of(lambda w: int((w["labels"] != IGNORED).sum()))
    own = labelled
    if model.can_generate() and not model.config.is_encoder_decoder:  # a token foretells the next
        own = of(lambda w: int((w["labels"][1:] != IGNORED).sum()))
    return Weights(own, labelled, read, labelled)


def _batch(
    windows: Sequence[Arrays], padding: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    arrays = collate(windows, padding)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _learn(
    learner: Learner, model: PreTrainedModel, state: State, accelerator: Accelerator
) -> None:
    """Average the gradients of the learner over the processes, as those of the model are."""
    for group in learner.options():
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
    if learner.watches:
        state.give(model, gradients=True)
    learner.see()


def _look(
    model: PreTrainedModel, evaluate: Callable[[], float], state: State, accelerator: Accelerator
) -> None:
    """Score the model, and keep its weights if they are the best so far."""
    state.give(model)
    model.eval()
    score = 0.0
    if accelerator.is_main_process:
        at = model.device
        nn.Module.to(model, accelerator.device)
        score = evaluate()
        nn.Module.to(model, at)
    score = processes.agree(score)
    if not state.scores or score > max(state.scores.values()):
        state.best = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
    state.scores[state.step] = score


def _no_better(scores: Mapping[int, float], patience: int) -> bool:
    """Return whether the last `patience` scores are all below or at an earlier one."""
    found = list(scores.values())
    return len(found) > patience and max(found[-patience:]) <= max(found[:-patience])
