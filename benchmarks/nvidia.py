"""The GPU's own counters, as NVIDIA's library tells them (NVML): memory in use, and energy.

Of the first device that CUDA shows this process, by `CUDA_VISIBLE_DEVICES`. CUDA counts devices
the fastest first unless `CUDA_DEVICE_ORDER` says otherwise, NVML as they lie on the bus: where
there are several, and it does not say so, they cannot be told apart by a number.

https://docs.nvidia.com/deploy/nvml-api
"""

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any


def used_bytes() -> tuple[int | None, str]:
    """Return the bytes of the device's memory that are in use, by whomever, or None and the reason.

    What NVML says of single processes is hidden from containers.
    """

    def used(library: ModuleType, device: Any) -> int:
        return int(library.nvmlDeviceGetMemoryInfo(device).used)

    return _ask(used)


def energy_counter() -> tuple[Callable[[], int] | None, str]:
    """Return what tells the microjoules that the device has used, or None and the reason."""

    def counter(library: ModuleType, device: Any) -> Callable[[], int]:
        def microjoules() -> int:
            return int(library.nvmlDeviceGetTotalEnergyConsumption(device)) * 1000

        microjoules()  # not every device has it
        return microjoules

    return _ask(counter)


def _ask(act: Callable[[ModuleType, Any], Any]) -> tuple[Any, str]:
    """Return what comes of NVML and the device, or None and why nothing does."""
    try:
        import pynvml
    except ImportError:
        return (
            None,
            "the GPU's counters need nvidia-ml-py, which the extras `gpu` and `tensorrt` have",
        )
    try:
        pynvml.nvmlInit()
        return act(pynvml, _device(pynvml)), ""
    except (pynvml.NVMLError, LookupError) as error:
        return None, f"the GPU's counters cannot be read: {error}"


def _device(library: ModuleType) -> Any:
    """Return the device's handle.

    Raises:
        LookupError: it is not to be told which one it is.
    """
    count = library.nvmlDeviceGetCount()
    handles = [library.nvmlDeviceGetHandleByIndex(at) for at in range(count)]
    name = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    if name.startswith("GPU-"):  # CUDA takes the beginning of a UUID
        for handle in handles:
            if library.nvmlDeviceGetUUID(handle).startswith(name):
                return handle
    if name.startswith("MIG-"):
        return library.nvmlDeviceGetHandleByUUID(name)
    if name.isdigit() and count > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise LookupError(f"found {count} GPUs, expected CUDA_DEVICE_ORDER=PCI_BUS_ID with several")
    if not name.isdigit() or int(name) >= count:
        raise LookupError(f"found CUDA_VISIBLE_DEVICES {name!r}, expected one of {count} devices")
    return handles[int(name)]
