"""What others make of the same model, beside an artifact of secateur: speed and accuracy.

Each peer is made by its own tools, as their documentation advises: PyTorch, torch.compile, ONNX
Runtime's optimizer and dynamic quantization, OpenVINO, NNCF with the calibration split. All take
turns, in a process each, on the loads of the recipe, and all are judged on its gate split. What is
not installed is left out, and said to be.

    python -m benchmarks.peers_compared RECIPE ARTIFACT OUTPUT

RECIPE has the uncut model as its `model`, and task, data and loads; its steps are not run.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from benchmarks import machine, metrics
from benchmarks.accuracy import evaluate, silent
from benchmarks.examples import collate
from benchmarks.outcomes import fidelity
from benchmarks.worker import Arrays, Predictor, Worker
from exporters import onnx
from pipeline import candidates
from pipeline.bench import compare
from pipeline.candidates import Candidate
from pipeline.checkpoint import from_pretrained, open_model
from pipeline.checkpoint import predictor as torch_predictor
from pipeline.recipe import Recipe
from pipeline.turns import Settings
from pipeline.work import Work

NAME: Final = "benchmarks.peers_compared"


def open_compiled(folder: Path, *, device: str, threads: int) -> Predictor:
    """Return a predictor of a torch folder, compiled by torch.compile with dynamic shapes."""
    import torch

    model = open_model(folder, device=device, threads=threads)
    model.forward = torch.compile(model.forward, dynamic=True)
    return torch_predictor(model)


def open_openvino(path: Path, *, device: str, threads: int) -> Predictor:
    """Return a predictor of an OpenVINO model."""
    import openvino

    del device  # see main
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    names = {name for port in compiled.inputs for name in port.names}
    outputs = [next(iter(port.names)) for port in compiled.outputs]

    def predict(arrays: Arrays) -> Arrays:
        found = compiled({name: array for name, array in arrays.items() if name in names})
        return {name: found[at] for at, name in enumerate(outputs)}

    return predict


def plain(work: Work, folder: Path) -> Path:
    """Export the unpruned model as transformers does, with no operator of a runtime's own."""
    path = folder / onnx.MODEL
    path.parent.mkdir(parents=True)
    windows = [window.inputs for example in work.examples("gate")[:3] for window in example.windows]
    samples = [collate(windows, work.padding), collate(windows[:1], work.padding)]
    model = from_pretrained(work.source)
    onnx.export(model, samples, axes=work.task.axes, path=path, fuse_for=None)
    return path


def optimized(work: Work, graph: Path, folder: Path) -> Path:
    """Return the graph as ONNX Runtime's own optimizer for transformers fuses it."""
    from onnxruntime.transformers import optimizer

    config, path = work.config, folder / "model.onnx"
    folder.mkdir()
    fused = optimizer.optimize_model(
        str(graph),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
    )
    fused.save_model_to_file(str(path))
    return path


def quantized(graph: Path, folder: Path) -> Path:
    """Return the graph as ONNX Runtime quantizes it dynamically, by column.

    In 7 bits where 8 would overflow, as its documentation advises.
    """
    from onnx import load
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path, narrow = folder / "model.onnx", machine.describe().saturates
    folder.mkdir()
    model = load(graph)
    weights = {each.name for each in model.graph.initializer}
    shapes = [each for each in model.graph.value_info if each.name not in weights]
    del model.graph.value_info[:]  # those of the weights are no longer true
    model.graph.value_info.extend(shapes)
    int8 = QuantType.QInt8
    quantize_dynamic(model, path, weight_type=int8, per_channel=True, reduce_range=narrow)
    return path


def openvino(graph: Path, folder: Path) -> Path:
    """Return OpenVINO's model of the graph."""
    import openvino as ov

    folder.mkdir()
    ov.save_model(ov.convert_model(str(graph)), folder / "model.xml", compress_to_fp16=False)
    return folder / "model.xml"


def nncf(work: Work, model: Path, folder: Path) -> Path:
    """Return OpenVINO's model as NNCF quantizes it, calibrated on the calibration split."""
    import nncf as library
    import openvino as ov

    folder.mkdir()
    network = ov.Core().read_model(model)
    names = {name for port in network.inputs for name in port.names}
    windows = [w.inputs for example in work.examples("calibration") for w in example.windows]
    batches = [collate([window], work.padding) for window in windows[:300]]
    data = library.Dataset([{k: v for k, v in batch.items() if k in names} for batch in batches])
    small = library.quantize(network, data, model_type=library.ModelType.TRANSFORMER)
    ov.save_model(small, folder / "model.xml")
    return folder / "model.xml"


def peers(work: Work, folder: Path) -> dict[str, Callable[[], Candidate]]:
    """Return what makes each peer, in this order."""
    source = Path(work.source)
    torch = candidates.find(source, "cpu")
    graph = plain(work, folder / "plain")

    def of_onnx(name: str, path: Path) -> Candidate:
        opener = "exporters.onnx:predictor"
        return Candidate(name, "onnxruntime", opener, path, source, (path,), path)

    def of_openvino(name: str, path: Path) -> Candidate:
        files = (path, path.with_suffix(".bin"))
        return Candidate(name, "openvino", f"{NAME}:open_openvino", path, source, files)

    return {
        "torch": lambda: torch,
        "torch.compile": lambda: replace(torch, opener=f"{NAME}:open_compiled"),
        "ONNX Runtime": lambda: of_onnx(
            "ONNX Runtime", optimized(work, graph, folder / "optimized")
        ),
        "ONNX Runtime int8": lambda: of_onnx(
            "ONNX Runtime int8",
            quantized(folder / "optimized" / "model.onnx", folder / "quantized"),
        ),
        "OpenVINO": lambda: of_openvino("OpenVINO", openvino(graph, folder / "openvino")),
        "OpenVINO int8": lambda: of_openvino(
            "OpenVINO int8", nncf(work, folder / "openvino" / "model.xml", folder / "nncf")
        ),
    }


NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "OpenVINO": ("openvino",),
    "OpenVINO int8": ("openvino", "nncf"),
}


def judged(work: Work, candidate: Candidate) -> Any:
    """Return the outcomes of a candidate on the gate split."""
    target = work.recipe.target
    with Worker(
        candidate.opener, candidate.source, device=target.device, threads=work.threads
    ) as worker:
        return evaluate(worker, work.task, work.examples("gate"), work.padding)


def main() -> None:
    """Make all, time them in turns, judge them, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("artifact", type=Path, help="of secateur")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--seconds", type=float, default=120.0, help="a load, at most")
    options = parser.parse_args()
    say = Console(highlight=False, soft_wrap=True).print
    recipe = Recipe.from_yaml(options.recipe)
    if recipe.target.device != "cpu":
        parser.error(
            f"target.device: found {recipe.target.device}, expected cpu, where all can run"
        )
    options.output.mkdir(parents=True)
    work = Work(recipe, options.output / "work", fresh=False, track=silent)
    found = []
    for name, make in peers(work, options.output / "peers").items():
        if missing := [each for each in NEEDED.get(name, ()) if find_spec(each) is None]:
            say(f"{name}: left out, {' and '.join(missing)} not installed")
        else:
            found.append(replace(make(), name=name))
    found.append(replace(candidates.find(options.artifact, "cpu"), name="secateur"))
    outcomes = [judged(work, each) for each in found]
    settings = Settings(
        loads=tuple((load.batch, load.sequence) for load in recipe.target.loads),
        threads=work.threads,
        seconds=options.seconds,
        precision=0.01,
    )
    measured = compare(found, settings)
    (options.output / "peers.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
    metric = metrics.METRICS[work.metric]
    right = (lambda c: np.asarray(metric.function(c)) > 0) if metric.kind == "binary" else None
    shapes = [f"{batch}x{length}" for batch, length in settings.loads]
    header = ["", work.metric, "flips", "MB", "peak MB"]
    header += [f"ms {shape}" for shape in shapes] + [f"speed {shape}" for shape in shapes]
    rows = [header, ["---"] * len(header)]
    for artifact, outcome in zip(measured["artifacts"], outcomes, strict=True):
        same = fidelity(outcomes[0], outcome, right)
        results = artifact["results"]
        rows.append(
            [
                artifact["name"],
                f"{metrics.score(work.metric, outcome.columns):.4f}",
                "-" if same.flips is None else str(same.flips),
                f"{artifact['size_bytes'] / 1e6:.1f}",
                f"{artifact['peak_rss_bytes'] / 1e6:.0f}",
                *(f"{result['latency_ms']['p50']:.1f}" for result in results),
                *("{value:.2f} ({low:.2f} to {high:.2f})".format(**r["ratio"]) for r in results),
            ]
        )
    for row in rows:
        say(f"| {' | '.join(row)} |")
    shutil.rmtree(options.output / "work")


if __name__ == "__main__":
    main()
