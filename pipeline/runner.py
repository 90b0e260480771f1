"""`run`: a recipe in, an artifact and its report out.

The pipeline is a `for` over the steps and a `match` on what each is. Every step takes an artifact
and gives an artifact, through the store, so that a run that was killed goes on where it was. Then
all artifacts are measured on the target, and the gate judges the last against the baseline.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedModel, set_seed

from benchmarks import accuracy, machine, metrics, speed
from benchmarks.accuracy import Track, silent
from benchmarks.data import Row
from benchmarks.data import load as load_data
from benchmarks.machine import Unavailable
from benchmarks.tasks import TASKS, Arrays, Example, collate, label_names, padding
from exporters import onnx
from pipeline import architectures, calibration, checkpoint, gate, measuring, pruning, sources
from pipeline import report as reports
from pipeline.checkpoint import ModelError
from pipeline.finetuning import Teacher, finetune
from pipeline.measuring import Alone, Bench, Target
from pipeline.page import page
from pipeline.quantization import METHODS
from pipeline.recipe import ORIGINAL, Export, Finetune, Prune, Quantize, Recipe
from pipeline.report import Check, Load, Report, Score, Stage
from pipeline.store import Entry, Store, fingerprint, publish, write_text

CALIBRATION_BATCH: Final = 16
"""Windows a batch when units are scored and second moments taken."""

# What these files say cannot change a stage's content.
_WITHOUT_EFFECT: Final = frozenset(
    {"__main__.py", "cli.py", "doctor.py", "gate.py", "page.py", "plots.py", "recipe.py", "report.py"}
)


@dataclass(frozen=True)
class Artifact:
    """A stage's folder, and what is known of it without measuring."""

    name: str
    step: dict[str, Any] | None
    format: str
    entry: Entry
    about: Mapping[str, Any]


class Work:
    """What the steps of one run share: recipe, data, processor, store."""

    def __init__(self, recipe: Recipe, output: Path, *, fresh: bool, track: Track) -> None:
        self.recipe = recipe
        self.fresh = fresh
        self.track = track
        self.task = TASKS[recipe.task.kind]
        self.metric = recipe.task.metric or self.task.metrics[0]
        self.machine = machine.describe()
        self.threads = recipe.target.threads or machine.usable_cores()
        self.code = _code()
        torch.set_num_threads(self.threads)

        self.source = sources.resolve(recipe.model.source)
        revision = recipe.model.revision
        self.config = checkpoint.read_config(self.source, revision)
        self.kind = checkpoint.model_class(self.source, self.config, self.task.auto_class)
        self.processor = sources.processor(self.source, self.task.processor, revision)
        self.padding = padding(self.processor)
        self._check_lengths()
        self.rows = load_data(
            recipe.task.data,
            subset=recipe.task.subset,
            splits=recipe.task.splits.model_dump(exclude_none=True),
            columns=self._columns(),
            overlap=recipe.task.overlap,
        )
        self.labels = self._label_names()
        self._examples: dict[str, list[Example]] = {}
        # Encoding the gate split first says early if a label is not known.
        self.examples("gate")
        self.store = Store(output / "stages")

    def examples(self, split: str) -> list[Example]:
        """Return a split as the model sees it."""
        if split not in self._examples:
            self._examples[split] = self.task.encode(
                self.rows[split], self.processor, self.labels, self.recipe.task.max_length
            )
        return self._examples[split]

    def evidence(self, split: str) -> str:
        """Return the fingerprint of a split's content and of how it is seen."""
        settings = [self.recipe.task.kind, self.recipe.task.max_length, list(self.labels)]
        return fingerprint([settings, [_plain(row) for row in self.rows[split]]])

    @cached_property
    def has_head(self) -> bool:
        """Whether the model was trained for the task's kind; else its head is new."""
        return self.kind.__name__ in (self.config.architectures or [])

    def make(self, name: str, key: Mapping[str, Any], make: Callable[[Path], dict[str, Any]]) -> Entry:
        """Return the entry of a stage; `make` writes it and says what is known of it."""

        def timed(folder: Path) -> None:
            start = time.monotonic()
            about = make(folder)
            about["seconds"] = time.monotonic() - start
            (folder / "stage.json").write_text(json.dumps(about), encoding="utf-8")

        key = {**key, "code": self.code, "versions": self.machine.versions}
        return self.store.get(name, key, timed, fresh=self.fresh)

    def write(self, model: PreTrainedModel, folder: Path, details: Mapping[str, Any]) -> dict[str, Any]:
        """Write a torch artifact, and return what is known of it."""
        checkpoint.save_pretrained(model, folder)
        self.processor.save_pretrained(folder)
        about = {"parameters": model.num_parameters(), "details": dict(details)}
        try:
            groups = architectures.groups(model)
        except ValueError:  # a family that cannot be pruned can still be quantized and exported
            groups = []
        heads = [group for group in groups if group.kind == "heads"]
        return about | {
            "heads": [len(group.kept) for group in heads],
            "neurons": [len(group.kept) for group in groups if group.kind == "neurons"],
            "kept_heads": [list(group.kept) for group in heads],
        }

    def _columns(self) -> dict[str, str]:
        chosen = self.recipe.task.columns
        return {
            role: chosen.get(role, column)
            for role, column in self.task.columns.items()
            if role in chosen or role not in self.task.optional
        }

    def _label_names(self) -> list[str]:
        role = self.task.labelled
        if role is None:
            return []
        if self.recipe.task.labels:
            names = list(self.recipe.task.labels)
            if self.has_head and len(names) != self.config.num_labels:
                raise ModelError(
                    f"task.labels: found {len(names)} names, expected {self.config.num_labels},"
                    f" one for each of the model's outputs"
                )
            return names
        if self.has_head:
            return [self.config.id2label[at] for at in range(self.config.num_labels)]
        return label_names(self.rows["train"] if "train" in self.rows else self.rows["gate"], role)

    def _check_lengths(self) -> None:
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest is None or "sequence" not in self.task.axes:
            return
        wanted = {"task.max_length": self.recipe.task.max_length}
        wanted |= {f"target.loads.{i}": x.sequence for i, x in enumerate(self.recipe.target.loads)}
        for where, length in wanted.items():
            if length > longest:
                raise ModelError(
                    f"{where}: found {length} tokens, expected at most {longest}, the model's positions"
                )


def run(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    track: Track = silent,
) -> Report:
    """Run a recipe, and return its report.

    Writes below `output` (`runs/<recipe>` unless given): `stages/`, from which a later run resumes,
    `report.json`, `report.md`, `report.html`, and, if the verdict is a pass, `artifact/`.

    Args:
        recipe: a recipe, or the path of one.
        output: the folder for everything that is written.
        fresh: do every step again, whatever the store holds.
        track: shows progress.

    Raises:
        RecipeError: the recipe is wrong.
        DataError: the data are not what the recipe says.
        ModelError: the model is missing, damaged, or not fit for the task.
        Unavailable, MissingDependency: this machine lacks the target or a package.
        WorkerError, TrainingError, ExportError, QuantizationError, OSError: a stage failed.
    """
    name = "recipe"
    if not isinstance(recipe, Recipe):
        name = Path(recipe).stem
        recipe = Recipe.from_yaml(recipe)
    output = Path(output) if output is not None else Path("runs", name)
    check_target(recipe)
    work = Work(recipe, output, fresh=fresh, track=track)
    artifacts = list(_compress(work))
    report = _measure_and_judge(work, artifacts, output)
    _write_report(report, output)
    return report


def check_target(recipe: Recipe) -> None:
    """Refuse a target that is not here.

    Raises:
        Unavailable: no CUDA device where one is asked for.
        MissingDependency: onnxruntime is asked for and not installed.
    """
    target = recipe.target
    if target.runtime == "onnxruntime":
        providers = onnx.runtime().get_available_providers()
        if target.device == "cuda" and "CUDAExecutionProvider" not in providers:
            raise Unavailable(
                f"target.device: found the providers {providers}, expected CUDAExecutionProvider;"
                " install the extra `gpu` in place of `cpu`"
            )
    if target.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("target.device: found no CUDA device, expected one; use device: cpu")


def _compress(work: Work) -> list[Artifact]:
    """Do the steps, and return all artifacts, the untouched model first."""
    artifacts = [_original(work)]
    for step, name in zip(work.recipe.steps, work.recipe.stage_names, strict=True):
        before = artifacts[-1]
        described = step.model_dump(mode="json")
        kind = before.format
        match step:
            case Prune():
                entry = _prune(work, step, before)
            case Finetune():
                teacher = {a.name: a for a in artifacts}.get(step.teacher or "")
                entry = _finetune(work, step, before, teacher)
            case Quantize():
                entry, kind = _quantize(work, step, before), "onnx"
            case Export():
                entry, kind = _export(work, before), "onnx"
        artifacts.append(_artifact(name, described, kind, entry))
    return artifacts


def _artifact(name: str, step: dict[str, Any] | None, kind: str, entry: Entry) -> Artifact:
    about = json.loads((entry.folder / "stage.json").read_text(encoding="utf-8"))
    return Artifact(name, step, kind, entry, about)


def _original(work: Work) -> Artifact:
    recipe = work.recipe
    trained_first = any(isinstance(step, Finetune) for step in recipe.steps[: _baseline_at(recipe)])

    def make(folder: Path) -> dict[str, Any]:
        set_seed(recipe.seed)  # a new head is random
        options: dict[str, Any] = {"dtype": torch.float32, "revision": recipe.model.revision or "main"}
        if work.labels and (recipe.task.labels or not work.has_head):
            options["id2label"] = dict(enumerate(work.labels))
            options["label2id"] = {name: at for at, name in enumerate(work.labels)}
        model, missing = checkpoint.load(work.source, work.task.auto_class, **options)
        if missing and work.has_head:
            raise ModelError(
                f"{recipe.model.source}: found no {', '.join(missing[:3])}, expected every tensor of"
                f" {type(model).__name__}; the files are damaged"
            )
        _check_vocabulary(work, model)
        return work.write(model, folder, {})

    if not work.has_head and not trained_first:
        raise ModelError(
            f"{recipe.model.source}: found {(work.config.architectures or ['no class'])[0]}, expected"
            f" a model trained for {recipe.task.kind}; begin with a finetune step and name it under"
            " `baseline`"
        )
    key = {
        "model": sources.identity(work.source, recipe.model.revision),
        "kind": recipe.task.kind,
        "labels": work.labels,
        "seed": None if work.has_head else recipe.seed,
    }
    return _artifact(ORIGINAL, None, "torch", work.make(ORIGINAL, key, make))


def _baseline_at(recipe: Recipe) -> int:
    """Return how many steps are done when the baseline is reached."""
    return (ORIGINAL, *recipe.stage_names).index(recipe.baseline)


def _check_vocabulary(work: Work, model: PreTrainedModel) -> None:
    if "sequence" not in work.task.axes:
        return
    largest = max(
        int(window.inputs["input_ids"].max())
        for example in work.examples("gate")
        for window in example.windows
    )
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ModelError(
            f"{work.recipe.model.source}: found token {largest}, expected less than {rows}, the rows of"
            " the embedding table; the tokenizer is another model's"
        )


def _prune(work: Work, step: Prune, before: Artifact) -> Entry:
    needs_data = step.criterion != "magnitude" or step.repair != "none"
    examples = work.examples("calibration") if needs_data else []
    windows = sum(len(example.windows) for example in examples)

    def make(folder: Path) -> dict[str, Any]:
        model = checkpoint.from_pretrained(before.entry.folder)
        choice = pruning.choose_and_cut(
            model,
            {"heads": step.heads, "neurons": step.neurons},
            criterion=step.criterion,
            repair=step.repair,
            data=lambda: calibration.batches(examples, work.padding, CALIBRATION_BATCH),
            total=-(-windows // CALIBRATION_BATCH),
            track=work.track,
        )
        return work.write(model, folder, asdict(choice))

    key = {
        "step": step.model_dump(mode="json"),
        "input": before.entry.digest,
        "data": work.evidence("calibration") if needs_data else None,
    }
    return work.make("prune", key, make)


def _finetune(work: Work, step: Finetune, before: Artifact, teacher: Artifact | None) -> Entry:
    settings = step.model_dump(mode="json")

    def make(folder: Path) -> dict[str, Any]:
        model = checkpoint.from_pretrained(before.entry.folder)
        imitated = None
        if teacher is not None:
            imitated = Teacher(
                checkpoint.from_pretrained(teacher.entry.folder),
                step.temperature,
                step.task_weight,
                step.hidden_weight,
            )
        loss = finetune(
            model,
            work.examples("train"),
            work.padding,
            epochs=step.epochs,
            learning_rate=step.learning_rate,
            batch_size=step.batch_size,
            warmup=step.warmup,
            weight_decay=step.weight_decay,
            freeze_embeddings=step.freeze_embeddings,
            teacher=imitated,
            seed=work.recipe.seed,
            device=work.recipe.target.device,
            track=work.track,
        )
        return work.write(model.cpu(), folder, {"mean_loss": loss})

    key = {
        "step": settings,
        "input": before.entry.digest,
        "teacher": teacher.entry.digest if teacher else None,
        "data": work.evidence("train"),
        "seed": work.recipe.seed,
        "device": work.recipe.target.device,
    }
    return work.make("finetune", key, make)


def _export(work: Work, before: Artifact) -> Entry:
    """Return the artifact as ONNX, fused for the target's provider; one that is ONNX is done."""
    if before.format == "onnx":
        return before.entry

    def make(folder: Path) -> dict[str, Any]:
        model = checkpoint.from_pretrained(before.entry.folder)
        model.config.use_cache = False
        (folder / onnx.MODEL).parent.mkdir()
        difference = onnx.export(
            model,
            _samples(work),
            axes=work.task.axes,
            path=folder / onnx.MODEL,
            fuse_for=work.recipe.target.device,
        )
        _copy_around(before.entry.folder, folder)
        return _known(before) | {"details": {"difference_to_torch": difference}}

    key = {"input": before.entry.digest, "export": "onnx", "device": work.recipe.target.device}
    return work.make("onnx", key, make)


def _quantize(work: Work, step: Quantize, before: Artifact) -> Entry:
    source = _export(work, before)

    def make(folder: Path) -> dict[str, Any]:
        (folder / onnx.MODEL).parent.mkdir()
        reduce_range = work.machine.saturates
        count = METHODS[step.method](
            source.folder / onnx.MODEL,
            folder / onnx.MODEL,
            embeddings=step.embeddings,
            reduce_range=reduce_range,
        )
        _copy_around(source.folder, folder)
        details = {"integer_products": count, "reduce_range": reduce_range}
        return _known(before) | {"details": details}

    key = {
        "step": step.model_dump(mode="json"),
        "input": source.digest,
        "reduce_range": work.machine.saturates,
    }
    return work.make("quantize", key, make)


def _known(before: Artifact) -> dict[str, Any]:
    return {name: before.about[name] for name in ("parameters", "heads", "neurons", "kept_heads")}


def _copy_around(source: Path, folder: Path) -> None:
    """Copy what lies around a model (config, tokenizer), but not the model."""
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and "index" not in path.name:
            if path.name not in {"manifest.json", "stage.json"}:
                shutil.copyfile(path, folder / path.name)


def _samples(work: Work) -> list[Arrays]:
    """Return batches of real inputs of three shapes; the first is the one to trace."""
    windows = [w.inputs for example in work.examples("gate")[:64] for w in example.windows]
    if len(windows) < 2:  # noqa: PLR2004 - a batch of one would be traced as a constant
        windows = windows * 2
    windows.sort(key=lambda window: next(iter(window.values())).shape[-1])
    middle = len(windows) // 2
    chosen = (windows[middle - 1 : middle + 1], windows[-3:], windows[:1])
    return [collate(batch, work.padding) for batch in chosen]


def _measure_and_judge(work: Work, artifacts: list[Artifact], output: Path) -> Report:
    recipe = work.recipe
    measured_ones = artifacts[_baseline_at(recipe) :]
    bench = _bench(work)
    # What runs on the target; for a torch artifact and ONNX Runtime that is its export.
    running = [
        _export(work, a) if recipe.target.runtime == "onnxruntime" else a.entry
        for a in measured_ones
    ]
    found = [measuring.alone(bench, entry.folder, entry.digest) for entry in running]
    latencies = measuring.together(bench, {entry.digest: entry.folder for entry in running})
    stages = []
    for at, (artifact, entry, alone) in enumerate(zip(measured_ones, running, found, strict=True)):
        previous = running[max(at - 1, 0)].digest
        stages.append(
            replace(
                _stage(work, artifact, alone, found[0].outcomes),
                loads=_loads(bench, alone, latencies, (running[0].digest, previous, entry.digest)),
            )
        )
    noted = [
        replace(stage, gain_note=_gain_note(stages[at - 1], stage) if at else "")
        for at, stage in enumerate(stages)
    ]
    verdict = gate.judge(_checks(work, found, noted))
    last = measured_ones[-1].entry.folder
    artifact_folder = output / "artifact"
    provenance = {"recipe": _recipe_json(work), "machine": asdict(work.machine), "verdict": asdict(verdict)}
    if verdict.outcome == "pass":
        publish(lambda folder: _copy_artifact(last, folder), artifact_folder, provenance)
    else:
        shutil.rmtree(artifact_folder, ignore_errors=True)  # an earlier run's, not this one's
    return Report(
        recipe=_recipe_json(work),
        machine=asdict(work.machine),
        data={
            "source": recipe.task.data,
            "examples": {name: len(rows) for name, rows in work.rows.items()},
            "fingerprints": {name: work.evidence(name) for name in work.rows},
            "labels": work.labels,
        },
        baseline=recipe.baseline,
        stages=tuple(noted),
        verdict=verdict,
        artifact=str(artifact_folder if verdict.outcome == "pass" else last),
    )


def _bench(work: Work) -> Bench:
    target = work.recipe.target
    return Bench(
        store=work.store,
        target=Target(
            device=target.device,
            runtime=target.runtime,
            threads=work.threads,
            loads=tuple((load.batch, load.sequence) for load in target.loads),
            rounds=target.rounds,
            seconds=target.seconds,
        ),
        machine=work.machine,
        task=work.task,
        examples=work.examples("gate"),
        padding=work.padding,
        evidence=work.evidence("gate"),
        code=work.code,
        track=work.track,
    )


def _stage(work: Work, artifact: Artifact, alone: Alone, baseline: accuracy.Outcomes) -> Stage:
    metric = metrics.METRICS[work.metric]
    right = None
    if metric.kind == "binary":
        right = lambda columns: np.asarray(metric.function(columns)) > 0  # noqa: E731
    about = artifact.about
    return Stage(
        name=artifact.name,
        step=artifact.step,
        format=artifact.format,
        runtime=work.recipe.target.runtime,
        folder=str(artifact.entry.folder),
        seconds=about["seconds"],
        parameters=about["parameters"],
        size_bytes=_size_bytes(artifact.entry.folder),
        score=Score(
            work.metric, metrics.score(work.metric, alone.outcomes.columns), len(alone.outcomes.ids)
        ),
        fidelity=asdict(accuracy.fidelity(baseline, alone.outcomes, right)),
        loads=(),
        memory={
            "peak_rss_bytes": alone.peak_rss_bytes,
            "import_floor_bytes": alone.import_floor_bytes,
            "device_peak_bytes": None,
        },
        load_seconds=alone.load_seconds,
        heads=tuple(about["heads"]),
        neurons=tuple(about["neurons"]),
        kept_heads=tuple(tuple(kept) for kept in about["kept_heads"]),
        details=about["details"],
    )


def _loads(
    bench: Bench,
    alone: Alone,
    latencies: Mapping[str, list[list[list[float]]]],
    digests: tuple[str, str, str],
) -> tuple[Load, ...]:
    """Return the speed at every load; `digests` are of baseline, stage before, and this stage."""
    first, previous, this = (latencies[digest] for digest in digests)
    loads = []
    for at, (batch, sequence) in enumerate(bench.target.loads):
        calls = [call for turn in this[at] for call in turn]
        loads.append(
            Load(
                batch=batch,
                sequence=sequence if "sequence" in bench.task.axes else None,
                latency_ms=asdict(speed.percentiles(calls)),
                first_call_ms=alone.first_call_ms[at],
                throughput_per_s=batch * 1e3 / float(np.mean(calls)),
                speedup=asdict(speed.ratio(first[at], this[at])),
                gain=asdict(speed.ratio(previous[at], this[at])),
            )
        )
    return tuple(loads)


NOTABLE: Final = 0.02
"""The smallest change of a ratio that counts as a gain."""


def _gain_note(before: Stage, stage: Stage) -> str:
    """Say what a step gained over the stage before, or that it did not pay."""
    gains = []
    for load in stage.loads:
        if load.gain["low"] > 1 + NOTABLE:
            gains.append(f"{load.gain['value']:.2f}x faster at {reports.shape(asdict(load))}")
    for what, now, then in (
        ("size", stage.size_bytes, before.size_bytes),
        ("peak memory", stage.memory["peak_rss_bytes"], before.memory["peak_rss_bytes"]),
    ):
        if now and then and now / then < 1 - NOTABLE:
            gains.append(f"{what} {now / then:.2f}x")
    trained = stage.step is not None and stage.step["step"] == "finetune"
    if trained:
        gains.append(f"{stage.score.metric} {stage.score.value - before.score.value:+.4f}")
    if stage.folder == before.folder:
        return "the same file as the stage before"
    return ", ".join(gains) if gains else "no gain in latency, memory or size on this target"


def _checks(work: Work, found: list[Alone], stages: list[Stage]) -> tuple[Check, ...]:
    budget, first, last = work.recipe.budget, stages[0], stages[-1]
    allowed = budget.max_drop or budget.max_perplexity_ratio
    checks = []
    if allowed is not None:
        checks.append(
            gate.check_score(
                work.metric,
                found[0].outcomes.columns,
                found[-1].outcomes.columns,
                allowed=allowed,
                confidence=budget.confidence,
            )
        )
    if budget.min_speedup is not None:
        for load in last.loads:
            name = reports.shape(asdict(load))
            checks.append(gate.check_speedup(name, load.speedup, budget.min_speedup))
    if budget.max_size is not None:
        checks.append(
            gate.check_ratio("size", last.size_bytes, first.size_bytes, budget.max_size)
        )
    if budget.max_memory is not None:
        peaks = [stage.memory["peak_rss_bytes"] or float("nan") for stage in (last, first)]
        checks.append(gate.check_ratio("peak memory", peaks[0], peaks[1], budget.max_memory))
    return tuple(checks)


def _size_bytes(folder: Path) -> int:
    """Return the bytes of the model's own files: weights, or graph and weights."""
    weights = [*folder.glob("*.safetensors"), *(folder / onnx.MODEL.parent).glob("model.onnx*")]
    return sum(path.stat().st_size for path in weights)


def _copy_artifact(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for name in ("manifest.json", "stage.json"):
        (folder / name).unlink(missing_ok=True)


def _write_report(report: Report, output: Path) -> None:
    text = report.to_json()
    content = json.loads(text)
    write_text(output / "report.json", text)
    write_text(output / "report.md", reports.markdown(content))
    write_text(output / "report.html", page(content))


def _recipe_json(work: Work) -> dict[str, Any]:
    recipe = work.recipe.model_dump(mode="json")
    recipe["target"]["threads"] = work.threads
    return recipe


def _plain(row: Row) -> list[str]:
    """Return a row's id and what is to be predicted, as text."""
    return [row["id"], *(str(row[name]) for name in ("label", "tags", "answers") if name in row)]


def _code() -> str:
    """Return the fingerprint of the code that makes and measures artifacts."""
    root = Path(__file__).parents[1]
    files = [
        path
        for package in ("pipeline", "exporters", "benchmarks")
        for path in sorted((root / package).glob("*.py"))
        if path.name not in _WITHOUT_EFFECT
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


