"""What the steps of one run share: the recipe, the model's source, the data, the store.

Everything that a recipe says of model and data is checked here, before the first step: files,
columns, labels, lengths, and whether the model fits the task.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from benchmarks import machine
from benchmarks.accuracy import Track, once
from benchmarks.data import SLICE, WANTED, Row
from benchmarks.data import load as load_data
from benchmarks.examples import Array, Arrays, Example, collate, padding, with_decoder_inputs
from benchmarks.machine import Unavailable
from benchmarks.tasks import TASKS, label_names
from pipeline import (
    checkpoint,
    depth,
    native,
    parts,
    processes,
    pruning,
    selfcheck,
    sources,
    structure,
)
from pipeline.architectures import ARCHITECTURES
from pipeline.checkpoint import ModelError
from pipeline.manifest import fingerprint
from pipeline.recipe import Recipe
from pipeline.settings import Prune
from pipeline.store import Entry, Store

# What these files say cannot change a stage's content.
_WITHOUT_EFFECT: Final = frozenset(
    {
        "__main__.py",
        "arguments.py",
        "artifact.py",
        "bench.py",
        "blocks.py",
        "budget.py",
        "candidates.py",
        "card.py",
        "cells.py",
        "ci.py",
        "cli.py",
        "collection.py",
        "comparison.py",
        "conversion.py",
        "doctor.py",
        "drawing.py",
        "evidence.py",
        "exact.py",
        "executors.py",
        "front.py",
        "gate.py",
        "hub.py",
        "infer.py",
        "intervals.py",
        "inventory.py",
        "judging.py",
        "leash.py",
        "ledger.py",
        "markup.py",
        "mistakes.py",
        "out_of_core.py",
        "page.py",
        "planning.py",
        "plots.py",
        "power.py",
        "proposals.py",
        "quality.py",
        "rebuilding.py",
        "recipe.py",
        "register_secateur.py",
        "report.py",
        "reservation.py",
        "runner.py",
        "search.py",
        "search_page.py",
        "search_report.py",
        "signing.py",
        "space.py",
        "statuses.py",
        "sweep.py",
        "sweeping.py",
        "tables.py",
        "tensors.py",
        "terminal.py",
        "timed_generation.py",
        "turns.py",
        "verification.py",
    }
)


@dataclass(frozen=True)
class Artifact:
    """A stage's folder, and what is known of it without measuring."""

    name: str
    step: dict[str, Any] | None
    format: str
    entry: Entry
    graph: Entry | None = None
    """Of an engine: the ONNX file that it was built from."""


class Work:
    """What the steps of one run share: recipe, data, processor, store."""

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        fresh: bool,
        track: Track,
        store: Path | None = None,
    ) -> None:
        self.recipe = recipe
        self.track = track
        self.task = TASKS[recipe.task.kind]
        self.metric = recipe.task.metric or self.task.metrics[0]
        self.machine = machine.describe()
        self.threads = recipe.target.threads or machine.usable_cores()
        if self.threads > machine.usable_cores():
            raise Unavailable(
                f"target.threads: found {self.threads}, expected at most {machine.usable_cores()},"
                " the cores that are usable here"
            )
        self.code = _code()
        processes.start(recipe.target.device)
        torch.set_num_threads(max(1, self.threads // processes.beside()))

        self.source = sources.resolve(recipe.model.source)
        revision = recipe.model.revision
        self.config = checkpoint.read_config(self.source, revision)
        if getattr(self.config, "quantization_config", None) is not None:
            raise ModelError(
                f"{recipe.model.source}: found quantized weights, expected floating point; name the"
                " model that they were made of"
            )
        self.kind = checkpoint.model_class(self.source, self.config, self.task.auto_class)
        self.processor = sources.processor(self.source, self.task.processor, revision)
        self.padding = padding(self.processor)
        self._check_family()
        self._check_lengths()
        read = partial(
            load_data,
            recipe.task.data,
            subset=recipe.task.subset,
            splits=recipe.task.splits.model_dump(exclude_none=True),
            columns=self._columns(),
            overlap=recipe.task.overlap,
            slice_column=recipe.budget.slices.column if recipe.budget.slices else None,
        )
        self.rows, self.dropped = once(track, "reading data", read)
        self.labels = self._label_names()
        self._examples: dict[str, list[Example]] = {}
        # Encoding the gate split first says early if a label is not known.
        self.examples("gate")
        if store is None:
            self.store = Store(output / "stages", fresh=fresh)
        else:
            self.store = Store(store, fresh=fresh, user=output.name)

    def of(self, recipe: Recipe) -> "Work":
        """Return the same for a recipe that differs in its steps alone.

        Raises:
            ModelError: the model is not fit for these steps.
        """
        other = copy.copy(self)
        other.recipe = recipe
        other._check_family()  # noqa: SLF001 - of the same class
        return other

    @property
    def identity(self) -> dict[str, str]:
        """What says which model it is that the recipe begins with."""
        return sources.identity(self.source, self.recipe.model.revision)

    def examples(self, split: str) -> list[Example]:
        """Return a split as the model sees it."""
        if split not in self._examples:
            examples = self.task.encode(
                self.rows[split], self.processor, self.labels, self.recipe.task.max_length
            )
            if self.task.decodes:
                examples = with_decoder_inputs(examples, self._shift)
            self._examples[split] = examples
        return self._examples[split]

    def _shift(self, labels: Array) -> Array:
        """Return what the model's decoder reads when it is to give the labels `(T,)`."""
        try:
            tokens = self._shifter(torch.from_numpy(labels)[None])
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(
                f"{self.recipe.model.source}: found no way from labels to what the decoder reads:"
                f" {checkpoint.first_line(error)}; expected a model that says it, with"
                " decoder_start_token_id and pad_token_id in its config.json"
            ) from error
        shifted: Array = tokens[0].numpy()
        return shifted

    def evidence(self, split: str) -> str:
        """Return the fingerprint of a split's content and of how it is seen."""
        settings = [self.recipe.task.kind, self.recipe.task.max_length, list(self.labels)]
        return fingerprint([settings, [_plain(row) for row in self.rows[split]]])

    @property
    def slices(self) -> dict[str, list[str]]:
        """Return the value of every gate example in the column that the budget cuts them by."""
        if self.recipe.budget.slices is None:
            return {}
        values = {row["id"]: str(row[SLICE]) for row in self.rows["gate"]}
        found = [values[example.id] for example in self.examples("gate")]
        return {self.recipe.budget.slices.column: found}

    @cached_property
    def _shifter(self) -> Callable[[torch.Tensor], torch.Tensor]:
        model: Any = checkpoint.without_weights(
            self.source, self.task.auto_class, self.recipe.model.revision
        )
        shifter: Callable[[torch.Tensor], torch.Tensor]
        shifter = model.prepare_decoder_input_ids_from_labels
        return shifter

    @cached_property
    def has_head(self) -> bool:
        """Whether the model was trained for the task's kind; else its head is new."""
        return self.kind.__name__ in (self.config.architectures or [])

    def make(
        self,
        name: str,
        key: Mapping[str, Any],
        make: Callable[[Path], dict[str, Any]],
        join: Callable[[Path], object] | None = None,
    ) -> Entry:
        """Return the entry of a stage; `make` writes it and says what is known of it.

        `join` is what the other processes of the run do in the meantime.
        """

        def timed(folder: Path) -> dict[str, Any]:
            start = time.monotonic()
            about = make(folder)
            return about | {"seconds": time.monotonic() - start}

        key = {**key, "code": self.code, "versions": self.machine.versions}
        return self.store.get(name, key, timed, join=join)

    def write(
        self, model: PreTrainedModel, folder: Path, details: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write a torch artifact, and return what is known of it."""
        checkpoint.save_pretrained(model, folder)
        self.processor.save_pretrained(folder)
        found = {**details, "bytes_by_part": parts.bytes_of_model(model)}
        about: dict[str, Any] = {"parameters": model.num_parameters(), "details": found}
        try:
            heads, neurons = structure.left(model, "heads"), structure.left(model, "neurons")
        except ValueError:  # a family that cannot be pruned can still be quantized and exported
            heads, neurons = [], []
        return about | {
            "heads": [len(kept) for kept in heads],
            "neurons": [len(kept) for kept in neurons],
            "kept_heads": [list(kept) for kept in heads],
        }

    def described(self) -> dict[str, Any]:
        """Return the recipe as JSON, with the number of threads that is used."""
        recipe = self.recipe.model_dump(mode="json")
        recipe["target"]["threads"] = self.threads
        return recipe

    def samples(self) -> list[Arrays]:
        """Return batches of real inputs of three shapes; the first is the one to trace."""
        windows = [w.inputs for example in self.examples("gate")[:64] for w in example.windows]
        if len(windows) < 2:  # noqa: PLR2004 - a batch of one would be traced as a constant
            windows = windows * 2
        windows.sort(key=lambda window: next(iter(window.values())).shape[-1])
        middle = len(windows) // 2
        chosen = (windows[middle - 1 : middle + 1], windows[-3:], windows[:1])
        return [collate(batch, self.padding) for batch in chosen]

    def _columns(self) -> dict[str, str]:
        chosen = self.recipe.task.columns
        return {
            role: chosen.get(role, column)
            for role, column in self.task.columns.items()
            if role in chosen or role not in self.task.optional
        }

    def _label_names(self) -> list[str]:
        role = self.task.labelled
        if self.task.regression and self.has_head and self.config.num_labels != 1:
            raise ModelError(
                f"{self.recipe.model.source}: found a model with {self.config.num_labels} outputs,"
                f" expected one, for {self.recipe.task.kind}"
            )
        if role is None:
            return []
        if self.recipe.task.labels:
            names = list(self.recipe.task.labels)
            if self.has_head and len(names) != self.config.num_labels:
                raise ModelError(
                    f"task.labels: found {len(names)}, expected {self.config.num_labels},"
                    f" one for each of the model's outputs"
                )
            return names
        if self.has_head:
            names_by_id: dict[Any, str] = dict(self.config.id2label or {})
            return [names_by_id[at] for at in sorted(names_by_id)]
        return label_names(self.rows["train"] if "train" in self.rows else self.rows["gate"], role)

    def _check_family(self) -> None:
        prunes = [step for step in self.recipe.steps if isinstance(step, Prune)]
        known = not prunes or self.config.model_type in ARCHITECTURES
        if known and not any(
            s.uniform or s.repair == "bias" or s.layers or (s.goal and "layers" in s.goal.units)
            for s in prunes
        ):
            return
        source, auto_class, revision = self.source, self.task.auto_class, self.recipe.model.revision
        hint = "without a prune step it can be trained, quantized and exported"
        try:
            selfcheck.ensure(checkpoint.without_weights(source, auto_class, revision))
            for step in prunes:
                model = checkpoint.without_weights(source, auto_class, revision)
                fractions: dict[structure.Kind, float]
                fractions = {"heads": step.heads, "neurons": step.neurons}
                kinds = {kind for kind, share in fractions.items() if share or step.sublayers}
                asked = {*kinds, *(step.goal.units if step.goal else ())}
                groups = [g for g in structure.groups(model) if g.kept and g.kind in asked]
                hint = "a bias cannot be added to this family"
                pruning.refuse_repair(groups, step.repair)
                if step.layers or (step.goal and "layers" in step.goal.units):
                    hint = "leave `layers` out"
                    depth.refuse_layers(model)
                hint = "leave `uniform` out, cut neurons alone, or choose another share"
                if step.uniform:
                    native.rehearse(model, fractions, step.multiple)
        except ModelError:
            raise
        except ValueError as error:
            raise ModelError(f"{self.recipe.model.source}: {error}; {hint}") from error

    def _check_lengths(self) -> None:
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest is None or "sequence" not in self.task.axes:
            return
        wanted = {"task.max_length": self.recipe.task.max_length}
        wanted |= {f"target.loads.{i}": x.sequence for i, x in enumerate(self.recipe.target.loads)}
        for where, length in wanted.items():
            if length > longest:
                raise ModelError(
                    f"{where}: found {length} tokens, expected at most {longest}, the positions"
                    " that the model has"
                )


def _plain(row: Row) -> list[str]:
    """Return a row's id and what is to be predicted, as text."""
    return [row["id"], *(str(row[name]) for name in WANTED if name in row)]


def _code() -> str:
    """Return the fingerprint of the code that makes and measures artifacts."""
    root = Path(__file__).parents[1]
    files = [
        path
        for package in ("pipeline", "exporters", "benchmarks")
        for path in sorted((root / package).rglob("*.py"))
        if path.name not in _WITHOUT_EFFECT
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
