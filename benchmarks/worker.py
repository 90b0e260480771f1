"""A fresh process that holds one artifact, and the two ends of the line to it.

Every measurement is taken in such a process: it imports one runtime, opens one artifact, and obeys
one command at a time, while the parent blocks. Commands and replies are lines of JSON, arrays are
safetensors files. What opens the artifact is named `module:function`; the function takes a folder,
a device and a number of threads, and returns a predictor, a function from a mapping of arrays to a
mapping of arrays. The worker knows nothing else of models.

    python -m benchmarks.worker OPENER FOLDER DEVICE THREADS
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from benchmarks import nvidia
from benchmarks.machine import Unavailable
from benchmarks.memory import peak_rss_bytes

Arrays = Mapping[str, NDArray[Any]]
Predictor = Callable[[Arrays], Arrays]

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
REPLY_SECONDS: Final = 600.0
"""How long a command may take before the worker counts as hung."""
NOT_HERE: Final = frozenset({"MissingDependency", "NotHere", "Unavailable"})
"""Errors of openers that say what this machine lacks; by name, since not all are known here."""


class WorkerError(RuntimeError):
    """The process that holds an artifact ended, hung, or could not open it."""


class Worker:
    """The parent's end: starts the process, sends commands, waits for replies."""

    def __init__(self, opener: str, folder: Path, *, device: str, threads: int) -> None:
        """Open an artifact.

        Raises:
            Unavailable: this machine lacks what the opener needs; the message is the opener's.
            WorkerError: the process ended, or hung.
        """
        self._name = f"{folder} ({opener.partition(':')[0]}, {device})"
        # Closed in `close`: the process writes to it as long as it lives.
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # Libraries that count the cores themselves must see the same number of threads, and threads
        # that wait must not take a core from the artifact whose turn it is.
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        limits["OMP_WAIT_POLICY"] = "PASSIVE"
        self._process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [
                sys.executable,
                "-m",
                "benchmarks.worker",
                opener,
                str(folder.resolve()),
                device,
                str(threads),
            ],
            cwd=Path(__file__).parents[1],  # `-m` looks there first: for us, not for a namesake
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=os.environ | limits,
        )
        try:
            opened = self._reply()
        except BaseException:
            self.close()
            raise
        self.load_seconds: float = opened["load_seconds"]
        self.import_floor_bytes: int = opened["import_floor_bytes"]

    def predict(self, inputs: Arrays, *, reduction: str = "none") -> Arrays:
        """Return the outputs for one batch, reduced as `REDUCTIONS` says."""
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            source, target = (
                Path(folder, "inputs.safetensors"),
                Path(folder, "outputs.safetensors"),
            )
            save_file(dict(inputs), source)
            self._ask({"do": "predict", "from": str(source), "to": str(target), "as": reduction})
            return load_file(target)

    def hold(self, load: int, inputs: Arrays) -> None:
        """Give the worker the batch that `time(load)` will run."""
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            source = Path(folder, "inputs.safetensors")
            save_file(dict(inputs), source)
            self._ask({"do": "hold", "load": load, "from": str(source)})

    def time(self, load: int, calls: int) -> list[int]:
        """Return the latencies of `calls` calls on the held batch, in nanoseconds."""
        latencies: list[int] = self._ask({"do": "time", "load": load, "calls": calls})["ns"]
        return latencies

    def serve(self, load: int, arrivals_ns: Sequence[int]) -> list[int]:
        """Return how long after its arrival each query was answered, in nanoseconds.

        Args:
            load: of `hold`.
            arrivals_ns: when each query arrives, from the start on; those that come while another
                is answered wait for their turn, and the wait counts.
        """
        ask = {"do": "serve", "load": load, "arrivals": list(arrivals_ns)}
        latencies: list[int] = self._ask(ask)["ns"]
        return latencies

    def drive(self, load: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Return what LoadGen measures on the held batch; see loadgen.py."""
        return self._ask({"do": "drive", "load": load, "settings": settings})

    def peak_rss_bytes(self) -> int:
        """Return the largest resident set of the process so far."""
        peak: int = self._ask({"do": "memory"})["peak_rss_bytes"]
        return peak

    def device_bytes(self) -> int | None:
        """Return by how much the GPU's memory in use rose since before the artifact was opened.

        Runtimes keep what they once took, so this is a peak, with the driver's own part of it;
        right if nothing else uses the device meanwhile. None on the CPU, or if nobody tells.
        """
        used: int | None = self._ask({"do": "memory"})["device_bytes"]
        return used

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what was not read is not wanted
                continue

    def __enter__(self) -> Self:
        """Return the worker itself; it ends with the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], REPLY_SECONDS)
        if not ready:
            raise WorkerError(f"{self._name}: no reply within {REPLY_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        reply: dict[str, Any] = json.loads(line)
        if "unavailable" in reply:
            raise Unavailable(f"{self._name}: {reply['unavailable']}")
        return reply

    def _failure(self) -> WorkerError:
        try:
            status = self._process.wait(REPLY_SECONDS)
        except subprocess.TimeoutExpired:
            return WorkerError(f"{self._name}: it closed the line and did not end")
        self._stderr.seek(0)
        lines = [line for line in self._stderr.read().splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "without a message"
        if status < 0:
            killed = signal.Signals(-status).name
            hint = "; it may have run out of memory" if killed == "SIGKILL" else ""
            return WorkerError(f"{self._name}: the process was ended by {killed}{hint} ({last})")
        return WorkerError(f"{self._name}: the process ended with status {status}: {last}")


class InProcess:
    """A predictor of this process, used as a worker is where nothing is timed."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, inputs: Arrays, *, reduction: str = "none") -> Arrays:
        """Return the outputs for one batch, reduced as `REDUCTIONS` says."""
        return REDUCTIONS[reduction](inputs, self._predictor(inputs))


def next_token(inputs: Arrays, outputs: Arrays) -> Arrays:
    """Return the negative log-likelihood of each next token and the likeliest one `(B, T-1)`.

    Of an encoder-decoder they are those that its decoder reads. Done where the logits `(B, T, V)`
    are: they would be too many to hand over.
    """
    logits = np.asarray(outputs["logits"][:, :-1], np.float64)
    largest = logits.max(axis=-1, keepdims=True)
    norm = largest[..., 0] + np.log(np.exp(logits - largest).sum(axis=-1))
    tokens = inputs.get("decoder_input_ids", inputs["input_ids"])
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return {"nll": norm - chosen, "next_token": np.argmax(logits, axis=-1)}


REDUCTIONS: Final[Mapping[str, Callable[[Arrays, Arrays], Arrays]]] = {
    "none": lambda _, outputs: outputs,
    "next_token": next_token,
}


def main(opener: str, folder: str, device: str, threads: str) -> None:
    """Open the artifact, then obey commands until the line closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    if sys.platform == "linux":  # a parent that is killed leaves no worker behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Whatever a library prints must not reach the line.
    line = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    module, _, name = opener.partition(":")
    open_predictor = getattr(import_module(module), name)
    floor = peak_rss_bytes()
    used = nvidia.used_bytes()[0] if device == "cuda" else None
    start = time.perf_counter_ns()
    try:
        predictor: Predictor = open_predictor(Path(folder), device=device, threads=int(threads))
    except Exception as error:
        if type(error).__name__ not in NOT_HERE:
            raise
        print(json.dumps({"unavailable": str(error)}), file=line)
        return
    load_seconds = (time.perf_counter_ns() - start) / 1e9
    print(json.dumps({"load_seconds": load_seconds, "import_floor_bytes": floor}), file=line)
    _obey(predictor, used, line)


def _obey(predictor: Predictor, used: int | None, line: TextIO) -> None:
    """Obey commands until the line closes; `used` bytes of the GPU were taken before it opened."""
    held: dict[int, Arrays] = {}
    for text in sys.stdin:
        command = json.loads(text)
        reply: dict[str, Any] = {}
        match command["do"]:
            case "predict":
                inputs = load_file(command["from"])
                outputs = REDUCTIONS[command["as"]](inputs, predictor(inputs))
                save_file({k: np.ascontiguousarray(v) for k, v in outputs.items()}, command["to"])
            case "hold":
                held[command["load"]] = load_file(command["from"])
            case "time":
                reply = {"ns": _time(predictor, held[command["load"]], command["calls"])}
            case "serve":
                reply = {"ns": _serve(predictor, held[command["load"]], command["arrivals"])}
            case "drive":
                drive = import_module("benchmarks.loadgen").drive
                reply = drive(predictor, held[command["load"]], command["settings"])
            case "memory":
                reply = {"peak_rss_bytes": peak_rss_bytes(), "device_bytes": None}
                if used is not None and (now := nvidia.used_bytes()[0]) is not None:
                    reply["device_bytes"] = max(now - used, 0)
        print(json.dumps(reply), file=line)


def _time(predictor: Predictor, inputs: Arrays, calls: int) -> list[int]:
    latencies = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        predictor(inputs)
        latencies.append(time.perf_counter_ns() - start)
    return latencies


def _serve(predictor: Predictor, inputs: Arrays, arrivals: Sequence[int]) -> list[int]:
    latencies = []
    start = time.perf_counter_ns()
    for arrival in arrivals:
        early = start + arrival - time.perf_counter_ns()
        if early > 0:
            time.sleep(early / 1e9)
        predictor(inputs)
        latencies.append(time.perf_counter_ns() - start - arrival)
    return latencies


if __name__ == "__main__":
    main(*sys.argv[1:])
