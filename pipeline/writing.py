"""A file as a whole, or not at all."""

from pathlib import Path

from pipeline.manifest import sync


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
