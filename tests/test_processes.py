"""Several processes train to the weights of one, whether each holds all of them or a part."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_model
from safetensors.torch import load_file
from trained_together import trained

from benchmarks.machine import Unavailable
from pipeline import masks, processes

WAYS = ["plain", "teacher", "language", "patience", "killed", *masks.LEARNERS]
FEW = ["exact-k", "teacher", "language-sharded", "movement-sharded", "killed-sharded"]


@pytest.fixture
def doubles(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # `trained` sets it
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def start(folder: Path, names: list[str]) -> list[subprocess.Popen[bytes]]:
    """Start two processes that meet, as torchrun does, without the imports of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FSDP_VERSION": "2"}
    script = Path(__file__).with_name("trained_together.py")
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), *names],
            env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(FEW, id="few"),
        pytest.param(
            [*WAYS, *(f"{way}-sharded" for way in WAYS)], id="all", marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_train_to_the_weights_of_one(tmp_path, doubles, names):
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    write_model(tmp_path / "classifier", **without)
    write_model(tmp_path / "writer", "llama")
    both = start(tmp_path, names)
    ways = {name.removesuffix("-sharded") for name in names}
    alone = {way: trained(tmp_path, way) for way in sorted(ways)}
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()
    weight = "classifier.weight"
    assert (alone["killed"][weight] - alone["teacher"][weight]).abs().max() > 1e-4
    for name in names:  # a Llama's norms and the library's loss of texts are in fp32 all the same
        one, two = alone[name.removesuffix("-sharded")], load_file(tmp_path / name)
        assert one.keys() == two.keys()
        for tensor, value in one.items():
            torch.testing.assert_close(
                two[tensor], value, rtol=0, atol=1e-7, msg=f"{name} {tensor}"
            )


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(Unavailable, match="FSDP_VERSION: found 1, expected 2"):
        processes.start("cpu")


def test_one_process_has_nothing_to_share(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    processes.start("cpu")
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"
    assert not processes.sharded()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert processes.sharded()
