"""Recover accuracy by training, with the unpruned model as teacher.

The order of the data and all that is random in a step follow from the seed and the step's number
alone. So a training that was killed goes on from its last checkpoint to the same weights, bit for
bit on a CPU, and no state of a random generator is ever stored. Several processes, as torchrun or
accelerate start them, share each batch.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.accuracy import Track, silent
from benchmarks.examples import Arrays, Example, collate
from pipeline import processes
from pipeline.distillation import Teacher, loss

LARGEST_NORM: Final = 1.0
"""Gradients are scaled down to this norm."""
SAVING: Final = 1 / 30
"""The share of the time that may be spent on checkpoints."""
_LEARNER: Final = "learner."


class TrainingError(RuntimeError):
    """Training went wrong: the loss is no longer a number."""


class Learner(Protocol):
    """A module that learns, while the model trains, which units to cut; see `masks`."""

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
        freeze_embeddings: leave the embedding tables as they are.
        teacher: what to imitate beside the task's own loss.
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
    nn.Module.to(model, accelerator.device)
    if teacher is not None:
        nn.Module.to(teacher.model, accelerator.device).eval()
    total = max(1, math.ceil(epochs * math.ceil(len(windows) / batch_size)))
    looks = {math.ceil(total * at / evaluations) for at in range(1, evaluations + 1)}
    with _frozen(model, embeddings=freeze_embeddings):
        state = _begin(model, learner, learning_rate, weight_decay)
        parallel = accelerator.prepare(model)
        if checkpoint is not None and checkpoint.exists():
            state.resume(checkpoint)
        clock = _Clock(save_seconds)
        bar = iter(track(range(total), "training", total))
        for step, chosen in enumerate(_order(windows, batch_size, total, seed)):
            next(bar, None)
            if step < state.step:
                continue
            if _no_better(state.scores, patience):
                break
            state.rate(_rate(step, total, warmup))
            set_seed(seed + (step + 1) * accelerator.num_processes + accelerator.process_index)
            if learner is not None:
                learner.begin(step / total)
            mine, weight = _share([windows[at] for at in chosen], accelerator)
            model.train()
            inputs = _batch(mine, padding, accelerator.device)
            _step(weight * loss(parallel, inputs, teacher), state, learner, accelerator)
            if evaluate is not None and state.step in looks:
                _look(model, evaluate, state, accelerator)
            if checkpoint is not None and accelerator.is_main_process and clock.due():
                with clock:
                    state.save(checkpoint)
        for _ in bar:  # to its end, where training ended before
            pass
        state.take_best()
    model.eval()
    kept = max(state.scores, key=lambda at: state.scores[at], default=state.step)
    return Trained(state.total_loss / state.step, kept, state.scores)


@dataclass
class _State:
    """What changes from step to step: counters, and tensors by name, changed in place."""

    tensors: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    named: dict[str, nn.Parameter]
    step: int = 0
    total_loss: float = 0.0
    scores: dict[int, float] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)

    def rate(self, share: float) -> None:
        """Set the learning rates to this share of the highest."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * share

    @torch.no_grad()
    def take_best(self) -> None:
        """Go back to the weights with the best score, if there were scores."""
        for name, tensor in self.best.items():
            self.tensors[name].copy_(tensor)

    def save(self, path: Path) -> None:
        """Write a checkpoint, as a whole or not at all."""
        tensors = {f"now.{name}": tensor for name, tensor in self.tensors.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.named.items():
            for what, moment in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{what}.{name}"] = moment
        counters = {"step": self.step, "total_loss": self.total_loss, "scores": self.scores}
        unfinished = path.with_name(f"{path.name}.unfinished")
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(counters)
        digest = _digest(text, sorted(contiguous), contiguous.__getitem__)
        save_file(contiguous, unfinished, metadata={"state": text, "sha256": digest})
        unfinished.replace(path)

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Take up what `save` wrote, if that is what is there."""
        if not _whole(path):
            return
        with safe_open(path, framework="pt") as stored:
            counters = json.loads(stored.metadata()["state"])
            self.step, self.total_loss = counters["step"], counters["total_loss"]
            self.scores = {int(step): score for step, score in counters["scores"].items()}
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                what, _, which = name.partition(".")
                tensor = stored.get_tensor(name)
                if what == "now":
                    self.tensors[which].copy_(tensor)
                elif what == "best":
                    self.best[which] = tensor
                else:
                    parameter = self.named[which]
                    self.optimizer.state[parameter][what] = tensor.to(parameter.device)


def _digest(text: str, names: Sequence[str], tensor: Callable[[str], Tensor]) -> str:
    """Return the sha256 of what a checkpoint holds."""
    found = hashlib.sha256(text.encode())
    for name in names:
        found.update(name.encode())
        found.update(tensor(name).cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _whole(path: Path) -> bool:
    """Return whether a checkpoint is what was written; a damaged one is as good as none."""
    try:
        with safe_open(path, framework="pt") as stored:
            told = stored.metadata()
            found = _digest(told["state"], sorted(stored.keys()), stored.get_tensor)
            return bool(found == told["sha256"])
    except (SafetensorError, KeyError, TypeError):
        return False


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


def _step(found: Tensor, state: _State, learner: Learner | None, accelerator: Accelerator) -> None:
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
        _learn(learner, accelerator)
    weights = [p for name, p in state.named.items() if not name.startswith(_LEARNER)]
    norm = accelerator.clip_grad_norm_(weights, LARGEST_NORM)
    if norm is not None and not torch.isfinite(norm):
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
) -> _State:
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
    return _State(tensors, optimizer, trained)


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


def _share(batch: Sequence[Arrays], accelerator: Accelerator) -> tuple[Sequence[Arrays], float]:
    """Return this process's part of a batch, and the weight of its mean in that of the batch.

    The weighted means of all processes, averaged, are the mean of the batch, of losses that are
    means over windows; where they are means over tokens, a process with few of them counts more.
    """
    mine = batch[accelerator.process_index :: accelerator.num_processes]
    weight = len(mine) * accelerator.num_processes / len(batch)
    return mine or batch[:1], weight  # all of them take every step


def _batch(
    windows: Sequence[Arrays], padding: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    arrays = collate(windows, padding)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _learn(learner: Learner, accelerator: Accelerator) -> None:
    """Average the gradients of the learner over the processes, as those of the model are."""
    for group in learner.options():
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
    learner.see()


def _look(
    model: PreTrainedModel, evaluate: Callable[[], float], state: _State, accelerator: Accelerator
) -> None:
    """Score the model, and keep its weights if they are the best so far."""
    model.eval()
    score = processes.agree(evaluate() if accelerator.is_main_process else 0.0)
    if not state.scores or score > max(state.scores.values()):
        state.best = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
    state.scores[state.step] = score


def _no_better(scores: Mapping[int, float], patience: int) -> bool:
    """Return whether the last `patience` scores are all below or at an earlier one."""
    found = list(scores.values())
    return len(found) > patience and max(found[-patience:]) <= max(found[:-patience])


class _Clock:
    """Says when a checkpoint is due: not too often, and a small part of the time in all."""

    def __init__(self, least_seconds: float) -> None:
        self._least = least_seconds
        self._saved, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        return time.monotonic() - self._saved > max(self._least, self._cost / SAVING)

    def __enter__(self) -> None:
        self._cost = -time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._saved = time.monotonic()
        self._cost += self._saved
