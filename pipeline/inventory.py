"""What a run's store holds, and what of it can go: entries not in use, and what was left behind.

In use is what the last finished run asked for, and what those after it did, which were killed or go
on: with these the next run has the least to do. The runs of a sweep share a store, and what any of
them asked for is in use. Nothing is removed while a run is there.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from benchmarks.machine import Unavailable
from pipeline.manifest import MANIFEST
from pipeline.reading import RecipeError
from pipeline.store import HIDDEN, IN_USE, KEPT, SINCE, USED, remove, verify

STAGES: Final = "stages"
"""The store's folder in that of a run."""

State = Literal["in use", "not used", "damaged", "set aside", "unfinished", "to go on from"]


@dataclass(frozen=True)
class Item:
    """An entry, or what is left of one; `needed` by the next run, as far as is known."""

    path: Path
    size_bytes: int
    age_seconds: float
    state: State
    needed: bool


def items(run: Path) -> list[Item]:
    """Return what the store of a run's folder holds, by state and age; entries are verified.

    Raises:
        RecipeError: there is no store.
    """
    root = _root(run)
    used = _used(root)
    found = [_entry(path, used) for path in root.iterdir() if path.name != HIDDEN]
    bad = (root / HIDDEN / "bad").iterdir()
    found.extend(_item(path, "set aside", needed=False) for path in bad)
    for path in (root / HIDDEN / "unfinished").iterdir():
        if path.suffix == KEPT:  # a training's last state
            needed = path.stem in used
            found.append(_item(path, "to go on from" if needed else "not used", needed=needed))
        else:
            found.append(_item(path, "unfinished", needed=False))
    return sorted(found, key=lambda item: (not item.needed, item.state, item.age_seconds))


def prune(run: Path) -> list[Item]:
    """Remove what the next run does not need, and return it.

    Raises:
        RecipeError: there is no store, or nothing is known of what is needed.
        Unavailable: a run uses the store.
    """
    root = _root(run)
    with _alone(root):
        if not _used(root):
            raise RecipeError(
                f"{root}: found no note of what the last run used, expected one; run the recipe"
                " again (what is there is not made anew), and prune then"
            )
        gone = [item for item in items(run) if not item.needed]
        for item in gone:
            remove(item.path)
        for lock in (root / HIDDEN / "locks").iterdir():  # nobody holds one
            lock.unlink()
    return gone


def _root(run: Path) -> Path:
    root = run / STAGES
    if not (root / HIDDEN / "locks").is_dir():
        raise RecipeError(f"{root}: found no store, expected the folder of a run")
    return root


def _used(root: Path) -> set[str]:
    """Return the names of the entries that were asked for, by any of the runs that share them."""
    notes = [note for name in (USED, SINCE) for note in (root / HIDDEN).glob(f"{name}*")]
    texts = [note.read_text(encoding="utf-8") for note in notes]
    return {name for text in texts for name in text.splitlines()}


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the store for oneself."""
    held = os.open(root / HIDDEN / IN_USE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Unavailable(f"{root}: found a run that uses it; prune when it has ended") from None
    finally:
        os.close(held)


def _entry(path: Path, used: set[str]) -> Item:
    """Return an entry; a damaged one that is used is left for the next run to set aside."""
    needed = path.name in used
    if verify(path) is None:
        return _item(path, "damaged", needed=needed)
    return _item(path, "in use" if needed else "not used", needed=needed)


def _item(path: Path, state: State, *, needed: bool) -> Item:
    files = [file for file in (path, *path.rglob("*")) if not file.is_symlink() and file.is_file()]
    size = sum(file.stat().st_size for file in files)
    sealed = path / MANIFEST
    made = (sealed if sealed.is_file() else path).lstat().st_mtime
    return Item(path, size, time.time() - made, state, needed)
