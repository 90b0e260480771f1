"""A store whose writers are killed, crowded, out of space or beside broken disks.

The naive writer shows that the test has teeth: what is harmless to the store corrupts its folders.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import forked_runs
import pytest
import writers
from conftest import secateur, write_recipe
from released import released

from pipeline.manifest import MANIFEST, seal
from pipeline.store import Store, publish, verify
from pipeline.writing import write_text

EXPECTED = writers.expected()


def start(kind, folder):
    """Return a process that has begun to make the stages."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, writers.__file__, kind, folder]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if kind == "naive" else None,  # it trips over what it left
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert process.stdout.readline() == "go\n"
    return process


def whole(kind, folder):
    """Return the stages that count as done, and how many of them are not what they should be."""
    found = [path for path in (folder / "stages").glob("stage*") if path.is_dir()]
    if kind == "store":
        assert all(verify(path) for path in found)
    bad = 0
    for path in found:
        try:
            bad += writers.digest(path) != EXPECTED[int(path.name[5])]
        except FileNotFoundError:
            bad += 1
    return {path.name[:6] for path in found}, bad


def shoot(kind, folder, kills, seed=0):
    """Kill writers at random times until `kills` hit one at work, and return what was seen.

    A folder whose stages were finished is compared, and gives way to a fresh one.
    """
    generator, seen = random.Random(seed), Counter()
    undisturbed, begun = start(kind, folder / "undisturbed"), time.monotonic()
    undisturbed.communicate()
    lasts = time.monotonic() - begun
    here, done = folder / "0", set()
    while seen["kills"] < kills:
        process = start(kind, here)
        try:
            text, _ = process.communicate(timeout=generator.uniform(0, 0.9 * lasts))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            text, _ = process.communicate()
        seen["kills"] += process.returncode == -signal.SIGKILL
        lines = (here / "log").read_text().split() if (here / "log").exists() else []
        seen["made again"] += len(done & set(lines[seen["lines"] :]))
        done, bad = whole(kind, here)
        seen["corrupt"] += bad > 0
        seen["lines"] = len(lines)
        if kind == "store" and (here / "artifact").exists():
            seen["corrupt artifact"] += verify(here / "artifact") is None
        if process.returncode != -signal.SIGKILL:
            seen["ended"] += 1
            seen["wrong"] += text.strip() != EXPECTED[-1]
            seen["lines"], done, here = 0, set(), folder / str(seen["ended"])
    process = start(kind, here)
    seen["wrong"] += process.communicate()[0].strip() != EXPECTED[-1]
    return seen


@pytest.mark.parametrize("kills", [6, pytest.param(500, marks=pytest.mark.slow)])
def test_kills_leave_nothing_corrupt_and_lose_nothing_that_was_finished(tmp_path, kills):
    seen = shoot("store", tmp_path, kills)
    print(dict(seen))
    assert {name: seen[name] for name in ("corrupt", "corrupt artifact", "wrong")} == {
        "corrupt": 0, "corrupt artifact": 0, "wrong": 0,
    }  # fmt: skip
    assert seen["made again"] == 0
    assert seen["kills"] == kills


@pytest.mark.parametrize("kills", [3, pytest.param(500, marks=pytest.mark.slow)])
def test_the_same_kills_corrupt_what_a_naive_writer_makes(tmp_path, kills):
    """One of three kills is enough more often than not; twenty such rounds are sure to."""
    for at in range(20):
        (tmp_path / str(at)).mkdir()
        seen = shoot("naive", tmp_path / str(at), kills, seed=at)
        if seen["corrupt"]:
            break
    print(dict(seen))
    assert seen["corrupt"] > 0


CROWD = """
import sys, time
from pathlib import Path
from pipeline.store import Store

def make(folder):
    with open(sys.argv[2], "a") as log:
        log.write("made\\n")
    time.sleep(0.3)
    (folder / "weights").write_text("made once")
    return {}

store = Store(Path(sys.argv[1]))
print("here", flush=True)
sys.stdin.readline()
print(store.get("stage", {"a": 1}, make).digest)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_eight_processes_that_want_one_entry_make_it_once(tmp_path, killed):
    """If the one that makes it is killed, another one does."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", CROWD, tmp_path / "stages", log]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        crowd = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(8)]
        digests = run_crowd(crowd, log, killed)
    assert len(digests) == 1
    assert log.read_text().count("made") == 1 + killed
    assert [process.returncode for process in crowd] == [-9 * killed] + [0] * 7


def run_crowd(crowd, log, killed):
    """Let all ask for the entry, the first one ahead, and return the digests that they got."""
    assert [process.stdout.readline() for process in crowd] == ["here\n"] * 8
    first, *others = crowd
    print(file=first.stdin, flush=True)
    while not log.exists():
        time.sleep(0.01)
    for process in others:
        print(file=process.stdin, flush=True)
    if killed:
        first.kill()
    found = [process.communicate()[0] for process in crowd]
    return set(found[killed:])


def test_a_disk_that_is_full_at_any_of_fifty_sizes_leaves_nothing_published(tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: no file may grow past the size."""
    folder = tmp_path / "artifact"
    publish(lambda target: writers.fill(target, 0, ""), folder, {"release": 1})
    write_text(tmp_path / "report.json", "before")
    before = sorted(path for path in tmp_path.rglob("*"))
    largest = max(*writers.FILES.values(), 1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    failed = 0
    for at in range(50):
        size = largest * at // 50
        root = tmp_path / "stages"
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                write_text(tmp_path / "report.json", "x" * (size + 1))
            with pytest.raises(OSError, match="File too large"):
                publish(lambda target: writers.fill(target, 1, ""), folder, {"release": 2})
            with pytest.raises(OSError, match="File too large"):
                Store(root).get("stage", {}, lambda target: writers.fill(target, 0, "") or {})
            failed += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert list((root / ".store" / "unfinished").iterdir()) == []
        assert [path for path in root.iterdir() if path.name != ".store"] == []
        shutil.rmtree(root)
        assert verify(folder).about == {"release": 1}
        assert (tmp_path / "report.json").read_text() == "before"
        assert sorted(path for path in tmp_path.rglob("*")) == before
    assert failed == 50


def flip(path, generator):
    """Change one bit of a file, and return what it was."""
    content = path.read_bytes()
    at, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
    path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
    return content


@pytest.mark.parametrize("flips", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_flipped_bits_are_all_noticed(tmp_path, flips):
    """So many in a store, where the entry is made again, and so many in what is released."""
    generator, calls = random.Random(0), []

    def make(target):
        calls.append(target)
        writers.fill(target, 0, "")
        return {"loss": 0.25}

    store = Store(tmp_path / "stages")
    entry = store.get("stage", {}, make)
    files = [path for path in sorted(entry.folder.rglob("*")) if path.is_file()]
    for at in range(flips):
        flip(generator.choice(files), generator)
        assert store.get("stage", {}, make) == entry
        assert len(calls) == at + 2
    folder = tmp_path / "artifact"
    released(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for _ in range(flips):
        path = generator.choice(files)
        content = flip(path, generator)
        done = secateur("verify", folder)
        assert done.returncode == 2, done.stderr
        assert f"{path}: found" in done.stderr or f"{folder / MANIFEST}: cannot" in done.stderr
        path.write_bytes(content)
    assert secateur("verify", folder).returncode == 0


def test_a_number_written_otherwise_is_another_manifest(tmp_path):
    """A flipped bit in the last of 17 digits, or in the `e` of 1e-05, leaves the same number."""
    seal(tmp_path, {"loss": 0.1})
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text.replace("0.1", "0.10"))
    assert verify(tmp_path) is None


def test_links_in_the_way_are_not_followed(tmp_path):
    """What lies where a run writes is replaced, not written through."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("mine")
    store = Store(tmp_path / "stages")
    entry = store.get("stage", {}, lambda target: writers.fill(target, 0, "") or {})
    for link in (entry.folder, tmp_path / "out" / "artifact"):
        shutil.rmtree(link, ignore_errors=True)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(victim)
    for name in (".artifact.unfinished", ".artifact.before", ".report.json.unfinished"):
        (tmp_path / "out" / name).symlink_to(victim)
    again = store.get("stage", {}, lambda target: writers.fill(target, 0, "") or {})
    assert (again, again.folder.is_symlink()) == (entry, False)
    publish(lambda target: writers.fill(target, 0, ""), tmp_path / "out" / "artifact", {})
    write_text(tmp_path / "out" / "report.json", "{}")
    assert verify(tmp_path / "out" / "artifact") is not None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["artifact", "report.json"]
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"precious": "mine"}


def entries(folder):
    """Return the entries of a run, by name, with the time when they were made; all are whole."""
    found = [path for path in (folder / "stages").glob("*-*") if path.is_dir()]
    assert all(verify(path) for path in found)
    return {path.name: (path / MANIFEST).stat().st_mtime_ns for path in found}


def results(folder):
    """Return the digest of every entry that does not hold times, and that of the artifact."""
    names = [name for name in entries(folder) if not name.startswith(("measured", "timed"))]
    found = {name: verify(folder / "stages" / name).digest for name in names}
    return found | {"artifact": (folder / "artifact" / "onnx" / "model.onnx").read_bytes()}


class Runs:
    """Begins `secateur run` again and again; see forked_runs.py."""

    def __init__(self, recipe):
        self._log = recipe.with_name("log")
        settings = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, forked_runs.__file__, recipe],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | settings | {"TMPDIR": str(recipe.parent)},
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.communicate()

    def run(self, folder, seconds=600.0):
        """Return whether it ended, within its budget, before it was killed."""
        print(folder, seconds, file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        assert status in {0, -signal.SIGKILL}, self._log.read_text()
        return status == 0


@pytest.mark.slow
def test_kills_of_a_whole_run_and_then_flipped_bits(tmp_path):
    """Five hundred across a small run; then a hundred bits of its stages, and of its artifact."""
    generator, seen = random.Random(0), Counter()
    folder, made = tmp_path / "0", {}
    with Runs(write_recipe(tmp_path)) as runs:
        runs.run(tmp_path / "warm-up")
        begun = time.monotonic()
        runs.run(tmp_path / "undisturbed")
        lasts, expected = time.monotonic() - begun, results(tmp_path / "undisturbed")
        while seen["kills"] < 500:
            # Most come early, and some late: a stage that takes half of the time ends, too.
            ended = runs.run(folder, lasts * 500 ** -generator.random())
            seen["ended" if ended else "kills"] += 1
            now = entries(folder) if folder.exists() else {}
            assert made.items() <= now.items()  # nothing that was finished is made again
            assert not (folder / "artifact").exists() or verify(folder / "artifact")
            seen["met", len(now)] += not ended
            made = now
            if ended:
                assert results(folder) == expected
                folder, made = tmp_path / str(seen["ended"]), {}
        assert runs.run(folder)
    assert results(folder) == expected
    print(dict(seen), {"seconds undisturbed": lasts})
    assert len([key for key in seen if key[0] == "met"]) > 5  # stages finished before a kill
    for place in ("stages", "artifact"):
        root = folder / place
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        files = [path for path in files if ".store" not in path.parts and path.stat().st_size]
        for _ in range(100):
            path = generator.choice(files)
            content = flip(path, generator)
            if place == "artifact":
                assert secateur("verify", root).returncode == 2
            else:
                assert verify(root / path.relative_to(root).parts[0]) is None
            path.write_bytes(content)
    assert results(folder) == expected
