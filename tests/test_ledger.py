"""A gate split counts the candidates that it has judged."""

import json

import pytest

from pipeline.evidence import EvidenceError
from pipeline.ledger import LEDGER, record
from pipeline.report import uses_note


def test_a_candidate_counts_once_and_another_one_too(tmp_path):
    first = record(tmp_path, ["a", "b"], "one")
    assert first["candidates"] == ["one"]
    assert record(tmp_path, ["b", "a"], "one") == first  # the same run again
    assert record(tmp_path, ["a", "b"], "two")["candidates"] == ["one", "two"]
    assert record(tmp_path, ["a", "c"], "two")["candidates"] == ["two"]  # another split
    assert len(json.loads((tmp_path / LEDGER).read_text())) == 2


def test_several_candidates_are_told():
    assert uses_note({}) == uses_note({"ledger": {"candidates": ["one"]}}) == ""
    assert "has judged 2 candidates" in uses_note({"ledger": {"candidates": ["one", "two"]}})


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "found no ledger"), ('{"a": 1}', "found no ledger")],
)
def test_a_damaged_ledger_is_an_error(tmp_path, text, message):
    (tmp_path / LEDGER).write_text(text)
    with pytest.raises(EvidenceError, match=message):
        record(tmp_path, ["a"], "one")
    assert (tmp_path / LEDGER).read_text() == text
