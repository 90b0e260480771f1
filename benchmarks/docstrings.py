"""A text classification data set made from installed software: which package is this text from?

It is there so that a demo can train, prune and judge a model with no download. The one idea: the
packages that are installed anyway hold thousands of short English texts, their docstrings, each
with a label that nobody had to write: the package it comes from.

A text is the opening prose of a docstring, before its first section, example or directive, without
markup. The names of all the packages are masked in all the texts, so that neither a name nor a mask
tells the label. Texts that differ only in identifiers, digits or punctuation count as one, so that
no split holds such a copy of a text of another.

Nothing is imported: `importlib` finds the sources, `ast` reads them. Files are read in the order of
a hash of their path until a package has given enough texts; texts go to the splits in the order of
a hash of their content. So the same versions give the same data; other versions give other data,
and scores compare only within one environment.

This module does not know models, tokenizers or metrics.
"""

import ast
import hashlib
import importlib.util
import re
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

# Packages that the core dependencies bring along; networkx comes with torch, pandas with datasets.
LABELS: Final = ("matplotlib", "networkx", "pandas", "sklearn", "sympy", "transformers")
MASK: Final = "library"

_HELD_OUT: Final = {"gate": 3000, "selection": 1000, "calibration": 512}
_TRAIN_MIN: Final = 500  # texts of a label
_TRAIN_MAX: Final = 1000
_MIN_PLAIN_WORDS: Final = 7
_MAX_WORDS: Final = 40

# Folders and files of tests, and copies of other packages.
_SKIPPED: Final = frozenset(
    {"tests", "testing", "_testing", "testing_utils.py", "_vendored", "externals"}
)
_NAMES: Final = re.compile(
    r"\b\w*(?:matplotlib|networkx|pandas|sklearn|scikit-?learn|sympy|torch|transformers)\w*"
    r"|\bhugging ?face\w*|\b(?:mpl|plt|pyplot|nx|pd|hf)\b",
    re.IGNORECASE,
)
# Sphinx roles, links and the like: each package has its own, and they would tell the label.
_MARKUP: Final = re.compile(
    r"Read more in the\s+:ref:`[^`]*`\.?|"
    r"\[\d+\]_|\]\([^)]*\)|https?://\S+|:[a-z:]+:(?=`)|[`*$\[\]]|(?<![\w.])[~.]+(?=[A-Za-z])"
)
_END_OF_PROSE: Final = re.compile(
    r":: *$|^\s*(?:(?:Arg(?:ument)?s|Attributes|Examples?|Explanation|Notes?|Parameters|Raises"
    r"|References|Returns|See Also|Usage|Yields)\b *:? *$|[-=~^+|]{3,}|>>>|```|\.\. |[:@]param\b)",
    re.IGNORECASE | re.MULTILINE,
)
# A word of prose: not part of an identifier, a path or a number.
_PLAIN_WORD: Final = re.compile(r"(?<![^\s(])[a-z]+(?:-[a-z]+)*(?=[.,:;)]*(?:\s|$))")


def load() -> dict[str, list[dict[str, str]]]:
    """Return the splits: rows of `text` and `label`, the labels of a split equally frequent.

    Raises:
        ValueError: A package is missing, or gives too few texts.
    """
    seen: set[str] = set()
    texts = {label: _texts(label, seen) for label in LABELS}
    splits: dict[str, list[dict[str, str]]] = {"train": []}
    for split, size in reversed(_HELD_OUT.items()):
        splits[split] = []
        for index, label in enumerate(LABELS):
            count = (size + index) // len(LABELS)  # these add up to the size
            splits[split] += [{"text": text, "label": label} for text in texts[label][:count]]
            del texts[label][:count]
    count = min(_TRAIN_MAX, *map(len, texts.values()))
    for label in LABELS:
        splits["train"] += [{"text": text, "label": label} for text in texts[label][:count]]
    for split, rows in splits.items():  # the split in the hash mixes the labels
        rows.sort(key=lambda row: _digest(split + row["text"]))
    return splits


def versions() -> dict[str, str]:
    """Return the versions that the data depend on: the packages', and this file's hash."""
    names = {"sklearn": "scikit-learn"}
    found = {label: metadata.version(names.get(label, label)) for label in LABELS}
    return found | {"docstrings.py": _digest(Path(__file__).read_text(encoding="utf-8"))}


def _texts(label: str, seen: set[str]) -> list[str]:
    """Return the texts of a package in the order of their hashes, and add their keys to `seen`.

    Raises:
        ValueError: The package is missing, or gives too few texts.
    """
    spec = importlib.util.find_spec(label)
    if spec is None or not spec.submodule_search_locations:
        msg = f"docstrings: no package {label!r}, expected it to be installed; pip install it"
        raise ValueError(msg)
    folder = Path(spec.submodule_search_locations[0])
    held_out = sum(-(-size // len(LABELS)) for size in _HELD_OUT.values())
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    texts: list[str] = []
    for relative in sorted(paths, key=_digest):
        if len(texts) >= held_out + _TRAIN_MAX:
            break
        if _SKIPPED.isdisjoint(relative.split("/")):
            for docstring in _docstrings(paths[relative]):
                text = _clean(docstring)
                plain = _PLAIN_WORD.findall(text[:1].lower() + text[1:])
                key = " ".join(plain)
                if text[:1].isupper() and len(plain) >= _MIN_PLAIN_WORDS and key not in seen:
                    seen.add(key)
                    texts.append(text)
    if len(texts) < held_out + _TRAIN_MIN:
        msg = (
            f"docstrings: {len(texts)} texts in {folder}, expected {held_out + _TRAIN_MIN}; "
            f"install {label} with its sources and docstrings"
        )
        raise ValueError(msg)
    return sorted(texts, key=_digest)


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions; none if it is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some sources hold invalid escapes
        try:
            nodes: list[ast.stmt | ast.Module] = [ast.parse(path.read_bytes())]
        except (SyntaxError, ValueError):  # a template, or a source for another Python
            return
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
            nodes += node.body


def _clean(docstring: str) -> str:
    """Return the opening prose on one line, cut to its first words, without markup and names."""
    prose = _END_OF_PROSE.split(docstring, maxsplit=1)[0]
    return " ".join(_NAMES.sub(MASK, _MARKUP.sub("", prose)).split()[:_MAX_WORDS])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
