"""Several processes of one run, as torchrun or accelerate start them.

The first leads: it alone writes to the store, measures and reports. The others do what it does in
the same order, wait wherever it makes something, and join it where the work is shared. torch is
imported where there are several, so that a store can be listed without it.
"""

import os
from datetime import timedelta
from typing import Final

PATIENCE: Final = timedelta(days=30)
"""The others wait as long as a step of the leader takes."""


def start(device: str) -> None:
    """Meet the other processes, if there are any.

    Raises:
        Unavailable: FSDP is asked for in its first version.
    """
    if _fsdp():
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            from benchmarks.machine import Unavailable

            raise Unavailable(
                f"FSDP_VERSION: found {version}, expected 2; pass --fsdp_version 2 to accelerate"
                " launch, or set it"
            )
        # Every process reads the whole model, as it does without.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        if count() == 1:
            os.environ["ACCELERATE_USE_FSDP"] = "false"  # one has nothing to share
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu", timeout=PATIENCE)


def count() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def beside() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def sharded() -> bool:
    """Return whether they share the weights out (FSDP), as accelerate is told."""
    return count() > 1 and _fsdp()


def leads() -> bool:
    """Return whether this is the first process."""
    return os.environ.get("RANK", "0") == "0"


def agree(value: float) -> float:
    """Return the leader's value, in every process; all wait for it."""
    if count() == 1:
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast

    told = torch.tensor([value], dtype=torch.float64, device=PartialState().device)
    return float(broadcast(told))


def _fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
