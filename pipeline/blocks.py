"""A model of which one transformer block is in memory: the others lie in their files.

A block is loaded, all batches go through it, and it is dropped; what it gave waits, in memory or on
disk, for the next block. What a block is given beside its states (masks, positions) is found out by
running the model once with every block replaced by a recorder that hands its states on. That is
right where nothing but the blocks changes the states between them, which is checked: a recorder has
to be given the very tensor that the recorder before it returned.
"""

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from shutil import copyfile
from typing import Any, Final, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

from benchmarks.accuracy import Track, silent
from pipeline import calibration, checkpoint, structure, tensors, trust
from pipeline.architectures import ARCHITECTURES
from pipeline.calibration import Batch, Moments
from pipeline.checkpoint import ModelError
from pipeline.manifest import MANIFEST
from pipeline.tensors import Place

STATES: Final = "hidden_states"
AROUND: Final = frozenset({".jinja", ".json", ".model", ".txt"})
"""Endings of what lies around a model: tokenizer, generation."""
Keeping = Literal["disk", "memory"]
"""Where the states between blocks wait."""


@dataclass(frozen=True)
class Blocks:
    """A model on no device, and where its tensors lie, by their names in the model.

    `saved` has their names in the files, of each tensor once: what is tied has one.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    path: str
    places: Mapping[str, Place]
    saved: Mapping[str, str]

    def name(self, at: int) -> str:
        """Return the path of a block in the model."""
        return f"{self.path}.{at}"


def open_blocks(source: Path) -> Blocks:
    """Return the model of a folder, without its weights.

    Raises:
        ModelError: there is none, it is damaged, or of a kind that does not go block by block.
    """
    if not source.is_dir():
        raise ModelError(f"{source}: found no folder, expected one: download the model first")
    model = checkpoint.skeleton(source)
    with checkpoint.untrusted():
        trust.refuse_pickles(source)
    name = f"{source}: found {type(model).__name__}"
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{name} with quantized weights, expected floating point")
    if model.config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"{name}, expected one of the families {sorted(ARCHITECTURES)}; others are cut in"
            " memory alone"
        )
    try:
        stacks = structure.stacks(model)
    except ValueError as error:
        raise ModelError(f"{source}: {error}") from error
    if len(stacks) != 1 or model.config.is_encoder_decoder or not stacks[0][0].count:
        raise ModelError(
            f"{name}, expected one stack of layers with weights of their own: encoder-decoders and"
            " layers that share their weights are cut in memory alone"
        )
    model.config.use_cache = False
    places, saved = _places(source, model)
    stack, layers = stacks[0]
    return Blocks(model, layers, f"{structure.prefix(model)}{stack.layers}", places, saved)


def _places(source: Path, model: PreTrainedModel) -> tuple[dict[str, Place], dict[str, str]]:
    """Return where the model's tensors lie, and their names in the files, as the library has it.

    Raises:
        ModelError: files and model do not go together.
    """
    files, wanted = tensors.places(source), model.state_dict()
    # Of the families here none has tensors that would have to be put together from others.
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    found: dict[str, Place] = {}
    saved: dict[str, str] = {}
    unexpected, mismatched = set(), set()
    for written in sorted(files, key=dot_natural_key):
        base: Any = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": wanted}
        name, _ = rename_source_key(written, renamings, [], **base)
        if name not in wanted and written in wanted:
            name = written
        if name not in wanted:
            unexpected.add(name)
        elif files[written].shape != wanted[name].shape:
            mismatched.add((name, files[written].shape, wanted[name].shape))
        else:
            found[name], saved[name] = files[written], written
    info = {"unexpected_keys": unexpected, "mismatched_keys": mismatched}
    checkpoint.check(source, model, info)
    for tied, first in model.all_tied_weights_keys.items():
        if first in found:
            found[tied] = found[first]
            saved.pop(tied, None)
        elif tied in found:
            found[first] = found[tied]
    if missing := sorted(wanted.keys() - found.keys()):
        raise ModelError(
            f"{source}: found no {missing[0]}, expected every tensor of {type(model).__name__}"
        )
    return found, saved


@contextmanager
def loaded(blocks: Blocks, path: str) -> Iterator[nn.Module]:
    """Give a module with its weights, in fp32, until the block ends.

    Raises:
        ModelError: a tensor is damaged.
    """
    module = blocks.model.get_submodule(path)
    _load(blocks, module, {name: f"{path}.{name}" for name in module.state_dict()})
    try:
        yield module
    finally:
        _drop(module)


def _load(blocks: Blocks, module: nn.Module, names: Mapping[str, str]) -> None:
    held = {}
    for name, full in names.items():
        tensor = tensors.read(blocks.places[full])
        held[name] = tensor.float() if tensor.is_floating_point() else tensor
    module.load_state_dict(held, assign=True, strict=False)


def _drop(module: nn.Module) -> None:
    empty = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    module.load_state_dict(empty, assign=True)


class Activations:
    """Named tensors: in memory, or as files of a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[str, dict[str, Tensor]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, found: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name, in the place of those that were there."""
        if self._folder is None:
            self._held[name] = dict(found)
            return
        # Contiguous copies: the library refuses what shares memory, such as an expanded mask.
        copies = {
            key: each.clone(memory_format=torch.contiguous_format) for key, each in found.items()
        }
        save_file(copies, self._folder / f"{name}.safetensors")

    def get(self, name: str) -> dict[str, Tensor]:
        """Return what was put there last."""
        if self._folder is None:
            return self._held[name]
        header = tensors.header(self._folder / f"{name}.safetensors")
        return {key: tensors.read(place, finite=False) for key, place in header.items()}


@dataclass(frozen=True)
class _At:
    """Stands for a tensor of a batch's arguments."""

    name: str


class _Recorded(Exception):
    """All blocks have been reached."""


class _Changed(Exception):
    """A block was given other states than the one before it returned."""


@dataclass
class _Record:
    """What the blocks were given by one batch: each one's arguments, and the tensors in them."""

    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    tensors: dict[str, Tensor]


def walk(
    blocks: Blocks,
    readers: Callable[[str], Mapping[str, nn.Module]],
    data: Callable[[], Iterable[Batch]] | None,
    activations: Path | None,
    *,
    what: str,
    track: Track = silent,
) -> Iterator[tuple[str, dict[str, Moments]]]:
    """Yield each block's path, and the second moments of what is read in it, the block loaded.

    The moments are those of the whole model as it lies in the files, whatever is done to a block
    that was yielded, and are gone when the next one is. Without data there are none.

    Args:
        blocks: the model.
        readers: gives the modules of the block at a path, by any name.
        data: gives the calibration batches, anew each time.
        activations: a folder for the states between blocks; None keeps them in memory.
        what: is done, in a few words.
        track: shows progress.

    Raises:
        FloatingPointError, ValueError: as `calibration.moments`.
        ModelError: a tensor is damaged, or the states are changed between blocks.
    """
    kept = Activations(activations)
    given = _enter(blocks, data(), kept) if data else []
    numbers = range(len(blocks.layers))
    for at in track(numbers, what, len(numbers)):
        path = blocks.name(at)
        with loaded(blocks, path) as block:
            seen: dict[str, Moments] = {}
            if data:
                run = _through(block, at, kept, given)
                seen = calibration.moments_of(run, readers(path), data())
            yield path, seen
            seen.clear()  # whoever was given it may still hold it


def _through(
    block: nn.Module, at: int, kept: Activations, given: Sequence[_Record]
) -> Callable[[Batch], None]:
    """Return what takes the next batch's states through a block."""
    batches = count()

    def run(_: Batch) -> None:
        number = next(batches)
        states = kept.get(f"states-{number}")[STATES]
        table = kept.get(f"given-{number}")
        args, kwargs = _filled(given[number].arguments[at], table)
        output = block(states, *args, **kwargs)
        output = output if isinstance(output, Tensor) else output[0]
        kept.put(f"states-{number}", {STATES: output})

    return run


@torch.no_grad()
def _enter(blocks: Blocks, data: Iterable[Batch], kept: Activations) -> list[_Record]:
    """Run what lies before the blocks; return what they will be given, its tensors kept."""
    given: list[_Record] = []
    as_tuple: bool | None = None
    with _outside(blocks):
        for number, batch in enumerate(data):
            for form in (False, True) if as_tuple is None else (as_tuple,):
                record = _record(blocks, batch, as_tuple=form)
                if record is not None:
                    as_tuple = form
                    break
            else:
                raise ModelError(
                    f"{type(blocks.model).__name__}: found states that change between the layers,"
                    " expected them to be handed on; such a model is cut in memory alone"
                )
            kept.put(f"states-{number}", {STATES: record.tensors.pop(STATES)})
            kept.put(f"given-{number}", record.tensors)
            given.append(_Record(record.arguments, {}))
    return given


def _record(blocks: Blocks, batch: Batch, *, as_tuple: bool) -> _Record | None:
    """Return what one batch gives the blocks, None if they are not given each other's states."""
    record = _Record([], {})
    for block in blocks.layers:
        block.forward = _recorder(record, len(blocks.layers), as_tuple=as_tuple)
    try:
        blocks.model(**batch)
    except _Recorded:
        return record
    except _Changed:
        return None
    except (IndexError, TypeError, ValueError):
        if as_tuple:
            raise
        return None  # it may have taken the states for a tuple
    finally:
        for block in blocks.layers:
            del block.forward
    return None


def _recorder(record: _Record, last: int, *, as_tuple: bool) -> Callable[..., Any]:
    """Return a block's forward that notes its arguments, and hands its states on."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        states, *rest = args or (kwargs.pop(STATES),)
        if states is not record.tensors.setdefault(STATES, states):
            raise _Changed
        record.arguments.append((_emptied(tuple(rest), record), _emptied(kwargs, record)))
        if len(record.arguments) == last:
            raise _Recorded
        return (states, None) if as_tuple else states

    return forward


def _emptied(value: Any, record: _Record) -> Any:
    """Return arguments with a name in the place of every tensor, and note the tensors."""
    if isinstance(value, Tensor):
        if value is record.tensors[STATES]:
            raise _Changed  # what is given beside the states would have to change with them
        for name, known in record.tensors.items():
            if known is value:
                return _At(name)
        name = str(len(record.tensors))
        record.tensors[name] = value
        return _At(name)
    return _mapped(value, lambda each: _emptied(each, record))


def _filled(value: Any, table: Mapping[str, Tensor]) -> Any:
    """Return arguments with the tensors of the table in their places."""
    if isinstance(value, _At):
        return table[value.name]
    return _mapped(value, lambda each: _filled(each, table))


def _mapped(value: Any, act: Callable[[Any], Any]) -> Any:
    if type(value) is dict:
        return {key: act(each) for key, each in value.items()}
    if type(value) in {tuple, list}:
        return type(value)(act(each) for each in value)
    return value


@contextmanager
def _outside(blocks: Blocks) -> Iterator[None]:
    """Load the weights of what is not a block when it runs, until the block ends.

    Those beside the blocks come all at once: DeBERTa reads a table that never runs.
    """
    inside = re.compile(rf"{re.escape(blocks.path)}\.\d+\.")
    parent, _, _ = blocks.path.rpartition(".")
    owners: dict[str, dict[str, str]] = {}
    for name in blocks.places:
        if not inside.match(name):
            beside = not parent or name.startswith(f"{parent}.")
            owner = parent if beside else name.rpartition(".")[0]
            short = name.removeprefix(f"{owner}.") if owner else name
            owners.setdefault(owner, {})[short] = name
    used: set[str] = set()

    def hook(path: str) -> Callable[[nn.Module, Any], None]:
        def load(module: nn.Module, _: Any) -> None:
            if path not in used:
                used.add(path)
                _load(blocks, module, owners[path])

        return load

    modules = {path: blocks.model.get_submodule(path) for path in owners}
    handles = [each.register_forward_pre_hook(hook(path)) for path, each in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for path in used:
            _drop(modules[path])


def return_what_is_freed() -> None:
    """Have the C library give pieces of memory back to the system when they are freed.

    glibc begins with those from 128 KiB on and learns to keep ever larger ones, and the holes
    between them add up from block to block. Once it is told, it learns no more
    (`M_MMAP_THRESHOLD` in mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(-3, 1 << 17)


def write_around(source: Path, planned: PreTrainedModel, folder: Path) -> None:
    """Write the configuration, and copy what else belongs to the model."""
    for path in source.iterdir():
        index = path.name.endswith(".index.json") or path.name == MANIFEST
        if path.is_file() and path.suffix in AROUND and not index:
            copyfile(path, folder / path.name)
    planned.config.architectures = [type(planned).__name__]
    planned.config.save_pretrained(folder)
