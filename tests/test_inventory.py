"""What a store holds is told, and what no run needs any more is removed; nothing else is."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import secateur

from benchmarks.machine import Unavailable
from pipeline.inventory import items, prune
from pipeline.reading import RecipeError
from pipeline.store import Store, kept, verify


def write(text):
    def make(folder):
        (folder / "weights").write_bytes(text)
        return {}

    return make


def run(folder, *names, finished=True):
    """Do what a run does: ask a store for entries, one after the other."""
    store = Store(folder / "stages")
    entries = [store.get(name, {}, write(b"x" * 1000)) for name in names]
    if finished:
        store.finish()
    return [entry.folder for entry in entries]


def states(found):
    return {item.path.name.partition("-")[0]: item.state for item in found}


def test_a_run_that_ended_leaves_what_it_asked_for_in_use(tmp_path):
    run(tmp_path, "a", "b")
    run(tmp_path, "b", "c")
    assert states(items(tmp_path)) == {"a": "not used", "b": "in use", "c": "in use"}


def test_a_run_that_was_killed_takes_nothing_out_of_use(tmp_path):
    run(tmp_path, "a", "b")
    run(tmp_path, "c", finished=False)
    assert states(items(tmp_path)) == {"a": "in use", "b": "in use", "c": "in use"}
    run(tmp_path, "c")
    assert states(items(tmp_path)) == {"a": "not used", "b": "not used", "c": "in use"}


def test_what_one_of_several_runs_does_not_ask_for_may_be_anothers(tmp_path):
    """The runs of a sweep share a store; one that ends says nothing of the others."""
    for user, names in (("000", "ab"), ("001", "bc"), ("002", "d")):
        store = Store(tmp_path / "stages", user=user)
        for name in names:
            store.get(name, {}, write(b"x"))
        if user != "002":  # which was killed
            store.finish()
    again = Store(tmp_path / "stages", user="000")
    again.get("b", {}, write(b"x"))
    again.finish()
    del store, again
    assert states(items(tmp_path)) == {
        "a": "not used", "b": "in use", "c": "in use", "d": "in use",
    }  # fmt: skip
    assert [item.path.name[0] for item in prune(tmp_path)] == ["a"]


def littered(folder):
    """Return a store with one item of every state, by what it is."""
    unused, damaged = run(folder, "unused", "damaged")
    used, broken = run(folder, "used", "broken")
    for path in (damaged, broken):
        (path / "weights").write_text("y")
    hidden = folder / "stages" / ".store"
    shutil.copytree(unused, hidden / "bad" / "bad-1")
    (hidden / "unfinished" / "half-1").mkdir()
    (hidden / "unfinished" / "half-1" / "part").write_bytes(b"z" * 50)
    training = kept(hidden / "unfinished" / used.name)
    for path in (training, kept(hidden / "unfinished" / unused.name)):
        path.write_bytes(b"state")
    return used, broken, training


def test_every_item_is_told_with_its_size_and_age(tmp_path):
    used, *_ = littered(tmp_path)
    os.utime(used / "manifest.json", (time.time() - 7200,) * 2)
    found = items(tmp_path)
    assert sorted(item.state for item in found) == [
        "damaged", "damaged", "in use", "not used", "not used", "set aside", "to go on from",
        "unfinished",
    ]  # fmt: skip
    (item,) = [item for item in found if item.path == used]
    assert item.size_bytes == 1000 + (used / "manifest.json").stat().st_size
    assert 7200 <= item.age_seconds < 7300
    (half,) = [item for item in found if item.state == "unfinished"]
    assert (half.size_bytes, half.needed) == (50, False)


def test_pruning_removes_what_is_not_needed_and_nothing_else(tmp_path):
    used, broken, training = littered(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    gone = prune(tmp_path)
    assert len(gone) == 5
    assert not any(item.path.exists() for item in gone)
    assert {item.path for item in items(tmp_path)} == {used, broken, training}
    assert verify(used) is not None
    assert (tmp_path / "report.json").exists()
    assert run(tmp_path, "used")[0] == used  # and it still works


def test_a_store_that_is_in_use_is_not_pruned(tmp_path):
    run(tmp_path, "a")
    run(tmp_path, "b")
    script = (
        "import sys, time; from pathlib import Path; from pipeline.store import Store;"
        "store = Store(Path(sys.argv[1])); print('here', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, tmp_path / "stages"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "here\n"
        with pytest.raises(Unavailable, match="found a run that uses it; prune when it has ended"):
            prune(tmp_path)
        done = secateur("store", tmp_path, "--prune")
        assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
        other.kill()
    assert [item.path.name[0] for item in prune(tmp_path)] == ["a"]


def test_what_a_killed_writer_left_is_swept_when_a_run_begins_but_not_what_is_being_made(tmp_path):
    Store(tmp_path)
    unfinished = tmp_path / ".store" / "unfinished"
    for name in ("dead-1", "alive-1"):
        (unfinished / name).mkdir()
        kept(unfinished / name).write_text("a training's")
    kept(unfinished / "dead-1").with_suffix(".kept.unfinished").write_text("half of it")
    with (tmp_path / ".store" / "locks" / "alive-1").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Store(tmp_path)
        left = ["alive-1", "alive-1.kept", "dead-1.kept"]
        assert sorted(path.name for path in unfinished.iterdir()) == left


def test_what_is_no_store_and_what_has_no_notes_is_told(tmp_path):
    with pytest.raises(RecipeError, match="stages: found no store, expected the folder of a run"):
        items(tmp_path)
    Store(tmp_path / "stages")
    with pytest.raises(RecipeError, match="found no note of what the last run used"):
        prune(tmp_path)


def test_the_command_lists_and_prunes(tmp_path, monkeypatch):
    littered(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    listed = secateur("store")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.splitlines()[0].startswith("runs/mine/stages: 0.0 MB in use, 0.0 MB that")
    assert re.search(r"^used-\w+ +0\.0 +0 s +in use *$", listed.stdout, re.MULTILINE)
    pruned = secateur("store", "runs/mine", "--prune")
    assert pruned.returncode == 0, pruned.stderr
    assert pruned.stdout.splitlines()[0] == "runs/mine/stages: 0.0 MB freed"
    assert "used-" not in pruned.stdout.replace("unused-", "")
    assert secateur("store", "nowhere").returncode == 2
