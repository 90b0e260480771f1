"""Safetensors read and written one tensor at a time, however large the files are.

The library maps a file as a whole, which counts against a limit of the address space, and writes a
file from tensors that are all in memory. The format is simple enough to do without: eight bytes say
how long the header is, the header says in JSON where each tensor's bytes lie behind it.
Source: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from pipeline.checkpoint import ModelError
from pipeline.trust import INDEX

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
SINGLE: Final = "model.safetensors"
SHARD_BYTES: Final = 50 * 10**9
"""The most that goes into one file, as the library has it."""
CHUNK_BYTES: Final = 1 << 24
"""What is copied unchanged is copied so much at a time."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its name and file, the first of its bytes, and what they are."""

    name: str
    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """The number of its bytes."""
        return prod(self.shape) * self.dtype.itemsize


def places(folder: Path) -> dict[str, Place]:
    """Return where every tensor of a model's folder lies, from the headers alone.

    Raises:
        ModelError: there are no safetensors, or they are damaged or of a type that is not known.
    """
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / INDEX).is_file():  # `checkpoint.read_config` has looked through it
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    else:
        raise ModelError(f"{folder}: found no {SINGLE}, expected one, or {INDEX} and its files")
    found: dict[str, Place] = {}
    for name in names:
        try:
            found |= header(folder / name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ModelError(f"{folder / name}: damaged weights: {error}") from error
    return found


def header(path: Path) -> dict[str, Place]:
    """Return where the tensors of one file lie.

    Raises:
        OSError, ValueError: there is no such file, or it is none of safetensors.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"found a header of {length} bytes in a file of {size}")
        entries: dict[str, Any] = json.loads(file.read(length))
    found = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"found {name} of type {entry['dtype']}, expected {sorted(DTYPES)}")
        begin, end = entry["data_offsets"]
        kind, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        place = Place(name, path, 8 + length + begin, kind, shape)
        if end - begin != place.size_bytes or not 0 <= begin <= end <= size - 8 - length:
            raise ValueError(f"found {name} at bytes {begin} to {end}, expected it in the file")
        found[name] = place
    return found


def read(place: Place, *, finite: bool = True) -> Tensor:
    """Return a tensor, a copy of its own.

    Raises:
        ModelError: it is not `finite`, or the file ends before it does.
    """
    if not place.size_bytes:
        return torch.empty(place.shape, dtype=place.dtype)
    (whole,) = chunks(place, place.size_bytes, finite=finite)
    return whole.reshape(place.shape)


def chunks(place: Place, most: int = CHUNK_BYTES, *, finite: bool = True) -> Iterator[Tensor]:
    """Yield a tensor as flat parts of so many bytes at most.

    Raises:
        ModelError: as for `read`.
    """
    at, end = place.start, place.start + place.size_bytes
    with place.path.open("rb") as file:
        file.seek(at)
        while at < end:
            part = torch.empty(min(most, end - at) // place.dtype.itemsize, dtype=place.dtype)
            at += part.nbytes
            if file.readinto(_bytes(part)) != part.nbytes:
                raise ModelError(
                    f"{place.path}: damaged weights: found its end within {place.name}"
                )
            if finite and part.is_floating_point() and not bool(torch.isfinite(part).all()):
                raise ModelError(
                    f"{place.path}: found NaN or infinity in {place.name}, expected numbers"
                )
            yield part


def _bytes(tensor: Tensor) -> Any:
    """Return a contiguous tensor's own memory as a buffer."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class Writer:
    """A model's safetensors, laid out at once and filled tensor by tensor, in any order.

    The names of files, and the index, are those of the library. Use it in a `with`.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Lay the files out; of the tensors only shapes and types count: they may be on `meta`."""
        split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=shard_bytes)
        self._files = ExitStack()
        self._open: dict[str, tuple[BinaryIO, int, Tensor]] = {}
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / INDEX).write_text(text, encoding="utf-8")
        for file, names in split.filename_to_tensors.items():
            self._lay_out(folder / file, {name: tensors[name] for name in names})

    def _lay_out(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        # Wide types first, so that every tensor lies at a multiple of its type's size.
        ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name in ordered:
            tensor = tensors[name]
            starts[name], end = end, end + tensor.nbytes
            header[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = self._files.enter_context(path.open("wb"))
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        self._open |= {name: (file, 8 + len(text) + starts[name], tensors[name]) for name in starts}

    def write(self, name: str, parts: Iterable[Tensor]) -> None:
        """Fill a tensor with flat parts; they become what was laid out."""
        file, start, laid_out = self._open.pop(name)
        file.seek(start)
        written = sum(file.write(_bytes(part.to(laid_out.dtype).contiguous())) for part in parts)
        assert written == laid_out.nbytes, name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._files.close()
        assert kind is not None or not self._open, sorted(self._open)
