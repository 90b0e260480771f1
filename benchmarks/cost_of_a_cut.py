"""What it costs to cut a model of a billion parameters: time and memory, beside a plain copy.

    python -m benchmarks.cost_of_a_cut [FOLDER]

Writes a Llama with random bf16 weights, then, each in a fresh process and in turns (A B B A):
loads, cuts a quarter of all heads and neurons, and saves it; or loads and saves it as it is.
Prints medians: seconds, and by how much the peak of resident memory (`VmHWM`) lies above what the
imports took, as a multiple of the file; for the cut, also the ratio of both to the copy's.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import peak_rss_bytes

ROUNDS = 2
SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 64000,
}


def write(folder: Path) -> None:
    """Write the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    model.save_pretrained(folder)


def work(source: Path, target: Path, what: str) -> None:
    """Load, cut if asked to, save; print what it took as JSON."""
    from pipeline import from_pretrained, prune_heads, prune_neurons, save_pretrained, units

    floor = peak_rss_bytes()
    began = time.perf_counter()
    model = from_pretrained(source)
    loaded = time.perf_counter()
    if what == "cut":
        found = units(model)
        prune_heads(model, {path: range(0, n, 4) for path, n in found.heads.items()})
        prune_neurons(model, {path: range(0, n, 4) for path, n in found.neurons.items()})
    cut = time.perf_counter()
    save_pretrained(model, target)
    saved = time.perf_counter()
    seconds = {"load": loaded - began, "cut": cut - loaded, "save": saved - cut}
    print(json.dumps({"seconds": seconds, "floor": floor, "peak": peak_rss_bytes()}))  # noqa: T201


def main() -> None:
    """Measure in turns, and print."""
    if len(sys.argv) > 2:  # noqa: PLR2004 - a child: source, target, what
        work(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
        return
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        source = Path(folder, "model")
        write(source)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        taken: dict[str, list[dict[str, float]]] = {"copy": [], "cut": []}
        for turn in range(ROUNDS):
            for what in sorted(taken, reverse=bool(turn % 2)):
                found = _child(source, Path(folder, what), what)
                taken[what].append(found["seconds"] | {"peak": found["peak"] - found["floor"]})
        print(f"file: {size / 1e9:.2f} GB")  # noqa: T201
        medians = {
            what: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            for what, runs in taken.items()
        }
        totals = {
            what: sum(value for name, value in parts.items() if name != "peak")
            for what, parts in medians.items()
        }
        for what, parts in medians.items():
            text = ", ".join(f"{n} {value:.1f} s" for n, value in parts.items() if n != "peak")
            peak = f"peak {parts['peak'] / size:.2f}x the file"
            print(f"{what}: {text}; {totals[what]:.1f} s, {peak}")  # noqa: T201
        time_ratio = totals["cut"] / totals["copy"]
        peak_ratio = medians["cut"]["peak"] / medians["copy"]["peak"]
        print(f"cut to copy: {time_ratio:.2f}x the time, {peak_ratio:.2f}x the peak")  # noqa: T201


def _child(source: Path, target: Path, what: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.cost_of_a_cut", str(source), str(target), what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
