"""Layers that lose most are left out, worst first."""

import pytest

from pipeline import mixed


def test_layers_that_lose_most_are_left_out_until_it_is_enough():
    harm = {"a": 0.001, "b": 0.02, "c": 0.005}

    def measure(left):
        lost = sum(harm[name] for name in harm.keys() - left)
        return mixed.Loss(lost, 10 * lost)

    assert mixed.leave_out([*harm], measure, 0.03)[0] == ()
    assert mixed.leave_out([*harm], measure, 0.01)[0] == ("b",)
    left, alone = mixed.leave_out([*harm], measure, 0.001)
    assert left == ("b", "c")
    assert alone == pytest.approx({name: 10 * lost for name, lost in harm.items()})
    with pytest.raises(mixed.OutOfReach, match=r"found a loss of 0\.001 at least"):
        mixed.leave_out([*harm], measure, 0.0005)
