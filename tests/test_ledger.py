"""A gate split counts the candidates that it has judged."""

import json

import pytest

from pipeline.evidence import EvidenceError
from pipeline.ledger import LEDGER, record
from pipeline.report import uses_note


def test_a_candidate_counts_once_and_another_one_too(tmp_path):
    folder = tmp_path / "run"  # no other test's lies beside it
    folder.mkdir()
    first = record(folder, ["a", "b"], "one")
    assert first["candidates"] == ["one"]
    assert record(folder, ["b", "a"], "one") == first  # the same run again
    assert record(folder, ["a", "b"], "two")["candidates"] == ["one", "two"]
    assert record(folder, ["a", "c"], "two")["candidates"] == ["two"]  # another split
    assert len(json.loads((folder / LEDGER).read_text())) == 2


def test_runs_beside_each_other_count_together(tmp_path):
    """As with the default outputs, `runs/<recipe>`."""
    for name in "abc":
        (tmp_path / "runs" / name).mkdir(parents=True)
        found = record(tmp_path / "runs" / name, ["a", "b"], f"model {name}")
    record(tmp_path / "runs" / "b", ["c"], "of another split")
    assert found["candidates"] == ["model c", "model a", "model b"]
    assert record(tmp_path / "runs" / "a", ["a", "b"], "model b")["candidates"] == [
        "model a", "model b", "model c",
    ]  # fmt: skip
    (tmp_path / "runs" / "c" / LEDGER).write_text("{")
    with pytest.raises(EvidenceError, match=f"c/{LEDGER}: cannot be read"):
        record(tmp_path / "runs" / "a", ["a", "b"], "model a")


def test_several_candidates_are_told():
    assert uses_note({}) == uses_note({"ledger": {"candidates": ["one"]}}) == ""
    assert "has judged 2 candidates" in uses_note({"ledger": {"candidates": ["one", "two"]}})


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "found no ledger"), ('{"a": 1}', "found no ledger")],
)
def test_a_damaged_ledger_is_an_error(tmp_path, text, message):
    folder = tmp_path / "run"  # no other test's lies beside it
    folder.mkdir()
    (folder / LEDGER).write_text(text)
    with pytest.raises(EvidenceError, match=message):
        record(folder, ["a"], "one")
    assert (folder / LEDGER).read_text() == text
