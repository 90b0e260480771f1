"""The table of growth says what is linear and what is not."""

import subprocess
import sys

import pytest

from benchmarks.cost_of_growth import _ask, tables


def test_exponents_are_those_of_the_growth():
    costs = {(2, 32): 1.0, (4, 32): 2.0, (8, 32): 4.0, (2, 64): 4.0, (2, 128): 32.0}
    found = {"scoring": {shape: (cost, 1e6 * cost) for shape, cost in costs.items()}}
    found["export"] = {shape: (cost, 0.0) for shape, cost in costs.items()}
    lines = tables(found, 2, 32).splitlines()
    assert "| 2 x 128 | 32 | 32 | 32 | 0 |" in lines
    assert lines[-4:] == [
        "| depth 1 to 2 | 1.00 | 1.00 | 1.00 | - |",
        "| depth 2 to 4 | 1.00 | 1.00 | 1.00 | - |",
        "| width 1 to 2 | 2.00 | 2.00 | 2.00 | - |",
        "| width 2 to 4 | 3.00 | 3.00 | 3.00 | - |",
    ]
    assert len({line.count("|") for line in lines if line}) == 1


def test_a_process_that_ends_without_an_answer_is_said_so():
    command = [sys.executable, "-c", "input(); print('no answer')"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen(command, **streams) as child,
        pytest.raises(RuntimeError, match="found the end, expected an answer"),
    ):
        _ask(child)
