"""What a report says of the machine."""

import platform
from dataclasses import replace

import pytest

from benchmarks import machine


def test_the_machine_is_described():
    found = machine.describe()
    assert found.cores >= 1
    assert found.memory_bytes > 1 << 28
    assert found.versions["torch"].startswith("2.")
    assert found.identity() == machine.describe().identity()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize(
    ("flags", "saturates"),
    [(("avx2",), True), (("avx2", "avx512_vnni"), False), (("avx_vnni",), False), ((), True)],
)
def test_int8_saturates_without_vnni(flags, saturates):
    assert replace(machine.describe(), cpu_flags=flags).saturates == saturates


def test_pressure_is_a_share_of_the_time():
    found = machine.pressure()
    assert found["load_average"] >= 0
    assert found["cpu_stalled"] is None or 0 <= found["cpu_stalled"] <= 1
