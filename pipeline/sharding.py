"""Weights shared out over the processes of a training (FSDP2).

Each process holds its part of every parameter, of its gradient and of its moments, and gathers the
whole of a layer only while that layer computes.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from pipeline import processes, structure


def share_out(model: PreTrainedModel, device: torch.device) -> None:
    """Share the parameters of a model out, in place: every layer's, then all others together.

    All processes do it. Nothing turns it back: `whole` gives the parameters for another model.
    """
    if isinstance(model, FSDPModule):
        return
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # what a cut left may not be
    mesh = init_device_mesh(device.type, (processes.count(),))
    for module in [*_layers(model), model]:
        fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered from all processes, each of which asks for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return of a whole tensor what this process holds of `other`, in the same form."""
    tensor = tensor.to(other.device)
    if not isinstance(other, DTensor):
        return tensor
    # The same is there in every process: none has to send it.
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of all stacks; none of a family whose layers are not known."""
    try:
        return [layer for _, layers in structure.stacks(model) for layer in layers]
    except ValueError:
        return []
