"""The figures of a measurement, as reports hold them: what is known of a latency, and of a ratio.

Imports nothing, so that a report can be read where nothing is measured. speed.py makes them.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ratio:
    """How many times faster, with its interval at 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Percentiles:
    """Latency percentiles in milliseconds; None where the samples are too few for an upper bound.

    `intervals` are two-sided at 95 %, by the names of the percentiles, and an end is None that the
    samples do not reach. They are exact for samples that do not depend on each other;
    `effective_samples` says of how many such the samples are worth. `quantiles` are those at 0, 5,
    ..., 100 %.
    """

    p50: float
    p90: float | None
    p95: float | None
    p99: float | None
    samples: int
    effective_samples: float | None = None
    intervals: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    quantiles: tuple[float, ...] = ()
