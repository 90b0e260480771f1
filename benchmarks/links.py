"""Links that lead out of a folder: who follows them reads what its maker never sent."""

from collections.abc import Iterator
from pathlib import Path


def leading_out(folder: Path) -> Iterator[Path]:
    """Yield every link below a folder that leads out of it, but for those of the hub's cache.

    The cache keeps a snapshot's files as links to `blobs`, beside all its snapshots.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in inside):
            yield path
