"""What a machine can do at most, and the energy that it uses."""

import sys
from types import SimpleNamespace

import pynvml
import pytest

from benchmarks import energy, limits, machine, nvidia


def test_limits_are_rates_of_what_can_be_measured():
    found = limits.measure(["fp32", "int8", "nf4"], device="cpu", threads=1)
    assert found.multiply_adds_per_s.keys() == {"fp32", "int8"}
    assert min(*found.multiply_adds_per_s.values(), found.bytes_per_s) > 1e8


def write_package(root, name, microjoules, wraps=1000):
    (root / name).mkdir(exist_ok=True)
    kind = "psys" if name.endswith(":2") else "core" if name.count(":") > 1 else "package-0"
    (root / name / "name").write_text(f"{kind}\n")
    (root / name / "energy_uj").write_text(f"{microjoules}\n")
    (root / name / "max_energy_range_uj").write_text(f"{wraps}\n")


def test_energy_is_what_all_packages_used(tmp_path):
    write_package(tmp_path, "intel-rapl:0", 100)
    write_package(tmp_path, "intel-rapl:1", 990)
    write_package(tmp_path, "intel-rapl:0:0", 7)  # a part of a package, counted with it
    write_package(tmp_path, "intel-rapl:2", 1)  # the whole machine, the packages among it
    found, reason = energy.of_processors(tmp_path)
    assert (len(found), reason) == (2, "")
    before = energy.read(found)
    write_package(tmp_path, "intel-rapl:0", 150)
    write_package(tmp_path, "intel-rapl:1", 20)
    assert energy.joules(found, before, energy.read(found)) == pytest.approx((50 + 30) / 1e6)


def test_no_sensor_is_a_reason(tmp_path):
    assert energy.of_processors(tmp_path) == ([], "this machine has no energy counter")
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "name").write_text("package-0\n")
    assert energy.of_processors(tmp_path)[1].startswith("the energy counter cannot be read")


class Nvml:
    """NVIDIA's library with some devices; each call tells more millijoules."""

    NVMLError = pynvml.NVMLError

    def __init__(self, count):
        self.count, self.millijoules = count, 0

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetCount(self):  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle):  # noqa: N802
        return f"GPU-{handle}bb1-aabb"

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(used=1000 + handle)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        if handle == 1:
            raise self.NVMLError(3)  # not supported
        self.millijoules += 2000
        return self.millijoules


@pytest.fixture
def devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return lambda count: monkeypatch.setitem(sys.modules, "pynvml", Nvml(count))


def test_a_gpu_tells_its_memory_and_energy(devices):
    devices(1)
    assert nvidia.used_bytes() == (1000, "")
    found, reason = energy.counters("cuda")
    assert reason == ""
    assert energy.joules(found, energy.read(found), energy.read(found)) == pytest.approx(2)


@pytest.mark.parametrize(
    ("visible", "order", "used"),
    [("1,0", "PCI_BUS_ID", 1001), ("GPU-2bb1", "", 1002), ("1", "", None), ("", "PCI_BUS_ID", None),
     ("7", "PCI_BUS_ID", None), ("GPU-9", "", None)],
)  # fmt: skip
def test_of_several_gpus_it_is_the_visible_one_or_none(devices, monkeypatch, visible, order, used):
    devices(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    found, reason = nvidia.used_bytes()
    assert found == used
    assert bool(reason) == (used is None)


def test_a_gpu_without_an_energy_counter_is_a_reason(devices, monkeypatch):
    devices(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    assert energy.counters("cuda")[0] == []
    assert energy.counters("cuda")[1].startswith("the GPU's counters cannot be read: ")


@pytest.mark.skipif(machine.describe().gpu is not None, reason="there is a GPU")
def test_without_a_driver_the_gpus_counters_are_a_reason(monkeypatch):
    expected = None, "the GPU's counters cannot be read: NVML Shared Library Not Found"
    assert nvidia.used_bytes() == expected
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (
        energy.counters("cuda")[1]
        == "the GPU's counters need nvidia-ml-py, which the extras `gpu` and `tensorrt` have"
    )


def test_waiting_only_grows():
    before, after = machine.stalled_seconds(), machine.stalled_seconds()
    for what, seconds in before.items():
        assert seconds is None or 0 <= seconds <= after[what]


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("150000 100000", 1.5), (None, None)]
)
def test_a_control_group_may_have_fewer_cores(tmp_path, text, cores):
    if text:
        (tmp_path / "cpu.max").write_text(text + "\n")
    assert machine._cpu_quota(tmp_path / "cpu.max") == cores
