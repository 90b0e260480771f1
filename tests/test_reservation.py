"""No two runs have a core, or a device, at the same time."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.machine import Unavailable
from pipeline import reservation
from pipeline.reservation import physical_cores, reserved, visible_devices


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Keep out of the way of other tests' reservations, which are of the same machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(reservation, "POLL_SECONDS", 0.01)


def topology(folder, *siblings):
    for cpu, text in enumerate(siblings):
        path = folder / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(f"{text}\n")
    return folder


def test_threads_of_one_core_are_one_core(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    apart = topology(tmp_path / "a", "0,2", "1,3", "0,2", "1,3")
    assert physical_cores(apart) == {"core-0": [0, 2], "core-1": [1, 3]}
    beside = topology(tmp_path / "b", "0-1", "0-1", "2-3", "2-3")
    assert physical_cores(beside) == {"core-0": [0, 1], "core-2": [2, 3]}
    assert len(physical_cores(tmp_path / "unknown")) == 4


OTHER = """
import json, os, sys
from pipeline.reservation import reserved
with reserved(int(sys.argv[1]), "cpu", dedicated=False, waits=lambda: print("waits", flush=True)):
    print(json.dumps(sorted(os.sched_getaffinity(0))), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other():
    """Give a function that starts another process that wants cores, and tells which it has."""
    started = []

    def start(threads=1):
        command = [sys.executable, "-c", OTHER, str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        root = Path(__file__).parents[1]
        started.append(subprocess.Popen(command, text=True, cwd=root, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_runs_have_cores_of_their_own_or_wait(other):
    count = len(physical_cores())
    if count < 2:
        pytest.skip("one core cannot be shared out")
    most = set(json.loads(other(count - 1).stdout.readline()))
    told = sorted(other().stdout.readline() for _ in range(2))
    assert told[1] == "waits\n"
    last = set(json.loads(told[0]))
    assert last
    assert not last & most
    assert last | most == os.sched_getaffinity(0)


def test_what_is_dedicated_has_the_machine_for_itself(other):
    waiting = other()
    waiting.stdout.readline()
    told = []
    everything = reserved(1, "cpu", dedicated=True, waits=lambda: told.append(1) or interrupt())
    with pytest.raises(KeyboardInterrupt), everything:
        pytest.fail("another run has a core")
    assert told == [1]


def interrupt():
    raise KeyboardInterrupt


def test_a_kill_frees_what_was_held(other):
    holder = other(len(physical_cores()))
    json.loads(holder.stdout.readline())
    waiting = other()
    assert waiting.stdout.readline() == "waits\n"
    holder.kill()
    assert len(json.loads(waiting.stdout.readline())) >= 1


def test_what_was_before_is_again_afterwards(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, environment = os.sched_getaffinity(0), dict(os.environ)
    first, *_ = physical_cores().values()
    with reserved(1, "cpu", dedicated=False, waits=pytest.fail):
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert os.sched_getaffinity(0) == set(first)
    assert os.sched_getaffinity(0) == before
    assert dict(os.environ) == environment


def smi(folder, text, monkeypatch):
    """Put a driver's command with this answer before all others."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_device_is_known_by_what_it_is_and_seen_by_one(tmp_path, monkeypatch):
    smi(tmp_path, "echo '0, GPU-aa'; echo '1, GPU-bb'", monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == {"gpu-GPU-aa": "GPU-aa", "gpu-GPU-bb": "GPU-bb"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,MIG-c")
    assert visible_devices() == {"gpu-GPU-bb": "1", "gpu-MIG-c": "MIG-c"}
    with reserved(1, "cuda", dedicated=False, waits=pytest.fail):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,MIG-c"


def test_without_a_device_there_is_nothing_to_reserve(tmp_path, monkeypatch):
    smi(tmp_path, "exit 9", monkeypatch)
    with pytest.raises(Unavailable, match="found no answer from nvidia-smi"):
        visible_devices()
    smi(tmp_path, "true", monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(Unavailable, match="found no GPU that is visible"):
        visible_devices()
