"""How often the gate passes a model that loses exactly what the budget allows.

    python -m benchmarks.false_acceptance [--short]

The first table is exact: the probabilities of all outcomes that pass are summed, of the gate, of
Tango's test alone, and of the comparison of two scores; the worst share of discordant examples
counts. The second one is simulated: of 20 candidates, all of them at the budget, the best on one
set is judged on that set, or on another of the same size.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline import exact

CONFIDENCE: Final = 0.95
EXAMPLES: Final = (50, 75, 100, 150, 200, 268, 300, 500, 872, 1_000, 2_000, 3_000, 5_000, 10_000)
BUDGETS: Final = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05)
DISCORDANT: Final = 0.3
"""The largest share of examples that only one of the two models gets right."""
SHARES: Final = 60
"""How many shares of discordant examples are tried, from the budget on."""
CANDIDATES: Final = 20
REPETITIONS: Final = 20_000


@dataclass(frozen=True)
class Worst:
    """The largest probability of a pass at a true drop that equals the budget."""

    examples: int
    budget: float
    gate: float
    tango: float
    point: float


def worst(examples: int, budget: float) -> Worst:
    """Return the largest false acceptance over the shares of discordant examples."""
    gate = exact.accepted(examples, budget, CONFIDENCE)
    tango = exact.above(examples, budget, NormalDist().inv_cdf(CONFIDENCE))
    c = np.arange(examples + 1)
    point = np.minimum(np.floor(c + examples * budget + 1e-9).astype(int), examples - c)
    shares = np.geomspace(budget, DISCORDANT, SHARES)
    found = (
        max(exact.chance(region, budget, share) for share in shares)
        for region in (gate, tango, point)
    )
    return Worst(examples, budget, *found)


def chosen(
    examples: int, budget: float, discordant: float, repetitions: int = REPETITIONS
) -> tuple[float, float]:
    """Return how often the best of the candidates passes: where it was chosen, and elsewhere."""
    region = exact.accepted(examples, budget, CONFIDENCE)
    lost, won = (discordant + budget) / 2, (discordant - budget) / 2
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(
        examples, [lost, won, 1 - lost - won], (2, repetitions, CANDIDATES)
    )
    best = (drawn[0, :, :, 0] - drawn[0, :, :, 1]).argmin(axis=1)
    wrong, mended, _ = np.moveaxis(drawn[:, np.arange(repetitions), best], -1, 0)
    there, elsewhere = np.mean(wrong <= region[mended], axis=1)
    return float(there), float(elsewhere)


def rows(examples: Sequence[int]) -> Iterator[Worst]:
    """Yield the worst of every number of examples and budget."""
    for budget in BUDGETS:
        for count in examples:
            yield worst(count, budget)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--short", action="store_true", help="fewer numbers of examples")
    options = parser.parse_args()
    out = Console()
    found = list(rows(EXAMPLES[::4] if options.short else EXAMPLES))
    names = ("budget", "examples", "two scores", "Tango's test", "gate")
    exactly = Table(*names, box=None, title="largest false acceptance, exact")
    for row in found:
        numbers = (f"{x:.4f}" for x in (row.point, row.tango, row.gate))
        exactly.add_row(f"{row.budget:g}", f"{row.examples:,}", *numbers)
    out.print(exactly)
    for name in ("point", "tango", "gate"):
        largest = max(found, key=lambda row: getattr(row, name))
        out.print(
            f"largest of {name}: {getattr(largest, name):.4f}, {largest.examples} examples,"
            f" budget {largest.budget:g}"
        )
    names = ("budget", "examples", "discordant", "where it was chosen", "elsewhere")
    best = Table(*names, box=None, title=f"the best of {CANDIDATES} candidates, simulated")
    for count in (300, 872, 3_000):
        for discordant in (0.05, 0.2):
            shares = (f"{x:.4f}" for x in chosen(count, 0.01, discordant))
            best.add_row("0.01", f"{count:,}", f"{discordant:g}", *shares)
    out.print(best)


if __name__ == "__main__":
    main()
