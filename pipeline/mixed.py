"""Mixed precision by measured sensitivity: the layers that lose most are left as they are.

Each layer is quantized alone, and what that does is measured; then layers are left out, worst
first, until what the rest of them loses is allowed.

Cost: one quantization and one measurement a layer, and one for each that is left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.accuracy import Track, silent


@dataclass(frozen=True)
class Loss:
    """What a quantized model lost: `score` of the metric, and `divergence` that ranks finer."""

    score: float
    divergence: float


class OutOfReach(ValueError):
    """Whatever is left out, more is lost than is allowed."""


def leave_out(
    layers: Sequence[str],
    measure: Callable[[frozenset[str]], Loss],
    allowed: float,
    track: Track = silent,
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Return the layers to leave as they are, worst first, and the divergence of each alone.

    Args:
        layers: what can be left out.
        measure: tells what is lost if these layers are left out.
        allowed: the largest loss of the score.
        track: shows progress.

    Raises:
        OutOfReach: with one layer quantized the loss is still larger.
    """
    if measure(frozenset()).score <= allowed:
        return (), {}
    alone = {
        layer: measure(frozenset(layers) - {layer}).divergence
        for layer in track(layers, "measuring layers", len(layers))
    }
    worst_first = sorted(layers, key=lambda layer: alone[layer], reverse=True)
    best = float("inf")
    for count in range(1, len(layers)):
        left = tuple(worst_first[:count])
        lost = measure(frozenset(left)).score
        best = min(best, lost)
        if lost <= allowed:
            return left, alone
    raise OutOfReach(
        f"found a loss of {best:.4g} at least, whatever is left out, expected at most"
        f" {allowed:.4g}; choose another method or a larger limit"
    )
