"""A build that shows how far it is, and that an interrupt ends.

The library builds in one call, which takes seconds to minutes and tells its steps to a monitor. It
is made in a thread, so that an interrupt comes through; the monitor then says no to the next step.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import Event
from typing import Any

Track = Callable[[Iterable[int], str, int], Iterable[int]]
"""Shows how far an iteration is, of which it is given the name and the length."""
Steps = Queue[int | None]
"""The number of steps, then every step that is done, then None."""


def silent(items: Iterable[int], what: str, total: int) -> Iterable[int]:
    """Show nothing."""
    del what, total
    return items


def built(trt: Any, builder: Any, network: Any, config: Any, track: Track) -> Any:
    """Return the plan of a network, or None if it cannot be built."""
    steps: Steps = Queue()
    stop = Event()
    monitor = _monitor(trt, steps, stop)
    config.progress_monitor = monitor
    with ThreadPoolExecutor(1) as thread:
        plan = thread.submit(builder.build_serialized_network, network, config)
        plan.add_done_callback(lambda _: steps.put(None))
        try:
            count = steps.get()  # None if it ended before it began
            if count is not None:
                for _ in track(_done(steps, count), "building the engine", count):
                    pass
        except BaseException:
            stop.set()
            raise
    return plan.result()


def _done(steps: Steps, count: int) -> Iterator[int]:
    told = 0
    for step in iter(steps.get, None):
        told += 1
        yield step
    yield from range(told, count)  # the last one is not always told


def _monitor(trt: Any, steps: Steps, stop: Event) -> Any:
    """Return what the library tells its steps, of which those of the outermost phase are kept."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: str | None = None

        def phase_start(self, phase: str, parent: str | None, count: int) -> None:
            if parent is None and self.outermost is None:
                self.outermost = phase
                steps.put(count)

        def phase_finish(self, phase: str) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.outermost:
                steps.put(step)
            return not stop.is_set()

    return Monitor()
