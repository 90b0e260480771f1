"""A few stages made through the store, or without it, by a process that is to be killed.

    python writers.py store|naive FOLDER

Says `go` when it begins, notes in FOLDER/log what it begins to make, and ends with a digest.
"""

import hashlib
import sys
import time
from pathlib import Path

from pipeline.store import Store, publish

STAGES = 4
FILES = {"config.json": 200, "onnx/model.onnx": 90_000, "onnx/model.onnx_data": 160_000}


def content(stage, name, before):
    """Return what a file of a stage holds: bytes that follow from the stage before."""
    seed = hashlib.sha256(f"{stage} {name} {before}".encode()).digest()
    return (seed * (FILES[name] // len(seed) + 1))[: FILES[name]]


def fill(folder, stage, before):
    """Write a stage's files, piece by piece."""
    for name in FILES:
        path, data = folder / name, content(stage, name, before)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for at in range(0, len(data), 40_000):
                file.write(data[at : at + 40_000])
                file.flush()
                time.sleep(0.001)


def digest(folder):
    """Return the hash of a stage's files."""
    found = hashlib.sha256()
    for name in FILES:
        found.update((folder / name).read_bytes())
    return found.hexdigest()


def expected():
    """Return the digest of every stage, as nobody disturbed it."""
    digests, before = [], ""
    for stage in range(STAGES):
        found = hashlib.sha256()
        for name in FILES:
            found.update(content(stage, name, before))
        before = found.hexdigest()
        digests.append(before)
    return digests


def note(folder, text):
    """Add a line to the log."""
    with (folder / "log").open("a") as log:
        log.write(f"{text}\n")


def with_store(folder):
    """Make the stages, and publish the last one, as a run does."""
    store, before = Store(folder / "stages"), ""
    for stage in range(STAGES):

        def make(unfinished, stage=stage, before=before):
            note(folder, f"stage{stage}")
            fill(unfinished, stage, before)
            return {}

        entry = store.get(f"stage{stage}", {"before": before}, make)
        before = digest(entry.folder)
    publish(lambda target: fill(target, STAGES - 1, expected()[-2]), folder / "artifact", {})
    store.finish()
    return before


def naively(folder):
    """Make the stages as is often done: in their place, and what is there counts as done."""
    before = ""
    for stage in range(STAGES):
        path = folder / "stages" / f"stage{stage}"
        if not path.exists():
            note(folder, f"stage{stage}")
            fill(path, stage, before)
        before = digest(path)
    return before


if __name__ == "__main__":
    print("go", flush=True)
    print({"store": with_store, "naive": naively}[sys.argv[1]](Path(sys.argv[2])), flush=True)
