"""Models larger than memory: heads and neurons cut, and what read them repaired, block by block.

What `pruning.choose_and_cut` does with a model in memory, and the same result to rounding: scores
of all layers come first, then the choice over all of them, then each block is cut and repaired.
Criteria that look at data, and the repair, each take one pass over the blocks. Memory holds one
block in fp32, its second moments, and a batch's activations within it, or the largest other tensor
that runs before the blocks (the embedding table).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.accuracy import Track, silent
from benchmarks.data import DataError
from benchmarks.examples import Example, Window, padding
from pipeline import (
    blocks,
    calibration,
    candidates,
    checkpoint,
    pruning,
    sources,
    structure,
    tensors,
)
from pipeline.blocks import Blocks, Keeping, return_what_is_freed, write_around
from pipeline.calibration import Batch
from pipeline.checkpoint import ModelError
from pipeline.compensation import REPAIRS
from pipeline.criteria import CRITERIA, GRADIENT, MOMENTS
from pipeline.pruning import Choice
from pipeline.reading import RecipeError, unknown
from pipeline.store import publish
from pipeline.structure import Group, Kind

ALONE: Final = tuple(sorted(CRITERIA.keys() - GRADIENT))
"""The criteria that need no gradients."""


def prune_by_blocks(
    source: str | Path,
    folder: str | Path,
    *,
    heads: float = 0.0,
    neurons: float = 0.0,
    criterion: str = "activation",
    repair: str = "least-squares",
    per_layer: bool = False,
    multiple: int = 1,
    seed: int = 0,
    data: Callable[[], Iterable[Batch]] | None = None,
    activations: Keeping = "disk",
    track: Track = silent,
) -> Choice:
    """Write a model cut and repaired, without ever holding more than one of its blocks.

    It is computed in fp32, and written in the type of the source.

    Args:
        source: a folder with a model.
        folder: a new one, written as a whole or not at all; `from_pretrained` opens it.
        heads: share of all heads that goes.
        neurons: the same of FFN neurons.
        criterion: one of `ALONE`.
        repair: a key of `compensation.REPAIRS`, or `none`.
        per_layer: the same share of every layer, in place of the lowest scores over all.
        multiple: the number of neurons left in a layer is rounded to a multiple of it.
        seed: of the criterion `random`.
        data: gives the calibration batches, anew each time; needed by some criteria, and to repair.
        activations: where the states between blocks wait: on the `disk` of `folder`, or in memory.
        track: shows progress.

    Raises:
        FloatingPointError: an activation is not finite.
        ModelError: there is no such model, it cannot be cut, or not block by block; `folder` is
            there already.
        RecipeError: what is asked for cannot be done, or takes no unit.
        ValueError: there are too few calibration windows.
    """
    source, folder = Path(source), Path(folder)
    fractions: dict[Kind, float] = {"heads": heads, "neurons": neurons}
    _check(fractions, criterion, repair, multiple, data)
    if folder.exists():
        raise ModelError(f"{folder}: there already, expected a new folder")
    return_what_is_freed()
    this = blocks.open_blocks(source)
    groups = [g for g in structure.groups(this.model) if g.kept and fractions.get(g.kind)]
    try:
        pruning.refuse_repair(groups, repair)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    widest = max((len(g.kept) for g in groups if g.kind == "neurons"), default=multiple)
    if multiple > widest:
        raise RecipeError(
            f"multiple: found {multiple}, expected at most {widest}, the neurons of a layer"
        )
    choices: list[Choice] = []

    def readers(path: str) -> dict[str, nn.Module]:
        return {group.path: group.reader for group in _within(groups, path)}

    def make(unfinished: Path) -> None:
        states = unfinished / ".activations"
        kept = states if activations == "disk" else None
        walk = partial(blocks.walk, this, readers, activations=kept, track=track)
        known = pruning.gather(this.model, groups, criterion, lambda: (), seed=seed, total=0)
        needed = data if criterion in MOMENTS else None
        steps = walk(data=needed, what="scoring, block by block")
        scores = _scores(criterion, known, groups, steps)
        lowest = pruning.lowest_of(groups, scores, fractions, uniform=per_layer, multiple=multiple)
        if not any(map(len, lowest.values())):
            raise RecipeError(
                f"prune: found nothing to cut with heads: {heads:g}, neurons: {neurons:g}, expected"
                " a share that takes a unit; every layer keeps one"
            )
        removed = {g.path: [g.kept[at] for at in lowest[g.path].sort().values] for g in groups}
        planned = _planned(source, groups, lowest)
        needed = None if repair == "none" else data
        steps = walk(data=needed, what="cutting, block by block")
        repairs = _write(this, planned, groups, lowest, steps, repair=repair, folder=unfinished)
        rmtree(states, ignore_errors=True)
        write_around(source, planned, unfinished)
        listed = {path: found.tolist() for path, found in scores.items()}
        choices.append(Choice(listed, removed, repairs, {g.path: list(g.kept) for g in groups}))

    publish(make, folder, {"source": str(source), "step": "prune"})
    return choices[0]


def _check(
    fractions: Mapping[Kind, float],
    criterion: str,
    repair: str,
    multiple: int,
    data: object,
) -> None:
    """Raise RecipeError if what is asked for cannot be done."""
    for name, share in fractions.items():
        if not 0 <= share < 1:
            raise RecipeError(f"{name}: found {share:g}, expected at least 0 and less than 1")
    if not any(fractions.values()):
        raise RecipeError("prune: expected a share of heads or neurons above 0")
    if criterion not in ALONE:
        raise RecipeError(
            f"criterion: {unknown(criterion, ALONE)}: gradients, and what learns, need the whole"
            " model in memory"
        )
    if repair not in (known := sorted([*REPAIRS, "none"])):
        raise RecipeError(f"repair: {unknown(repair, known)}")
    if multiple < 1:
        raise RecipeError(f"multiple: found {multiple}, expected at least 1")
    if data is None and (criterion in MOMENTS or repair != "none"):
        raise RecipeError(
            f"data: found none, expected text to calibrate on: criterion {criterion} and repair"
            f" {repair} need it; magnitude and random without a repair do not"
        )


Steps = Iterator[tuple[str, dict[str, calibration.Moments]]]
"""What `blocks.walk` yields."""


def _within(groups: Iterable[Group], path: str) -> list[Group]:
    """Return the groups of the block at a path."""
    return [group for group in groups if f"{group.path}.".startswith(f"{path}.")]


@torch.no_grad()
def _scores(
    criterion: str, known: pruning.Known, groups: Sequence[Group], steps: Steps
) -> dict[str, Tensor]:
    """Return the scores `(U,)` of each group's units by its path."""
    return {
        group.path: CRITERIA[criterion](known(group, seen.get(group.path)))
        for path, seen in steps
        for group in _within(groups, path)
    }


def _planned(
    source: Path, groups: Iterable[Group], lowest: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Return the cut model without weights: what shapes its tensors will have, and its record."""
    planned = checkpoint.without_weights(source)
    there = {(g.path, g.kind): g for g in structure.groups(planned)}
    for group in groups:
        if len(lowest[group.path]):
            places = pruning.others(lowest[group.path], len(group.kept))
            pruning.cut_and_write(planned, there[group.path, group.kind], places, None)
    return planned


@torch.no_grad()
def _write(
    this: Blocks,
    planned: PreTrainedModel,
    groups: Sequence[Group],
    lowest: Mapping[str, Tensor],
    steps: Steps,
    *,
    repair: str,
    folder: Path,
) -> dict[str, tuple[float, float]]:
    """Write the tensors of the cut model; return the errors before and after the repairs."""
    shapes = planned.state_dict()
    layout = {
        written: torch.empty(shapes[name].shape, dtype=this.places[name].dtype, device="meta")
        for name, written in this.saved.items()
    }
    repairs: dict[str, tuple[float, float]] = {}
    left = dict(this.saved)
    with tensors.Writer(folder, layout) as writer:
        for path, seen in steps:
            for group in _within(groups, path):
                if not len(lowest[group.path]):
                    continue
                places, weight = pruning.others(lowest[group.path], len(group.kept)), None
                if repair != "none":
                    mended = pruning.repaired(group, seen.pop(group.path), places, repair)
                    weight = mended.weight.float()
                    repairs[group.path] = mended.error_before, mended.error_after
                pruning.cut_and_write(this.model, group, places, weight)
            for name, tensor in this.model.get_submodule(path).state_dict().items():
                writer.write(left.pop(f"{path}.{name}"), [tensor.reshape(-1)])
        for name, written in left.items():
            writer.write(written, tensors.chunks(this.places[name]))
    return repairs


def text_batches(
    source: str | Path, text: Path, *, max_length: int, batch: int
) -> Callable[[], Iterator[Batch]]:
    """Return what gives the lines of a text file as batches for a model, anew each time.

    Raises:
        DataError: there is no text in the file, or too little.
        ModelError: the model has no tokenizer or another model's, or fewer positions.
    """
    config: Any = checkpoint.read_config(source)
    most = getattr(config, "max_position_embeddings", None) or max_length
    if max_length > most:
        raise ModelError(f"--max-length: {source}: found {max_length}, expected at most {most}")
    tokenizer = sources.processor(str(source), "AutoTokenizer", None)
    lines = candidates.texts(text)
    if len(lines) < calibration.HELD_OUT_EVERY:
        raise DataError(
            f"--text: {text}: found {len(lines)} lines, expected at least"
            f" {calibration.HELD_OUT_EVERY}, of which one is held out"
        )
    encoded = tokenizer(lines, truncation=True, max_length=max_length)
    largest = max(max(ids, default=0) for ids in encoded["input_ids"])
    if largest >= (rows := getattr(config, "vocab_size", None) or largest + 1):
        raise ModelError(
            f"{source}: found token {largest}, expected less than {rows}, the rows of the embedding"
            " table; the tokenizer is another model's"
        )
    examples = []
    for at in range(len(lines)):
        inputs = {name: np.asarray(encoded[name][at], np.int64) for name in encoded}
        examples.append(Example(str(at), (Window(inputs, {}),), {}))
    return partial(calibration.batches, examples, padding(tokenizer), batch)
