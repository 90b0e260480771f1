"""What does the runs of a sweep: processes of this machine, or tasks of a Ray cluster.

Either starts `secateur sweep run FOLDER --index I`, which is the same wherever it runs, and does
nothing if that run is done. A process that is killed is started again; what ends with a status of
its own is told, and the others go on. Nothing is left running when the driver ends or is killed.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any, Final
from urllib.parse import urlsplit

from benchmarks.machine import Unavailable
from exporters import MissingDependency
from pipeline.sweep import LOG, Member

RETRIES: Final = 2
"""How often a run is started again whose process was killed."""
CONNECT_SECONDS: Final = 10.0
_QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",  # else it reports to its makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns that this will be its default
    "RAY_worker_niceness": "0",  # else whatever else runs there comes before a benchmark
}
"""Settings of a cluster that is started here."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, below 0 the signal that ended it, and its last words."""

    index: int
    status: int
    said: str


class Killed(RuntimeError):
    """The process of a run was ended by a signal."""


def local(runs: Sequence[Member], slots: int) -> Generator[Ended, None, None]:
    """Yield how each run ended on this machine, so many of them at once."""
    running: set[subprocess.Popen[bytes]] = set()
    lock, stopped = Lock(), False

    def attempt(run: Member) -> int:
        with lock:
            if stopped:
                return 0
            process = _start(run)
            running.add(process)
        try:
            return process.wait()
        finally:
            running.discard(process)

    def attempts(run: Member) -> Ended:
        for _ in range(1 + RETRIES):
            status = attempt(run)
            if status >= 0:
                break
        return Ended(run.index, status, _last_words(run))

    pool = ThreadPoolExecutor(slots)
    try:
        for future in as_completed([pool.submit(attempts, run) for run in runs]):
            yield future.result()
    finally:
        with lock:
            stopped = True
            for process in running.copy():
                process.kill()
        pool.shutdown(cancel_futures=True)


def on_ray(runs: Sequence[Member], address: str | None) -> Generator[Ended, None, None]:
    """Yield how each run ended on a Ray cluster.

    Args:
        runs: to be done; each task asks for the cores of its threads, and on CUDA for a GPU.
        address: of the cluster; one of this machine alone is started, and ended, unless given.

    Raises:
        MissingDependency: Ray is not installed.
        Unavailable: there is no such cluster, or none of its machines has so many cores or a GPU.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise MissingDependency(
            "--executor ray: not installed; install the extra `ray`: pip install -e '.[ray]'"
        ) from None
    target = runs[0].recipe["target"]
    asked = {"CPU": target["threads"], "GPU": int(target["device"] == "cuda")}
    try:
        _knock(address)
        ray.init(
            address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (OSError, ValueError, RuntimeError) as error:
        where = f"--address: found no Ray cluster at {address}"
        raise Unavailable(
            f"{where if address else '--executor ray: found none that starts here'}: {error}"
        ) from None
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(k, 0) >= n for k, n in asked.items()) for node in nodes):
            raise Unavailable(
                f"--executor ray: found no machine with {asked['CPU']} CPUs"
                f"{' and a GPU' * asked['GPU']} in the cluster, expected one; target.threads and"
                " target.device ask for them"
            )
        task = ray.remote(_once).options(
            num_cpus=asked["CPU"],
            num_gpus=asked["GPU"],
            max_retries=RETRIES,
            retry_exceptions=[Killed],
        )
        waiting = {task.remote(run): run for run in runs}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            yield _gathered(ray, done, waiting.pop(done))
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Try to reach a cluster: where nothing answers, Ray waits for minutes, and ends the process.

    Raises:
        OSError: there is nothing at the address.
        ValueError: it is none.
    """
    parts = urlsplit(address if address and "//" in address else f"//{address or ''}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), CONNECT_SECONDS).close()


def _gathered(ray: Any, task: Any, run: Member) -> Ended:
    try:
        ended: Ended = ray.get(task)
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Ended(run.index, -1, lines[-1].strip() if lines else type(error).__name__)
    return ended


def _once(run: Member) -> Ended:
    """Do a run on whatever machine this is.

    Raises:
        Killed: its process was.
    """
    status = _start(run).wait()
    if status < 0:
        raise Killed(f"ended by signal {-status} ({_last_words(run)})")
    return Ended(run.index, status, _last_words(run))


def _start(run: Member) -> subprocess.Popen[bytes]:
    """Start the process of a run, which ends with this thread."""
    run.folder.mkdir(exist_ok=True)
    with (run.folder / LOG).open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - our own modules, no shell
            [sys.executable, "-m", "pipeline.leash", str(os.getpid()), *_command(run)],
            cwd=Path(__file__).parents[1],  # `-m` looks there first: for us, not for a namesake
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _command(run: Member) -> list[str]:
    command = ["sweep", "run", str(run.folder.parent), "--index", str(run.index)]
    return [sys.executable, "-m", "pipeline", *command]


def _last_words(run: Member) -> str:
    """Return what the command said last of itself, or else the last line."""
    path = run.folder / LOG
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("secateur: ")]
    return (own or lines or [""])[-1].removeprefix("secateur: ")
