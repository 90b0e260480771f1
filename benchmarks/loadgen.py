"""The same artifact driven by MLCommons' LoadGen: an independent check of what was measured.

LoadGen has its own clock, its own scenarios and its own rule for percentiles. It runs in the worker
that holds the artifact, so whatever goes wrong in it is the worker's end, which the parent sees. It
ends a run by our settings, not by those of a submission: nothing measured here is an MLPerf result.

https://github.com/mlcommons/inference/tree/master/loadgen
"""

import json
import tempfile
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import Unavailable
from benchmarks.worker import Arrays, Predictor

SCENARIOS: Final = {
    "single-stream": "SingleStream",
    "multi-stream": "MultiStream",
    "offline": "Offline",
    "server": "Server",
}
SAMPLES: Final = 16
"""In the library of queries, which are all the held batch."""


def available(scenario: str) -> None:
    """Make sure that LoadGen is installed, and has such a scenario.

    Raises:
        Unavailable: it is not, or has not.
    """
    if scenario not in SCENARIOS:
        raise Unavailable(
            f"--loadgen: found the scenario {scenario}, expected one of {', '.join(SCENARIOS)}"
        )
    if find_spec("mlperf_loadgen") is None:
        raise Unavailable(
            "--loadgen: mlcommons-loadgen is not installed; install the extra `mlperf`:"
            " pip install -e '.[mlperf]'"
        )


def drive(predictor: Predictor, inputs: Arrays, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what LoadGen measured of a predictor on one batch, its results by its own names.

    Args:
        predictor: of this process.
        inputs: a batch.
        settings: `scenario`, a key of `SCENARIOS`; `batch`, the inputs in it; `seconds` and
            `queries`, at least; of the scenario server `rate`, of queries a second.

    Raises:
        RuntimeError: the predictor failed.
    """
    library: Any = import_module("mlperf_loadgen")
    batch, failed = settings["batch"], list[Exception]()

    def issue(samples: Sequence[Any]) -> None:
        # LoadGen does not survive an error, and waits for ever for an answer that never comes.
        try:
            for _ in range(0, len(samples), batch):
                if not failed:
                    predictor(inputs)
        except Exception as error:  # noqa: BLE001 - of any runtime; raised below
            failed.append(error)
        library.QuerySamplesComplete([library.QuerySampleResponse(s.id, 0, 0) for s in samples])

    test = library.TestSettings()
    test.mode = library.TestMode.PerformanceOnly
    test.scenario = getattr(library.TestScenario, SCENARIOS[settings["scenario"]])
    test.min_duration_ms = round(settings["seconds"] * 1e3)
    test.min_query_count = settings["queries"]
    test.multi_stream_samples_per_query = batch
    test.server_target_qps = test.offline_expected_qps = settings["rate"]
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        logs = library.LogSettings()
        logs.log_output.outdir = folder
        logs.enable_trace = settings.get("trace", False)
        system = library.ConstructSUT(issue, lambda: None)
        samples = library.ConstructQSL(SAMPLES, SAMPLES, lambda _: None, lambda _: None)
        library.StartTestWithLogSettings(system, samples, test, logs, "")
        library.DestroyQSL(samples)
        library.DestroySUT(system)
        if failed:
            raise RuntimeError(f"LoadGen: the artifact failed: {failed[0]}") from failed[0]
        return _results(Path(folder)) | _traced(Path(folder))


def _results(folder: Path) -> dict[str, Any]:
    """Return what its detailed log says of the results."""
    found = {}
    for line in (folder / "mlperf_log_detail.txt").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "))
        if entry["key"].startswith(("result_", "early_stopping")):
            found[entry["key"]] = entry["value"]
    return found


def _traced(folder: Path) -> dict[str, list[int]]:
    """Return the latencies of all queries, if they were asked for."""
    latencies = []
    for line in (folder / "mlperf_log_trace.json").read_text(encoding="utf-8").splitlines():
        if '"complete_ns":' in line:  # not all of that file is JSON
            times = json.loads(line.rstrip(","))["args"]
            latencies.append(times["complete_ns"] - times["issue_start_ns"])
    return {"latencies_ns": latencies} if latencies else {}
