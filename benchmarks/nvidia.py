"""The GPU's own counters, as NVIDIA's library tells them (NVML): memory in use, and energy.

Of the first device that CUDA shows this process, by `CUDA_VISIBLE_DEVICES`; numbers there, and
without it, are taken in the order of the bus.

https://docs.nvidia.com/deploy/nvml-api
"""

import os
from collections.abc import Callable
from typing import Any


def used_bytes() -> int | None:
    """Return the bytes of the device's memory that are in use, by whomever; None if nobody tells.

    What NVML says of single processes is hidden from containers.
    """
    device, _ = _device()
    if device is None:
        return None
    import pynvml

    return int(pynvml.nvmlDeviceGetMemoryInfo(device).used)


def energy_counter() -> tuple[Callable[[], int] | None, str]:
    """Return what tells the microjoules that the device has used, or None and the reason."""
    device, reason = _device()
    if device is None:
        return None, reason
    import pynvml

    def microjoules() -> int:
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(device)) * 1000

    try:
        microjoules()
    except pynvml.NVMLError as error:
        return None, f"the GPU's energy counter cannot be read: {error}"
    return microjoules, ""


def _device() -> tuple[Any, str]:
    """Return NVML's handle of the device, or None and the reason."""
    try:
        import pynvml
    except ImportError:
        return None, "the GPU's counters need nvidia-ml-py, of the extra `gpu`"
    name = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip() or "0"
    try:
        pynvml.nvmlInit()
        if name.isdigit():
            return pynvml.nvmlDeviceGetHandleByIndex(int(name)), ""
        return pynvml.nvmlDeviceGetHandleByUUID(name), ""
    except pynvml.NVMLError as error:
        return None, f"the GPU's counters cannot be read: {error}"
