"""Safetensors read and written without the library are those that the library reads and writes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import tensors
from pipeline.checkpoint import ModelError

FOUND = {
    "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "mask": torch.tensor([[True], [False], [True]]),
    "one": torch.tensor(7, dtype=torch.int64),
    "none": torch.zeros(4, 0),
}


def test_what_the_library_wrote_is_read(tmp_path):
    save_file(FOUND, tmp_path / "model.safetensors")
    places = tensors.places(tmp_path)
    assert places.keys() == FOUND.keys()
    for name, place in places.items():
        assert torch.equal(tensors.read(place), FOUND[name])
        assert tensors.read(place).dtype == FOUND[name].dtype
    parts = [*tensors.chunks(places["wide"], 16)]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert torch.equal(torch.cat(parts), FOUND["wide"].flatten())


@pytest.mark.parametrize("shard_bytes", [1000, 40])
def test_what_is_written_in_any_order_is_read_by_the_library(tmp_path, shard_bytes):
    layout = {name: tensor.to("meta") for name, tensor in FOUND.items()}
    with tensors.Writer(tmp_path, layout, shard_bytes=shard_bytes) as writer:
        for name in reversed(FOUND):
            writer.write(name, [FOUND[name].reshape(-1)])
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert found.keys() == FOUND.keys()
    assert all(torch.equal(found[name], FOUND[name]) for name in FOUND)
    assert tensors.places(tmp_path).keys() == FOUND.keys()
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (len(files) > 1) == (shard_bytes == 40)
    if index.is_file():
        assert json.loads(index.read_text())["metadata"]["total_size"] == 48 + 4 + 3 + 8


def test_what_is_damaged_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ModelError, match=r"found no model\.safetensors, expected one, or"):
        tensors.places(tmp_path)
    save_file({"a": torch.tensor([1.0, torch.nan])}, path)
    with pytest.raises(ModelError, match="found NaN or infinity in a, expected numbers"):
        tensors.read(tensors.places(tmp_path)["a"])
    whole, place = path.read_bytes(), tensors.places(tmp_path)["a"]
    path.write_bytes(whole[:-4])
    with pytest.raises(ModelError, match="damaged weights: found a at bytes 0 to 8, expected it"):
        tensors.places(tmp_path)
    with pytest.raises(ModelError, match="damaged weights: found its end within a"):
        tensors.read(place)
    path.write_bytes(whole.replace(b"F32", b"F4 "))
    with pytest.raises(ModelError, match="damaged weights: found a of type F4 , expected"):
        tensors.places(tmp_path)
    path.write_bytes(b"\xff" * 16)
    with pytest.raises(ModelError, match="damaged weights: found a header of"):
        tensors.places(tmp_path)
