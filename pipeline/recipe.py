"""What a user writes: one YAML file, checked once, here.

A recipe names a model, a task with its data, a target, the steps in their order, and a budget. All
its mistakes are reported together, each with its path in the file. What needs the model or the
data is checked later, in work.py; an order of steps that cannot work is refused here.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from benchmarks.metrics import METRICS
from benchmarks.tasks import TASKS
from pipeline.settings import (
    STEPS,
    Export,
    Finetune,
    Goal,
    Positive,
    Prune,
    Quantize,
    Step,
    Strict,
    Training,
    one_of,
    trained,
    unknown,
)

ORIGINAL: Final = "original"
"""The name of the untouched model's stage."""


class RecipeError(ValueError):
    """A recipe is wrong; the message lists every mistake, one a line."""


class Model(Strict):
    """The model to compress."""

    source: str = Field(min_length=1)
    """A folder, a hub id, or `builtin:minilm`."""
    revision: str | None = None
    """The hub revision; better a commit than a branch."""


class Splits(Strict):
    """A slice of the data for each purpose, as `datasets` writes it: `train[:2000]`."""

    train: str | None = None
    calibration: str | None = None
    selection: str | None = None
    gate: str


class TaskSettings(Strict):
    """What the model is for, and the data that show it."""

    kind: Annotated[str, one_of(TASKS)]
    data: str = Field(min_length=1)
    """A file, a folder, a hub id, or `builtin:docstrings`."""
    subset: str | None = None
    """The configuration of a hub data set, such as `sst2` of `glue`."""
    splits: Splits
    columns: dict[str, str] = Field(default_factory=dict)
    """Role of the task -> column of the data, where they differ."""
    labels: tuple[str, ...] | None = None
    """The label names in the order of the model's ids, where the model does not know them."""
    metric: Annotated[str, one_of(METRICS)] | None = None
    """The task's own first metric unless given."""
    max_length: int = Field(default=128, ge=8)
    """Tokens of a window at most."""
    overlap: Literal["error", "drop"] = "error"
    """What to do with examples that two splits share."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        task = TASKS[self.kind]
        mistakes = [
            f"columns: {unknown(role, sorted(task.columns))}"
            for role in self.columns
            if role not in task.columns
        ]
        if self.metric is not None and self.metric not in task.metrics:
            mistakes.append(f"metric: {unknown(self.metric, task.metrics)}, for {self.kind}")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


class Load(Strict):
    """A fixed input shape at which speed is measured."""

    batch: int = Field(ge=1)
    sequence: int = Field(default=128, ge=2)
    """Tokens; not used for images."""


class Target(Strict):
    """Where the artifact will run, and how it is measured there."""

    device: Literal["cpu", "cuda"] = "cpu"
    runtime: Literal["onnxruntime", "torch"] = "onnxruntime"
    threads: int | None = Field(default=None, ge=1)
    """All usable cores unless given."""
    loads: tuple[Load, ...] = Field(default=(Load(batch=1), Load(batch=8)), min_length=1)
    rounds: int = Field(default=30, ge=6)
    """Turns of every artifact at every load; two calls a turn are counted."""
    seconds: Positive = 60.0
    """A load ends after this long, even with fewer rounds."""


class Budget(Strict):
    """What the result must keep to, against the baseline; what is not given is not checked."""

    max_drop: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The most the score may fall, absolute, for a metric where higher is better."""
    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None
    """The most the perplexity may grow, as a ratio."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """How sure the accuracy check must be before it passes."""
    min_speedup: Positive | None = None
    """The least ratio of baseline latency to final latency, at every load."""
    max_size: Positive | None = None
    """The final size as a ratio to the baseline's."""
    max_memory: Positive | None = None
    """The final peak memory as a ratio to the baseline's."""


class Recipe(Strict):
    """One run of the pipeline."""

    model: Model
    task: TaskSettings
    target: Target = Target()
    steps: tuple[Step, ...] = Field(min_length=1)
    baseline: str = ORIGINAL
    """The stage that everything is compared with."""
    budget: Budget
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _order(self) -> Self:
        mistakes = list(_order_mistakes(self))
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The name of every step's stage: the step's, with a number from the second on."""
        names: list[str] = []
        for step in self.steps:
            count = sum(name.partition("-")[0] == step.step for name in names) + 1
            names.append(step.step if count == 1 else f"{step.step}-{count}")
        return tuple(names)

    @property
    def baseline_at(self) -> int:
        """How many steps are done when the baseline is reached."""
        return (ORIGINAL, *self.stage_names).index(self.baseline)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """Return the recipe in the file at `path`.

        Raises:
            RecipeError: the file is missing, is not YAML, or is not a recipe.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read: {error}") from None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"{path}: not YAML: {reason}") from None
        if not isinstance(content, dict):
            found = "an empty file" if content is None else type(content).__name__
            raise RecipeError(f"{path}: found {found}, expected a mapping with the key `model`")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError(explain(path, error)) from None


def _order_mistakes(recipe: Recipe) -> Iterator[str]:
    """Yield what cannot work in the order of the steps, with the way that works."""
    earlier: list[str] = [ORIGINAL]
    exported: str | None = None
    packed: Quantize | None = None
    for index, (step, name) in enumerate(zip(recipe.steps, recipe.stage_names, strict=True)):
        where = f"steps.{index}"
        match step:
            case Prune() | Finetune():
                yield from _training_mistakes(step, exported, packed, where)
                yield from _missing_data(recipe, step, where)
            case Quantize():
                yield from _quantize_mistakes(step, exported, packed, where)
                yield from _missing_data(recipe, step, where)
            case Export():
                yield from _export_mistakes(step, packed, where)
        yield from _unknown_names(recipe, step, earlier, where)
        if isinstance(step, Quantize) and step.in_torch:
            packed = step
        elif isinstance(step, Quantize | Export):
            exported = name if exported is None or step.step == "quantize" else exported
            if recipe.target.runtime == "torch":
                yield f"{where}: {step.step} gives ONNX, expected target.runtime: onnxruntime"
        earlier.append(name)
    if recipe.baseline not in earlier[:-1]:
        yield f"baseline: {unknown(recipe.baseline, earlier[:-1])}"
    yield from _budget_mistakes(recipe)


def _unknown_names(recipe: Recipe, step: Step, earlier: list[str], where: str) -> Iterator[str]:
    training, at = trained(step), "" if isinstance(step, Finetune) else ".finetune"
    if training is not None and training.teacher not in (None, *earlier):
        yield f"{where}{at}.teacher: {unknown(str(training.teacher), earlier)}"
    loads = len(recipe.target.loads)
    if isinstance(step, Prune) and step.goal is not None and step.goal.load >= loads:
        yield f"{where}.goal.load: found {step.goal.load}, expected less than {loads}"


def _training_mistakes(
    step: Prune | Finetune, exported: str | None, packed: Quantize | None, where: str
) -> Iterator[str]:
    if exported:
        yield (
            f"{where}: {step.step} needs a torch model, found ONNX after {exported}; move it before"
        )
    elif packed:
        yield (
            f"{where}: {step.step} needs weights in floating point, found those of"
            f" {packed.method}; move it before"
        )


def _quantize_mistakes(
    step: Quantize, exported: str | None, packed: Quantize | None, where: str
) -> Iterator[str]:
    if packed or (exported and exported.startswith("quantize")):
        by = packed.method if packed else exported
        yield f"{where}: the model is quantized already by {by}; keep one of them"
    elif exported and step.in_torch:
        yield (
            f"{where}: {step.method} needs a torch model, found ONNX after {exported}; move it"
            " before, the codes are carried over"
        )
    elif exported and step.standard:
        yield (
            f"{where}: {step.method} starts from a graph of standard operators, found one that"
            f" {exported} fused; leave that step out"
        )


def _export_mistakes(step: Export, packed: Quantize | None, where: str) -> Iterator[str]:
    if step.format == "tensorrt" and packed and packed.method == "bnb-nf4":
        yield (
            f"{where}: TensorRT has no nf4: its engine would hold the weights in fp16 or more;"
            " use bnb-int8 or int4-weights with `portable: true`, or export to onnx"
        )


def _missing_data(recipe: Recipe, step: Prune | Finetune | Quantize, where: str) -> Iterator[str]:
    splits = recipe.task.splits
    training = trained(step)
    if training is not None and splits.train is None:
        yield f"{where}: finetune needs examples to train on, expected task.splits.train"
    if training is not None and training.patience and splits.selection is None:
        yield f"{where}: patience needs examples to choose on, expected task.splits.selection"
    if isinstance(step, Finetune):
        return
    if splits.calibration is None and step.calibrated:
        needs = "prune needs examples to score on"
        if isinstance(step, Quantize):
            needs = f"{step.method} with these settings needs examples to calibrate on"
        yield f"{where}: {needs}, expected task.splits.calibration"
    metric = METRICS[recipe.task.metric or TASKS[recipe.task.kind].metrics[0]]
    if step.max_drop is not None and not metric.higher_is_better:
        yield f"{where}.max_drop: perplexity grows when it gets worse; expected no max_drop"
    if step.max_drop is not None and splits.selection is None:
        yield f"{where}: max_drop needs examples to choose on, expected task.splits.selection"


def _budget_mistakes(recipe: Recipe) -> Iterator[str]:
    kind, budget = recipe.task.kind, recipe.budget
    if not budget.model_dump(exclude={"confidence"}, exclude_none=True):
        yield "budget: found no limit, expected at least one, such as max_drop"
    higher_is_better = METRICS[recipe.task.metric or TASKS[kind].metrics[0]].higher_is_better
    if budget.max_drop is not None and not higher_is_better:
        yield "budget.max_drop: perplexity grows when it gets worse, expected max_perplexity_ratio"
    if budget.max_perplexity_ratio is not None and higher_is_better:
        yield f"budget.max_perplexity_ratio: {kind} has no perplexity, expected max_drop"


def explain(path: Path, error: ValidationError) -> str:
    """Return every mistake on a line of its own, with its path in the file."""
    lines: list[str] = []
    for mistake in error.errors():
        if mistake["type"] == "too_short" and mistake["input"]:
            continue  # a list is said to be short when its items are wrong
        # The tag of a step says the same as its place: steps.0.prune.heads -> steps.0.heads
        parts, step = [str(part) for part in mistake["loc"]], ""
        if len(parts) > 2 and parts[0] == "steps":  # noqa: PLR2004
            step = parts.pop(2)
        where = ".".join(parts)
        if mistake["type"] == "extra_forbidden":
            text = f"unknown key{_suggest(parts, step)}"
        else:
            text = _plain(mistake)
        lines.extend(f"  {where}: {line}" if where else f"  {line}" for line in text.splitlines())
    count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
    return "\n".join([f"{path}: {count}", *lines])


def _plain(mistake: Any) -> str:
    text = str(mistake["msg"]).removeprefix("Value error, ")
    if mistake["type"] == "union_tag_invalid":
        return f"step: {unknown(str(mistake['ctx']['tag']), list(STEPS))}"
    if mistake["type"] == "union_tag_not_found":
        return f"step: found none, expected one of {list(STEPS)}"
    if mistake["type"] in {"value_error", "missing"}:
        return text
    return f"{text}, found {mistake['input']!r}"


def _suggest(parts: list[str], step: str) -> str:
    """Return the known key closest to an unknown one."""
    kinds: dict[str, list[type[BaseModel]]] = {
        "": [Recipe],
        "model": [Model],
        "task": [TaskSettings, Splits],
        "target": [Target, Load],
        "steps": [STEPS[step]] if step else [],
        "budget": [Budget],
    }
    inner: dict[str, type[BaseModel]] = {"finetune": Training, "goal": Goal}
    if len(parts) > 3 and parts[2] in inner:  # noqa: PLR2004 - steps.0.goal.speed
        kinds["steps"] = [inner[parts[2]]]
    parent = parts[0] if len(parts) > 1 else ""
    known = [key for kind in kinds.get(parent, []) for key in kind.model_fields]
    close = difflib.get_close_matches(parts[-1], known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f", expected one of {sorted(known)}"
