"""Tests of the built-in data set: the same rows every time, honest splits, nothing imported."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from benchmarks import docstrings

if TYPE_CHECKING:
    from pathlib import Path

Splits = dict[str, list[dict[str, str]]]

# Loads in a process of its own; prints a hash of the data and the packages that were imported.
PROBE = """
import hashlib, json, sys
from benchmarks import docstrings
data = json.dumps(docstrings.load())
imported = sorted({*docstrings.LABELS, "torch", "numpy"} & set(sys.modules))
print(json.dumps([hashlib.sha256(data.encode()).hexdigest(), imported]))
"""


@pytest.fixture(scope="module")
def splits() -> Splits:
    return docstrings.load()


def test_another_process_gives_the_same_rows_and_imports_no_package(splits: Splits) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    probe = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True
    )
    digest, imported = json.loads(probe.stdout)
    assert digest == hashlib.sha256(json.dumps(splits).encode()).hexdigest()
    assert imported == []


def test_sizes(splits: Splits) -> None:
    assert list(splits) == ["train", "calibration", "selection", "gate"]
    assert len(splits["calibration"]) == 512
    assert len(splits["selection"]) == 1000
    assert len(splits["gate"]) == 3000
    assert len(splits["train"]) >= 500 * len(docstrings.LABELS)


def test_no_text_occurs_twice(splits: Splits) -> None:
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("split", ["train", "calibration", "selection", "gate"])
def test_labels_are_equally_frequent_and_mixed(splits: Splits, split: str) -> None:
    counts = Counter(row["label"] for row in splits[split])
    assert sorted(counts) == sorted(docstrings.LABELS)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({row["label"] for row in splits[split][:64]}) == len(docstrings.LABELS)


def test_no_text_names_a_package(splits: Splits) -> None:
    names = (*docstrings.LABELS, "scikit-learn", "scikit learn", "hugging face", "huggingface")
    texts = [row["text"].lower() for rows in splits.values() for row in rows]
    assert [text for text in texts for name in names if name in text] == []
    assert any(docstrings.MASK in text for text in texts)


def test_texts_are_short_prose_on_one_line(splits: Splits) -> None:
    for row in (row for rows in splits.values() for row in rows):
        assert 7 <= len(row["text"].split()) <= 40
        assert row["text"] == " ".join(row["text"].split())
        assert ">>>" not in row["text"]
        assert "----" not in row["text"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "LABELS", ("secateur_absent",))
    with pytest.raises(
        ValueError, match=r"^docstrings: no package 'secateur_absent', expected .*; pip install it$"
    ):
        docstrings.load()


def test_too_few_texts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "Return the area of the circle that the three points span.",
        "Return the length\n    of the shortest path between the two points.\n\n    Args:\n",
        "Return the sum.\n\n    This is counted, for the opening prose is more than one line.",
        "Return the area of the circle that the three points span: 2.",  # the first, but a digit
        "Return the sum.\n\n    Args:\n        points: all the words down here do not count.",
        "return words that do not begin with a capital like prose does.",
    ]
    package = tmp_path / "secateur_small"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise ImportError\n"  # read, never run
        + "".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(texts))
    )
    (package / "template.py").write_text('"""{{ this }} is a file that does not parse as Python')
    (package / "tests" / "test_it.py").write_text('"""Tests that the area of a circle is right."""')
    monkeypatch.setattr(docstrings, "LABELS", ("secateur_small",))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^docstrings: 3 texts in .*secateur_small, expected \d+; install secateur_small",
    ):
        docstrings.load()
