"""An entry is there as a whole and verified, or not there."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import manifest, store
from pipeline.manifest import MANIFEST
from pipeline.store import Store, publish, verify
from pipeline.writing import write_text


class Maker:
    """Writes two files and counts how often it was asked to."""

    def __init__(self, text: str = "weights") -> None:
        self.calls = 0
        self.text = text

    def __call__(self, folder: Path) -> dict[str, object]:
        self.calls += 1
        (folder / "deep").mkdir()
        (folder / "deep" / "model.bin").write_text(self.text)
        (folder / "config.json").write_text("{}")
        return {"calls": self.calls}


def test_made_once_and_then_reused(tmp_path):
    make = Maker()
    first = Store(tmp_path).get("stage", {"a": 1}, make)
    second = Store(tmp_path).get("stage", {"a": 1}, make)
    assert (make.calls, second) == (1, first)
    assert second.about == {"calls": 1}
    assert (second.folder / "deep" / "model.bin").read_text() == "weights"


def test_another_key_is_another_entry_of_equal_content(tmp_path):
    make = Maker()
    store = Store(tmp_path)
    first, second = store.get("stage", {"a": 1}, make), store.get("stage", {"a": 2}, make)
    assert make.calls == 2
    assert first.folder != second.folder
    assert first.digest == second.digest


def test_a_fresh_store_makes_it_again_once(tmp_path):
    Store(tmp_path).get("stage", {}, Maker("old"))
    make = Maker("new")
    store = Store(tmp_path, fresh=True)
    entry = store.get("stage", {}, make)
    assert (entry.folder / "deep" / "model.bin").read_text() == "new"
    assert store.get("stage", {}, make) == entry
    assert make.calls == 1
    assert list((tmp_path / ".store" / "bad").iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    ["flip", "truncate", "delete", "add", "link", "hard link", "pipe", "manifest", "about"],
)
def test_a_damaged_entry_is_set_aside_and_made_again(tmp_path, caplog, damage):
    make = Maker()
    store = Store(tmp_path)
    entry = store.get("stage", {}, make)
    file = entry.folder / "deep" / "model.bin"
    match damage:
        case "flip":
            file.write_text("weightz")
        case "truncate":
            file.write_text("weigh")
        case "delete":
            file.unlink()
        case "add":
            (entry.folder / "extra").write_text("")
        case "link":
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
        case "hard link":
            os.link(file, tmp_path / "elsewhere")
        case "pipe":
            os.mkfifo(entry.folder / "pipe")
        case "manifest":
            (entry.folder / MANIFEST).write_text("{")
        case "about":
            text = (entry.folder / MANIFEST).read_text()
            (entry.folder / MANIFEST).write_text(text.replace('"calls": 1', '"calls": 7'))
    assert verify(entry.folder) is None
    again = store.get("stage", {}, make)
    assert make.calls == 2
    assert (again.folder / "deep" / "model.bin").read_text() == "weights"
    assert again.digest == entry.digest
    (told,) = caplog.messages
    assert told.startswith(str(entry.folder))
    assert told.endswith("it is made again, and set aside")
    assert store.get("stage", {}, make) == again
    assert len(caplog.messages) == 1


def test_every_byte_of_an_entry_is_guarded(tmp_path):
    entry = Store(tmp_path).get("stage", {}, Maker())
    for path in [p for p in entry.folder.rglob("*") if p.is_file()]:
        content = path.read_bytes()
        for at in range(len(content)):
            changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
            path.write_bytes(changed)
            found = verify(entry.folder)
            # White space of the manifest is the one thing that may change.
            assert found is None or json.loads(changed) == json.loads(content)
        path.write_bytes(content)
    assert verify(entry.folder) == entry


@pytest.mark.parametrize(
    ("files", "about"),
    [({"config.json": 3}, {}), ({"config.json": {"bytes": 2}}, {}), ([1], {}), ({}, 3)],
)
def test_a_manifest_that_is_none_is_damage_even_with_a_good_sum(tmp_path, files, about):
    entry = Store(tmp_path).get("stage", {}, Maker())
    text = {"files": files, "about": about}
    text["sha256"] = manifest.fingerprint(text)
    (entry.folder / MANIFEST).write_text(json.dumps(text))
    assert verify(entry.folder) is None


def test_a_failure_leaves_nothing(tmp_path):
    def fail(folder: Path) -> dict[str, object]:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device", str(folder))

    with pytest.raises(OSError, match="No space left"):
        Store(tmp_path).get("stage", {}, fail)
    assert [p for p in tmp_path.rglob("*") if p.name in {"half", MANIFEST}] == []


SLOW_WRITER = """
import sys, time
from pathlib import Path
from pipeline.store import Store

def make(folder):
    for at in range(20):
        (folder / f"part{at}").write_text("x" * 1000)
        time.sleep(0.01)
    print("finished", flush=True)
    return {}

Store(Path(sys.argv[1])).get("stage", {}, make)
"""


@pytest.mark.parametrize("after", [0.0, 0.05, 0.1, 0.15])
def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_result(tmp_path, after):
    process = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(tmp_path)])
    unfinished = tmp_path / ".store" / "unfinished"
    while not (unfinished.is_dir() and any(unfinished.iterdir())):
        time.sleep(0.002)
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [verify(p) for p in tmp_path.iterdir() if p.name != ".store"] == []
    done = subprocess.run(
        [sys.executable, "-c", SLOW_WRITER, str(tmp_path)], check=True, capture_output=True
    )
    assert b"finished" in done.stdout
    (entry,) = [p for p in tmp_path.iterdir() if p.name != ".store"]
    assert verify(entry) is not None
    assert list(unfinished.iterdir()) == []


def test_threads_that_want_one_entry_make_it_once(tmp_path):
    make = Maker()

    def get(_: int) -> str:
        return Store(tmp_path).get("stage", {}, make).digest

    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(get, range(8)))
    assert (make.calls, len(digests)) == (1, 1)


def test_publishing_replaces_as_a_whole(tmp_path):
    folder = tmp_path / "artifact"
    publish(lambda f: (f / "old").write_text("1") and None, folder, {})
    publish(lambda f: (f / "new").write_text("2") and None, folder, {"verdict": "pass"})
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, "new"]
    entry = verify(folder)
    assert entry is not None
    assert entry.about == {"verdict": "pass"}
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_a_failed_publication_keeps_the_old_one(tmp_path):
    folder = tmp_path / "artifact"
    publish(lambda f: (f / "old").write_text("1") and None, folder, {})

    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        publish(fail, folder, {})
    assert verify(folder) is not None
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_what_was_published_is_back_after_a_kill_between_two_renames(tmp_path):
    folder = tmp_path / "artifact"
    publish(lambda f: (f / "old").write_text("1") and None, folder, {})
    folder.rename(tmp_path / ".artifact.before")  # as a kill leaves it

    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        publish(fail, folder, {})
    assert verify(folder) is not None
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_text_is_written_as_a_whole(tmp_path):
    write_text(tmp_path / "report.json", "{}")
    write_text(tmp_path / "report.json", "[]")
    assert (tmp_path / "report.json").read_text() == "[]"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_the_first_process_did_not_make_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(store.processes, "leads", lambda: False)
    with pytest.raises(store.NotMade, match="expected what the first process makes"):
        store.Store(tmp_path).get("stage", {}, lambda _: {})
