"""Cores and devices of this machine, each held by one run of a sweep at a time.

A run takes a physical core for each of its threads, all of them where its target is dedicated, and
on CUDA a device. What is taken is a lock on a file, which the kernel drops with its holder: it does
not matter who started the runs, one sweep or several, Slurm or Ray. Whoever finds too few free ones
waits. Caches and memory bandwidth are shared all the same.

To be used before torch is imported: threads keep the cores that they were started with.
"""

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Final

from benchmarks.machine import Unavailable

TOPOLOGY: Final = Path("/sys/devices/system/cpu")
POLL_SECONDS: Final = 1.0
_COUNTED: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"


@contextmanager
def reserved(
    threads: int, device: str, *, dedicated: bool, waits: Callable[[], object]
) -> Iterator[None]:
    """Be on cores, and on a device, that no other run of a sweep has.

    Args:
        threads: of the run.
        device: `cpu` or `cuda`.
        dedicated: take all cores.
        waits: called once if too few are free.

    Raises:
        Unavailable: the devices cannot be told.
    """
    cores, devices = physical_cores(), visible_devices() if device == "cuda" else {}
    count = len(cores) if dedicated else min(threads, len(cores))
    wanted = [(list(cores), count), (list(devices), int(device == "cuda"))]
    with _held(wanted, waits) as names:
        changes = dict.fromkeys(_COUNTED, str(threads))
        if device == "cuda":
            changes[_VISIBLE] = next(devices[name] for name in names if name in devices)
        with _environment(changes), _pinned({c for n in names for c in cores.get(n, ())}):
            yield


def physical_cores(topology: Path = TOPOLOGY) -> dict[str, list[int]]:
    """Return the usable CPUs of each physical core, by its name on this machine."""
    if hasattr(os, "sched_getaffinity"):
        usable = sorted(os.sched_getaffinity(0))
    else:
        usable = list(range(os.cpu_count() or 1))
    cores: dict[str, list[int]] = {}
    for cpu in usable:
        siblings = topology / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        text = siblings.read_text(encoding="utf-8") if siblings.is_file() else str(cpu)
        first = text.strip().partition(",")[0].partition("-")[0]  # 0,4 or 0-1
        cores.setdefault(f"core-{first}", []).append(cpu)
    return cores


def visible_devices() -> dict[str, str]:
    """Return what CUDA calls each visible GPU, by its name on this machine.

    Raises:
        Unavailable: the driver does not tell them, or there is none.
    """
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(
            f"target.device: found no answer from nvidia-smi ({error}), expected the GPUs here, so"
            " that no two runs share one"
        ) from None
    by_number = dict(line.split(", ") for line in told.stdout.splitlines())
    visible = os.environ.get(_VISIBLE)
    names = list(by_number.values()) if visible is None else [n for n in visible.split(",") if n]
    if not names:
        raise Unavailable("target.device: found no GPU that is visible, expected one")
    return {f"gpu-{by_number.get(name, name)}": name for name in names}


@contextmanager
def _held(
    wanted: Sequence[tuple[Sequence[str], int]], waits: Callable[[], object]
) -> Iterator[list[str]]:
    """Hold so many of each list of names, all at once or none."""
    folder = Path(tempfile.gettempdir(), f"secateur-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    count, told = sum(count for _, count in wanted), False
    while True:
        with ExitStack() as stack:
            with (folder / "all").open("w") as turn:  # one tries at a time
                fcntl.flock(turn, fcntl.LOCK_EX)
                free = [(n for n in names if _lock(folder / n, stack)) for names, _ in wanted]
                both = zip(free, wanted, strict=True)
                names = [name for some, (_, most) in both for name in islice(some, most)]
            if len(names) == count:
                yield names
                return
        if not told:
            waits()
            told = True
        time.sleep(POLL_SECONDS)


def _lock(path: Path, stack: ExitStack) -> bool:
    """Return whether a lock is held from now on, until the stack is left."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    stack.enter_context(file)
    return True


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _pinned(cpus: set[int]) -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
