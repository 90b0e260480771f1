"""Energy that the processor or the GPU has used, where there is a sensor that may be read.

Of processors Intel's and AMD's counters (RAPL), as the kernel shows them. Virtual machines have
none, and most distributions let only root read them. Nothing is estimated: without a sensor there
is no number.

https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import nvidia

POWERCAP: Final = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """A counter of a processor package or a GPU: microjoules, which begin again after `wraps`."""

    microjoules: Callable[[], int]
    wraps: int


def counters(device: str) -> tuple[list[Counter], str]:
    """Return the counters of the GPU, or of the processor, or none and the reason."""
    if device == "cpu":
        return of_processors(POWERCAP)
    microjoules, reason = nvidia.energy_counter()
    return ([] if microjoules is None else [Counter(microjoules, wraps=1 << 63)]), reason


def of_processors(root: Path) -> tuple[list[Counter], str]:
    """Return the counters of all packages, or none and the reason."""
    zones = sorted(root.glob("*-rapl:[0-9]*"))
    packages = [zone for zone in zones if _name(zone).startswith("package")]
    if not packages:
        return [], "this machine has no energy counter"
    found = []
    for package in packages:
        try:
            _microjoules(package / "energy_uj")
            wraps = int((package / "max_energy_range_uj").read_text())
        except OSError as error:
            return [], f"the energy counter cannot be read: {error.strerror}"
        found.append(Counter(partial(_microjoules, package / "energy_uj"), wraps))
    return found, ""


def _microjoules(path: Path) -> int:
    return int(path.read_text())


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def read(found: list[Counter]) -> list[int]:
    """Return what the counters stand at."""
    return [counter.microjoules() for counter in found]


def joules(found: list[Counter], before: list[int], after: list[int]) -> float:
    """Return the energy used between two readings, less than one turn of a counter apart."""
    readings = zip(found, before, after, strict=True)
    return sum((later - earlier) % counter.wraps for counter, earlier, later in readings) / 1e6
