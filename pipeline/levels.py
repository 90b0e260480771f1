"""The levels of a group: fewer and fewer units down to none, each with its reader repaired.

What a level loses is foretold from the calibration data: mean_n <dL_n/dW, W' - W>^2, for the loss
L_n of a window and what the reader W becomes, W', repaired. It is the empirical Fisher information
in the direction of the change, without the terms between groups; where nothing is repaired, it is
that of masks on the units that go (Kwon et al. 2022, https://arxiv.org/abs/2204.09656).

L levels of a group.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.accuracy import Track
from pipeline import calibration, pruning
from pipeline.allocation import Floats
from pipeline.calibration import Batch
from pipeline.criteria import CRITERIA, SWAPS, Evidence
from pipeline.structure import Group

LEVELS: Final = 12
"""A group has so many levels at most, beside that of all its units."""
CHANGED_BYTES: Final = 1 << 30
"""Changes of readers of so many bytes are held at once, or those of one if they are larger."""
INDEX: Final = "levels.json"
"""Beside the readers: everything else that is known of the levels."""


@dataclass(frozen=True)
class Level:
    """Places that stay, and the relative errors of the reader on held-out data.

    The reader `(O, K)` itself waits in a file: those of all levels are several times the model.
    """

    places: Tensor
    file: Path
    unrepaired: float
    error: float

    def weight(self) -> Tensor:
        """Return the reader `(O, K)`, its bias the last column if it has one."""
        return load_file(self.file)["weight"]

    def masked(self, group: Group) -> Tensor:
        """Return the reader at this level as wide as it is now, of zeros for what is gone."""
        masked = torch.zeros_like(pruning.reader(group))
        masked[:, pruning.columns(group, self.places)] = self.weight().to(masked.dtype)
        return masked

    def change(self, group: Group) -> Tensor:
        """Return what is added to the reader, as wide as it is now, to come to this level."""
        return self.masked(group).float() - pruning.reader(group).float()


def counts(group: Group, multiple: int) -> list[int]:
    """Return how many units a group has at its levels, all of them first, none last."""
    whole = len(group.kept)
    step = multiple if group.kind == "neurons" else 1
    shares = np.linspace(1, 0, min(LEVELS, whole) + 1)
    rounded = {min(whole, round(share * whole / step) * step) for share in shares}
    return sorted({whole, *rounded, 0})[::-1]


@dataclass(frozen=True)
class Levels:
    """Of all groups: the scores of their units `(U,)`, their levels, and what each loses `(L,)`."""

    scores: Sequence[Tensor]
    levels: Sequence[Sequence[Level]]
    errors: Sequence[Floats]


def make(
    model: PreTrainedModel,
    groups: Sequence[Group],
    wanted: Sequence[Sequence[int]],
    folder: Path,
    *,
    criterion: str,
    repair: str,
    seed: int,
    data: Callable[[], Iterable[Batch]],
    total: int,
    track: Track,
) -> None:
    """Write the levels of groups into a folder.

    Args:
        model: as it is.
        groups: of it.
        wanted: of each group, how many units its levels have.
        folder: where the readers of all levels are written.
        criterion: the order in which a group's units go.
        repair: a key of `compensation.REPAIRS`, or `none`.
        seed: of the criterion `random`.
        data: gives the calibration batches with labels, anew each time; `total` of them.
        total: number of batches.
        track: shows progress.
    """
    known = pruning.gather(model, groups, criterion, data, seed=seed, total=total, track=track)
    moments = pruning.second_moments(model, groups, data, total=total, track=track)
    scores: list[Tensor] = []
    found: list[list[Level]] = []
    both = zip(moments, wanted, strict=True)
    for (group, seen), of_group in track(both, "repairing levels", len(groups)):
        evidence = known(group, seen)
        scores.append(CRITERIA[criterion](evidence))
        files = [folder / f"{len(found)}-{count}" for count in of_group]
        gone = _gone(criterion, evidence, scores[-1], of_group)
        found.append(
            [
                _level(group, places, seen, repair=repair, file=file)
                for places, file in zip(gone, files, strict=True)
            ]
        )
    lost = errors(model, groups, found, data, total=total, track=track)
    index = [
        {
            "scores": of_units.tolist(),
            "errors": of_levels.tolist(),
            "levels": [_described(level) for level in of_group],
        }
        for of_units, of_levels, of_group in zip(scores, lost, found, strict=True)
    ]
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def read(folder: Path) -> Levels:
    """Return the levels that `make` wrote."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return Levels(
        [torch.tensor(group["scores"], dtype=torch.float64) for group in index],
        [[_level_of(folder, level) for level in group["levels"]] for group in index],
        [np.array(group["errors"]) for group in index],
    )


def _described(level: Level) -> dict[str, Any]:
    return {
        "places": level.places.tolist(),
        "file": level.file.name,
        "unrepaired": level.unrepaired,
        "error": level.error,
    }


def _level_of(folder: Path, level: dict[str, Any]) -> Level:
    places = torch.tensor(level["places"], dtype=torch.long)
    return Level(places, folder / level["file"], level["unrepaired"], level["error"])


def errors(
    model: PreTrainedModel,
    groups: Sequence[Group],
    levels: Sequence[Sequence[Level]],
    data: Callable[[], Iterable[Batch]],
    *,
    total: int,
    track: Track,
) -> list[Floats]:
    """Return what the levels of each group lose `(L,)`, never less with fewer units.

    A pass over the data serves as many groups as `CHANGED_BYTES` hold.
    """
    lost: list[Floats] = []
    both = list(zip(groups, levels, strict=True))
    sizes = [4 * len(of_group) * pruning.reader(group).numel() for group, of_group in both]
    for part in pruning.in_parts(both, sizes, CHANGED_BYTES):
        readers = {group.path: group.reader for group, _ in part}
        changes = {
            group.path: torch.stack([level.change(group) for level in of_group])
            for group, of_group in part
        }
        found = calibration.change_gradients(
            model, readers, changes, data(), total=total, track=track
        )
        for path in readers:
            squared = found[path].double().square().mean(0).numpy()
            lost.append(np.maximum.accumulate(squared))
    return lost


def _gone(
    criterion: str, evidence: Evidence, scores: Tensor, wanted: Sequence[int]
) -> Iterator[Tensor]:
    """Yield the places that go if so many units are to stay."""
    order = scores.argsort(stable=True)
    for count in wanted:
        lowest = order[: len(scores) - count]
        yield SWAPS[criterion](evidence, lowest) if criterion in SWAPS else lowest


def _level(
    group: Group, gone: Tensor, seen: calibration.Moments, *, repair: str, file: Path
) -> Level:
    """Return a group without the units at the places `gone`; its reader goes into the file."""
    places = pruning.others(gone, len(group.kept))
    mended = pruning.repaired(group, seen, places, repair)
    weight = pruning.reader(group).double()
    size = weight.shape[1]
    energy = max(float(((weight @ seen.held_out[:size, :size]) * weight).sum()), 1e-30)
    before, after = mended.error_before / energy, mended.error_after / energy
    save_file({"weight": mended.weight.float().contiguous()}, file)
    return Level(places, file, before, after)
