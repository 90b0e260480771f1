"""A file as a whole, or not at all."""

from pathlib import Path

from pipeline.manifest import sync


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)  # a killed run's, or a link that would be followed
    try:
        with unfinished.open("x", encoding="utf-8") as file:
            file.write(text)
        sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
