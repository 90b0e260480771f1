"""What machine the numbers come from.

Part of every report, because latency and int8 accuracy both depend on it. What cannot be read is
None.
"""

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from math import ceil
from pathlib import Path

import psutil

# The instruction sets that decide which int8 and fp32 kernels a runtime chooses.
_FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
_PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "tokenizers",
    "datasets",
    "bitsandbytes",
    "mlcommons-loadgen",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt-rtx",
    "optimum",
    "gptqmodel",
)


class Unavailable(RuntimeError):
    """The target or a dependency is not there on this machine."""


@dataclass(frozen=True)
class Machine:
    """The machine: `memory_bytes` in total, `versions` of what computes.

    `virtual` is whether a hypervisor lies below; `governor` how the clock is set; `cpu_quota` how
    many cores the control group may use, None if there is no limit or none that can be read.
    """

    system: str
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    memory_bytes: int
    gpu: str | None
    python: str
    versions: dict[str, str]
    virtual: bool = False
    governor: str | None = None
    cpu_quota: float | None = None
    driver: str | None = None

    def identity(self) -> dict[str, object]:
        """Return what must be equal for two measurements to be comparable."""
        return asdict(self)

    @property
    def saturates(self) -> bool:
        """Whether 8-bit products may overflow 16 bits here (x86 without VNNI or AMX).

        https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
        """
        x86 = platform.machine() in {"x86_64", "AMD64"}
        return x86 and not {"avx_vnni", "avx512_vnni", "amx_int8"} & set(self.cpu_flags)


def describe() -> Machine:
    """Return the description of this machine."""
    model, flags = _cpu()
    return Machine(
        system=platform.platform(),
        cpu=model,
        cpu_flags=tuple(flag for flag in _FLAGS if flag in flags),
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        virtual="hypervisor" in flags,
        governor=_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        cpu_quota=_cpu_quota(),
        gpu=_gpu(),
        driver=_text(Path("/sys/module/nvidia/version")),
        python=platform.python_version(),
        versions=_versions(),
    )


def usable_cores() -> int:
    """Return the number of cores that this process may use, by affinity and control group."""
    has = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has else os.cpu_count() or 1
    quota = _cpu_quota()
    return cores if quota is None else max(1, min(cores, ceil(quota)))


def pressure() -> dict[str, float | None]:
    """Return how busy the machine is.

    The load average of the last minute, and the share of the last ten seconds in which tasks waited
    for a core, in [0, 1]; None where the kernel does not say.

    https://docs.kernel.org/accounting/psi.html
    """
    stalled = None
    psi = Path("/proc/pressure/cpu")
    if psi.exists():
        stalled = float(psi.read_text().split("avg10=")[1].split()[0]) / 100
    return {"load_average": os.getloadavg()[0], "cpu_stalled": stalled}


def stalled_seconds() -> dict[str, float | None]:
    """Return for how long tasks have waited for a core, memory and disk since the machine started.

    https://docs.kernel.org/accounting/psi.html
    """
    found: dict[str, float | None] = {}
    for what in ("cpu", "memory", "io"):
        text = _text(Path("/proc/pressure", what))
        found[what] = int(text.split("total=")[1].split()[0]) / 1e6 if text else None
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Return the cores of a control group (version 2).

    https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
    """
    quota, _, period = (_text(path) or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _cpu() -> tuple[str, set[str]]:
    info = Path("/proc/cpuinfo")
    model, flags = platform.processor() or platform.machine(), set[str]()
    for line in info.read_text().splitlines() if info.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip().lower() in {"flags", "features"}:
            flags = set(value.split())
            break
    return model, flags


def _gpu() -> str | None:
    names = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    for name in names:
        for line in name.read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
