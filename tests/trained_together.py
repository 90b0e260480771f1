"""Trains a tiny pruned model in several ways, by as many processes as this is started in.

    torchrun --nproc-per-node 2 tests/trained_together.py FOLDER WAY...

`conftest.write_model` left models and tokenizers in FOLDER: a `classifier` that is a BERT, a
`writer` that is a Llama. The weights go there, a file a way. All is in fp64: what is left of a
difference is then no rounding. A way is what is beside the plain training, with "-sharded" for
weights that are shared out.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))

from conftest import sentences

from benchmarks.examples import padding
from benchmarks.tasks import TASKS
from pipeline import from_pretrained, masks, processes, prune_heads, prune_neurons, structure
from pipeline.distillation import Teacher
from pipeline.finetuning import finetune

ROWS = [{"text": text, "label": label, "id": "0" * 64} for text, label in sentences(60)]
KILLED_AT = 5


def pruned(folder: Path) -> PreTrainedModel:
    """Return the model with a width of its own in every layer, two of them 0."""
    model = from_pretrained(folder).double()
    prune_heads(model, {0: [0], 1: [0, 1, 2, 3]})
    prune_neurons(model, {1: range(7), 2: range(48)})
    return model


def interrupted(steps: Iterable[int], _: str, __: int) -> Iterator[int]:
    """Show progress until the training is killed."""
    for step in steps:
        if step == KILLED_AT:
            raise KeyboardInterrupt
        yield step


def trained(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the weights after a training, and what a learner learnt."""
    way = name.removesuffix("-sharded")
    os.environ["ACCELERATE_USE_FSDP"] = str(name != way)
    folder, kind = folder / "classifier", "text-classification"
    if way == "language":  # its losses are means over tokens
        folder, kind = folder.with_name("writer"), "causal-lm"
    model = pruned(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = TASKS[kind].encode(ROWS, tokenizer, ("0", "1"), 16)
    setting = examples, padding(tokenizer)
    options = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 15}
    learnt = {}
    if way in masks.LEARNERS:
        groups = [g for g in structure.groups(model) if g.kind in {"heads", "neurons"} and g.kept]
        learner = masks.LEARNERS[way](groups, {"heads": 0.5, "neurons": 0.25})
        options["learner"], learnt = learner, learner.tensors()
    elif way in {"teacher", "language"}:
        options["teacher"] = Teacher(from_pretrained(folder).double(), 2.0, 0.3, 0.2)
        options["freeze_embeddings"] = True
    elif way == "patience":  # the weights of the second of five looks are kept
        scores = iter([0.1, 0.5, 0.4, 0.3, 0.2])
        options |= {"evaluate": lambda: next(scores), "evaluations": 5}
    elif way == "killed":
        options |= {"checkpoint": folder / f"unfinished.{name}", "save_seconds": 0.0}
        with contextlib.suppress(KeyboardInterrupt):
            finetune(model, *setting, track=interrupted, **options)
        model = pruned(folder)
    finetune(model, *setting, **options)
    return {n: t.detach().contiguous() for n, t in (model.state_dict() | learnt).items()}


def main() -> None:
    """Write what each way came to."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    processes.start("cpu")
    for name in sys.argv[2:]:
        found = trained(folder, name)
        if processes.leads():
            save_file(found, folder / name)


if __name__ == "__main__":
    main()
