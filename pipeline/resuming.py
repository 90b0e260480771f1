"""What changes in a training from step to step, kept in a file from which it goes on after a kill.

A checkpoint is whole or not there, and holds whole tensors, however many processes share them.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline import processes, sharding

SAVING: Final = 1 / 30
"""The share of the time that may be spent on checkpoints."""


class Clock:
    """Says when a checkpoint is due: not too often, and a small part of the time in all."""

    def __init__(self, least_seconds: float) -> None:
        self._least = least_seconds
        self._saved, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Return whether it is."""
        return time.monotonic() - self._saved > max(self._least, self._cost / SAVING)

    def __enter__(self) -> None:
        self._cost = -time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._saved = time.monotonic()
        self._cost += self._saved


@dataclass
class State:
    """Counters, and tensors by name, changed in place; `named` are those that are trained.

    `model` is what trains. Where its weights are shared out, all processes save and give together.
    """

    model: PreTrainedModel
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

    @torch.no_grad()
    def give(self, model: PreTrainedModel, *, gradients: bool = False) -> None:
        """Give another model the weights as they are now, whole, and the gradients if asked to."""
        if model is self.model:
            return
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in self.tensors:
                tensor.copy_(sharding.whole(self.tensors[name]))
        for name, parameter in model.named_parameters():
            gradient = self.named[name].grad if gradients and name in self.named else None
            if gradient is not None:
                gradient = sharding.whole(gradient).to(parameter.device)
            parameter.grad = gradient

    def saves(self, clock: Clock) -> bool:
        """Return whether this process takes part in saving now."""
        if processes.sharded():
            return bool(processes.agree(clock.due()))
        return processes.leads() and clock.due()

    def save(self, path: Path) -> None:
        """Write a checkpoint, as a whole or not at all."""
        tensors = {f"now.{name}": tensor for name, tensor in self.tensors.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.named.items():
            for what, moment in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{what}.{name}"] = moment
        found = {}
        for name, tensor in tensors.items():
            entire = sharding.whole(tensor.detach())
            if processes.leads():
                found[name] = entire.cpu().contiguous()
        if not processes.leads():
            return
        counters = {"step": self.step, "total_loss": self.total_loss, "scores": self.scores}
        unfinished = path.with_name(f"{path.name}.unfinished")
        text = json.dumps(counters)
        digest = _digest(text, sorted(found), found.__getitem__)
        save_file(found, unfinished, metadata={"state": text, "sha256": digest})
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
                    self.tensors[which].copy_(sharding.like(tensor, self.tensors[which]))
                elif what == "best":
                    self.best[which] = sharding.like(tensor, self.tensors[which])
                else:
                    parameter = self.named[which]
                    moments = self.optimizer.state[parameter]
                    # The number of steps is no part of a matrix.
                    moments[what] = (
                        sharding.like(tensor, parameter)
                        if tensor.shape == parameter.shape
                        else tensor.to(parameter.device)
                    )


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
