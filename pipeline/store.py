"""A stage's folder: there as a whole, verified, or not there at all.

An entry is named by the hash of everything that it depends on. It is made in a temporary folder,
synced to the disk, given a manifest with the sha256 of every file, and renamed into its place, so
that whatever a kill leaves behind is never taken for a result. A lock per entry lets several
processes share a store; the kernel drops it when its holder dies. An entry is verified whenever it
is read; a bad one is set aside and made again, which is logged. Plain files only, no links. What a
run asked for is noted, and a store is held while it is in use, so that the rest can be pruned (see
`inventory`).
"""

import fcntl
import logging
import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline import manifest, processes
from pipeline.manifest import fingerprint, seal, sync
from pipeline.writing import write_text

LOG: Final = logging.getLogger(__name__)
HIDDEN: Final = ".store"
"""Locks, unfinished and set-aside entries lie here, beside the entries."""
USED, SINCE = "used", "since"
"""Files with the names of entries, one a line: what the last finished run asked for, and what those
after it did, which were killed or go on. Of a store that is shared, each run has its own."""
KEPT: Final = ".kept"
IN_USE: Final = "in-use"
"""A file that is locked by whoever uses the store: shared by runs, alone by who prunes it."""


@dataclass(frozen=True)
class Entry:
    """A verified folder: `digest` is the hash of its files, `about` what its maker said of them."""

    folder: Path
    digest: str
    about: Mapping[str, Any]


class NotMade(RuntimeError):
    """The first of several processes did not make an entry; it says why."""


class Store:
    """A folder of entries; a fresh one makes each of them again, once.

    Where several runs share it, each is a `user` with a name of its own: what one does not ask for
    may be another's.
    """

    def __init__(self, root: Path, *, fresh: bool = False, user: str = "") -> None:
        self._root = root
        self._fresh = fresh
        own = f"-{user}" if user else ""
        self._used, self._since = (root / HIDDEN / f"{note}{own}" for note in (USED, SINCE))
        self._made: set[str] = set()
        self._asked: set[str] = set()
        for name in ("locks", "unfinished", "bad"):
            (root / HIDDEN / name).mkdir(parents=True, exist_ok=True)
        held = os.open(root / HIDDEN / IN_USE, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, held)
        fcntl.flock(held, fcntl.LOCK_SH)
        self._sweep()

    def get(
        self,
        name: str,
        key: Mapping[str, Any],
        make: Callable[[Path], Mapping[str, Any]],
        *,
        join: Callable[[Path], object] | None = None,
    ) -> Entry:
        """Return the entry for `key`, made by `make(folder)` unless it is there already.

        Args:
            name: what the folder's name begins with, for people.
            key: everything the entry depends on, as JSON.
            make: writes the entry's files into an empty folder, and says what is known of them.
                What it puts beside that folder, at `kept(folder)`, is there again if it is killed
                and called once more.
            join: what the other processes of the run do while the first one makes the entry; it
                gets the same folder, to read what is kept beside it.
        """
        label = f"{name}-{fingerprint(key)[:16]}"
        folder, unfinished = self._root / label, self._root / HIDDEN / "unfinished" / label
        if not processes.leads():
            if processes.agree(0) and join is not None:
                join(unfinished)
            made = verify(folder) if processes.agree(0) else None
            if made is None:
                raise NotMade(f"{label}: found nothing, expected what the first process makes")
            return made
        self._note(label)
        with _lock(self._root, label):
            entry = verify(folder)
            there = entry is not None and (label in self._made or not self._fresh)
            if self._fresh:
                kept(unfinished).unlink(missing_ok=True)
            processes.agree(not there)
            made = None
            try:
                made = entry if there else self._make(label, entry, make)
            finally:
                processes.agree(made is not None)
            assert made is not None
            return made

    def _make(
        self, label: str, entry: Entry | None, make: Callable[[Path], Mapping[str, Any]]
    ) -> Entry | None:
        """Make an entry in the place of `entry`, if there is one; the lock is held."""
        folder, unfinished = self._root / label, self._root / HIDDEN / "unfinished" / label
        if entry is None and os.path.lexists(folder):
            LOG.error("%s; it is made again, and set aside", _why_bad(folder))
        shutil.rmtree(unfinished, ignore_errors=True)  # a killed run's
        unfinished.mkdir()
        try:
            seal(unfinished, make(unfinished))
            if entry:
                shutil.rmtree(folder)
            elif os.path.lexists(folder):
                bad = self._root / HIDDEN / "bad" / f"{label}-{uuid.uuid4().hex[:8]}"
                folder.rename(bad)
            unfinished.rename(folder)
            sync(self._root)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        kept(unfinished).unlink(missing_ok=True)
        self._made.add(label)
        return verify(folder)

    def finish(self) -> None:
        """Note that the run has ended: what it did not ask for is not in use any more."""
        write_text(self._used, "".join(f"{name}\n" for name in sorted(self._asked)))
        self._since.unlink(missing_ok=True)

    def _note(self, label: str) -> None:
        if label not in self._asked:
            self._asked.add(label)
            with self._since.open("a", encoding="utf-8") as file:
                file.write(f"{label}\n")

    def _sweep(self) -> None:
        """Remove what killed writers left; what a training goes on from stays."""
        for path in (self._root / HIDDEN / "unfinished").iterdir():
            if path.suffix == KEPT:
                continue
            with (
                suppress(BlockingIOError),
                _lock(self._root, path.name.partition(".")[0], wait=False),
            ):
                remove(path)


@contextmanager
def _lock(root: Path, label: str, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of an entry.

    Raises:
        BlockingIOError: another one holds it, and there is to be no waiting.
    """
    with (root / HIDDEN / "locks" / label).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def kept(unfinished: Path) -> Path:
    """Return the file beside an unfinished entry that outlives a kill."""
    return unfinished.with_name(f"{unfinished.name}{KEPT}")


def verify(folder: Path) -> Entry | None:
    """Return the folder's entry if its files are those of its manifest, else None."""
    if folder.is_symlink():
        return None
    try:
        files, about = manifest.read(folder)
    except manifest.Damaged:
        return None
    return Entry(folder, fingerprint(files), about)


def _why_bad(folder: Path) -> str:
    """Return the first thing that is wrong with an entry."""
    if folder.is_symlink():
        return f"{folder}: found a link, expected a folder"
    try:
        manifest.read(folder)
    except manifest.Damaged as error:
        return str(error).splitlines()[0]
    return f"{folder}: found it damaged"  # and mended since


def publish(source: Callable[[Path], None], folder: Path, about: Mapping[str, Any]) -> None:
    """Write a folder with a manifest where a user looks for it, as a whole or not at all."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    before = folder.with_name(f".{folder.name}.before")
    _settle(folder, before)  # what a kill left
    remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        source(unfinished)
        seal(unfinished, about)
        if os.path.lexists(folder):
            folder.rename(before)
        unfinished.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        _settle(folder, before)


def withdraw(folder: Path) -> None:
    """Take what was published away, as a whole."""
    gone = folder.with_name(f".{folder.name}.gone")
    remove(gone)
    if os.path.lexists(folder):
        folder.rename(gone)
        remove(gone)


def _settle(folder: Path, before: Path) -> None:
    """Put the folder that was there before back, if no other one has come in its place."""
    if os.path.lexists(before) and not os.path.lexists(folder):
        before.rename(folder)
    remove(before)
