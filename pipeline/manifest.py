"""The manifest of a folder: the sha256 of every file, and what its maker said of them.

Plain files only, each with one name: a link may lead out of the folder, and what a hard link names
can be changed from elsewhere. Both are as bad as a file that was changed, and never followed.
Nothing here needs torch, so that an artifact can be checked wherever it is deployed.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "model.sig"
"""Covers the manifest too, and so stands in none."""
FILE: Final = frozenset({"bytes", "sha256"})


class Damaged(ValueError):
    """A folder is not what its manifest says; the message tells every file, one a line."""


def fingerprint(value: object) -> str:
    """Return the sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of every file below `folder` but its manifest and its signature."""
    apart = {folder / MANIFEST, folder / SIGNATURE}
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in apart
    }


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a finished folder, and sync all of it to the disk."""
    manifest: dict[str, Any] = {"files": content(folder), "about": dict(about)}
    manifest["sha256"] = fingerprint(manifest)
    (folder / MANIFEST).write_text(_text(manifest), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)


def read(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the files of a folder as its manifest has them, and what was said of them.

    Raises:
        Damaged: there is no manifest, it was changed, or the files are not those that it names, or
            no plain ones.
    """
    mistakes = [
        f"{path}: found {found}, expected a plain file"
        for path in sorted(folder.rglob("*"))
        if (found := _not_plain(path))
    ]
    if mistakes:  # no link is followed
        raise Damaged("\n".join(mistakes))
    files, about = _told(folder / MANIFEST)
    there = content(folder)
    mistakes = [
        f"{folder / name}: {_difference(there.get(name), files.get(name))}"
        for name in sorted(files.keys() | there.keys())
        if there.get(name) != files.get(name)
    ]
    if mistakes:
        raise Damaged("\n".join(mistakes))
    return files, about


def _not_plain(path: Path) -> str:
    """Return what a path is, if it is neither a folder nor a file with this name alone."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "a link"
    if stat.S_ISREG(status.st_mode):
        return f"a file with {status.st_nlink} names (hard links)" if status.st_nlink > 1 else ""
    return "" if stat.S_ISDIR(status.st_mode) else "a pipe or device"


def _told(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return what a manifest says: of the files, and of what they are.

    Raises:
        Damaged: there is none, it was changed, or it is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        whole = _text(manifest) == text  # 0.1 and 0.10 are one number, but not the same bytes
        seal_found = manifest.pop("sha256")
        files, about = dict(manifest["files"]), dict(manifest["about"])
        whole = whole and fingerprint(manifest) == seal_found
    except FileNotFoundError:
        raise Damaged(f"{path}: found none, expected a folder that secateur wrote") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: cannot be read: {error}") from None
    if not whole:
        raise Damaged(f"{path}: found another content than its own sha256 says; it was changed")
    if not all(isinstance(file, dict) and file.keys() == FILE for file in files.values()):
        raise Damaged(f"{path}: found files without size or sha256, expected {sorted(FILE)}")
    return files, about


def _difference(found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> str:
    if found is None:
        return "missing"
    if expected is None:
        return "found a file that the manifest does not name; it was added"
    if found["bytes"] != expected["bytes"]:
        return f"found {found['bytes']} bytes, expected {expected['bytes']}; it was cut or changed"
    return f"found the sha256 {found['sha256'][:16]}..., expected {expected['sha256'][:16]}..."


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
