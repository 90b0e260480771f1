"""Runs of a sweep are done to the end, whatever is killed, and come out the same wherever."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import secateur, write_recipe

from pipeline import executors, sweep
from pipeline.executors import Ended
from pipeline.store import verify
from pipeline.sweep import Member

ROOT = Path(__file__).parents[1]
with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed")


def runs(folder, count=3):
    target = {"threads": 1, "device": "cpu"}
    return [Member(at, folder / f"{at:03}", {}, {"target": target}) for at in range(count)]


@pytest.fixture
def doing(monkeypatch):
    """Give a function that says what the process of a run does, in place of a run."""

    def set_(script):
        def command(run):
            return [sys.executable, "-c", script, str(run.index), str(run.folder)]

        monkeypatch.setattr(executors, "_command", command)

    return set_


KILLED_ONCE = """
import os, pathlib, signal, sys
mark = pathlib.Path(sys.argv[2], "mark")
if sys.argv[1] == "1" and not mark.exists():
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
print("secateur: done", sys.argv[1])
"""


def test_a_killed_process_is_started_again(tmp_path, doing):
    doing(KILLED_ONCE)
    found = sorted(executors.local(runs(tmp_path), 2), key=lambda ended: ended.index)
    assert found == [Ended(at, 0, f"done {at}") for at in range(3)]
    assert (tmp_path / "001" / "mark").exists()


COUNTED = """
import os, pathlib, signal, sys
with pathlib.Path(sys.argv[2], "starts").open("a") as file:
    file.write("x")
if sys.argv[1] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "1":
    print("secateur: no such model")
    print("  and more of it")
    sys.exit(2)
"""


def test_what_fails_again_and_again_is_told_and_the_others_go_on(tmp_path, doing):
    doing(COUNTED)
    found = {ended.index: ended for ended in executors.local(runs(tmp_path), 1)}
    assert (found[0].status, found[2].status) == (-signal.SIGKILL, 0)
    assert found[1] == Ended(1, 2, "no such model")
    starts = [len((run.folder / "starts").read_text()) for run in runs(tmp_path)]
    assert starts == [1 + executors.RETRIES, 1, 1]  # a wrong recipe does not get better


def test_no_more_than_the_slots_run_at_once(tmp_path, doing):
    doing("import time; print(time.monotonic()); time.sleep(0.3); print(time.monotonic())")
    assert len(list(executors.local(runs(tmp_path, 4), 2))) == 4
    spans = [
        tuple(map(float, (r.folder / "run.log").read_text().split())) for r in runs(tmp_path, 4)
    ]
    for start, _ in spans:
        assert sum(begun <= start < ended for begun, ended in spans) <= 2


SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def pid(run):
    """Return the process of a run, once it is there."""
    log = run.folder / "run.log"
    while not (log.is_file() and log.read_text().endswith("\n")):
        time.sleep(0.01)
    return int(log.read_text())


def gone(process_id, seconds=10):
    """Return whether a process ends in time; one that nobody waited for is a zombie."""
    status = Path("/proc", str(process_id), "status")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if "State:\tZ" in status.read_text():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_an_interrupt_leaves_nothing_running(tmp_path, doing):
    doing(SLEEPER)
    ending = executors.local(runs(tmp_path), 2)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(ending)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert all(gone(pid(run)) for run in runs(tmp_path, 2))
    assert not (tmp_path / "002").exists()


DRIVER = """
import sys
from pathlib import Path
from pipeline import executors
from pipeline.sweep import Member

executors._command = lambda run: [sys.executable, "-c", sys.argv[2]]
folder = Path(sys.argv[1])
list(executors.local([Member(at, folder / f"{at:03}", {}, {}) for at in range(2)], 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel has no leash")
def test_a_killed_driver_leaves_nothing_running(tmp_path):
    command = [sys.executable, "-c", DRIVER, tmp_path, SLEEPER]
    with subprocess.Popen(command, cwd=ROOT) as driver:
        found = [pid(run) for run in runs(tmp_path, 2)]
        driver.kill()
    assert all(gone(each) for each in found)


def test_a_leash_that_was_cut_before_it_was_tied_starts_nothing(tmp_path):
    command = [sys.executable, "-m", "pipeline.leash", "1", "touch", tmp_path / "started"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == 128 + signal.SIGKILL
    assert not (tmp_path / "started").exists()


STEPS = [
    {"step": "finetune", "epochs": 2, "learning_rate": 2e-3},
    {"step": "prune", "heads": {"choose": [0.25, 0.5]}},
    {"step": "quantize"},
    {"step": "export"},
]
ARTIFACTS = {"original", "finetune", "prune", "quantize", "onnx"}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Give a function that plans a sweep of two runs anew, of one recipe."""
    folder = tmp_path_factory.mktemp("swept")
    budget = {"max_drop": 0.9, "baseline_floor": -1.0, "max_size": 2.0}
    path = write_recipe(folder, steps=STEPS, baseline="original", budget=budget)

    def plan(name):
        done = secateur("sweep", "plan", path, "--output", folder / name)
        assert done.returncode == 0, done.stderr
        return folder / name

    return plan


def run_all(folder, *options):  # a socket of Ray's has no room for a long TMPDIR
    """Do all runs as a user does; other tests' runs have no cores there."""
    environment = {**os.environ, "TMPDIR": str(folder.parent), "RAY_TMPDIR": "/tmp"}
    return secateur("sweep", "run", folder, "--executor", *options, cwd=ROOT, env=environment)


def digests(folder):
    """Return the hash of every artifact that a sweep made, and of the graphs that it published."""
    entries = {path.name: path for path in (folder / "stages").iterdir()}
    made = {n: verify(p).digest for n, p in entries.items() if n.rpartition("-")[0] in ARTIFACTS}
    graphs = {p.parts[-4]: p.read_bytes() for p in folder.glob("*/artifact/onnx/model.onnx")}
    assert len(graphs) == 2
    return made, graphs


@pytest.fixture(scope="module")
def swept(planned):
    """Give a sweep that was done on this machine."""
    folder = planned("local")
    done = run_all(folder, "local", "--slots", 2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_what_runs_share_is_made_once(swept):
    assert secateur("sweep", "collect", swept).returncode == 0
    count = {name: len(list((swept / "stages").glob(f"{name}-*"))) for name in ARTIFACTS}
    assert count == {"original": 1, "finetune": 1, "prune": 2, "quantize": 2, "onnx": 4}
    listed = secateur("store", swept)
    assert "0.0 MB that --prune frees" in listed.stdout


@pytest.mark.slow
@with_ray
def test_artifacts_are_the_same_from_ray(swept, planned):
    folder = planned("ray")
    done = run_all(folder, "ray")
    assert done.returncode == 0, done.stderr
    assert digests(folder) == digests(swept)


def start(folder, *options):
    command = [sys.executable, "-m", "pipeline", "sweep", "run", folder, "--executor", *options]
    environment = {**os.environ, "TMPDIR": str(folder.parent), "RAY_TMPDIR": "/tmp"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **quiet)


def member_pids(folder):
    """Return the processes of a sweep's single runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--index" in words and str(folder).encode() in words and b"pipeline.leash" not in words:
            found.append(int(path.parts[2]))
    return found


def wait_for(folder, pattern, process):
    while not list(folder.glob(pattern)):
        assert process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=with_ray)])
def test_killed_runs_and_a_killed_driver_change_nothing(swept, planned, executor):
    folder = planned(f"killed-{executor}")
    driver = start(folder, executor)
    wait_for(folder, "stages/finetune-*", driver)
    for each in member_pids(folder):
        os.kill(each, signal.SIGKILL)
    wait_for(folder, "*/report.json", driver)
    driver.kill()
    driver.wait()
    assert all(gone(each, 60) for each in member_pids(folder))
    there = [run for run in sweep.members(folder) if sweep.standing(run).state == "done"]
    before = {run.index: (run.folder / "report.json").stat().st_mtime_ns for run in there}
    assert before
    done = run_all(folder, executor)
    assert done.returncode == 0, done.stderr
    assert f"{len(there)} of 2 runs are done" in done.stdout
    assert {run.index: (run.folder / "report.json").stat().st_mtime_ns for run in there} == before
    assert digests(folder) == digests(swept)


INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from pipeline.cli import main
main(sys.argv[1:])
"""


def test_an_interrupt_of_the_command_is_one_line(tmp_path):
    write_plan(tmp_path)
    folder = tmp_path / "sweep"
    command = [sys.executable, "-c", INTERRUPTIBLE, "sweep", "run", folder, "--executor", "local"]
    driver = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(folder, "000/run.log", driver)
    driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate()
    assert driver.returncode == 130
    assert stderr.splitlines()[-1].startswith("secateur: interrupted; run the same command again")
    assert member_pids(folder) == []


@with_ray
def test_a_cluster_that_is_not_there_is_told(tmp_path):
    write_plan(tmp_path)
    done = run_all(tmp_path / "sweep", "ray", "--address", "127.0.0.1:1")
    assert done.returncode == 4
    assert "--address: found no Ray cluster at 127.0.0.1:1" in done.stderr


@with_ray
def test_a_cluster_without_such_a_machine_is_told(tmp_path):
    write_plan(tmp_path, threads=1000)
    done = run_all(tmp_path / "sweep", "ray")
    assert done.returncode == 4
    assert "found no machine with 1000 CPUs in the cluster" in done.stderr


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    write_plan(tmp_path)
    done = secateur("sweep", "run", tmp_path / "sweep", "--executor", "ray")
    assert done.returncode == 4
    assert "--executor ray: not installed; install the extra `ray`" in done.stderr


def write_plan(folder, threads=1):
    """Write a plan of a run that is not done."""
    recipe = {"target": {"threads": threads, "device": "cpu", "dedicated": False}}
    sweep.write(folder / "sweep", [{"steps.0": "none"}], [recipe])
