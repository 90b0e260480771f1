"""What a user writes: one YAML file, checked once, here.

A recipe names a model, a task with its data, a target, the steps in their order, and a budget. All
its mistakes are reported together, each with its path in the file. What needs the model or the
data is checked later, in work.py; an order of steps that cannot work is refused here.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from benchmarks.metrics import METRICS
from benchmarks.tasks import TASKS
from pipeline.budget import (
    LATENCIES,
    TIMED_CONFIDENCE,
    Budget,
    Limits,
    Regression,
    Slices,
)
from pipeline.mistakes import explain
from pipeline.quantization import METHODS
from pipeline.reading import Positive, RecipeError, Strict, read_yaml, stage_names, unknown
from pipeline.settings import (
    INNER,
    STEPS,
    Export,
    Finetune,
    Limited,
    Prune,
    Quantize,
    Step,
    one_of,
    trained,
)

CALLS: Final = 2
"""Calls of every artifact that are counted a round."""
ORIGINAL: Final = "original"
"""The name of the untouched model's stage."""


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
    runtime: Literal["onnxruntime", "tensorrt", "torch"] = "onnxruntime"
    threads: int | None = Field(default=None, ge=1)
    """All usable cores unless given."""
    loads: tuple[Load, ...] = Field(default=(Load(batch=1), Load(batch=8)), min_length=1)
    rounds: int = Field(default=30, ge=6)
    """Turns of every artifact at every load; two calls a turn are counted."""
    seconds: Positive = 60.0
    """A load ends after this long, even with fewer rounds."""
    dedicated: bool = False
    """Whether nothing else runs there: absolute limits are judged on such a target alone."""


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
        return stage_names([step.step for step in self.steps])

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
        content = read_yaml(path, "the key `model`")
        if "search" in content or _leaves_open(content.get("steps")):
            raise RecipeError(
                f"{path}: found values that are left open (search, choose, from), expected a recipe"
                " with all of them; use `secateur search` or `secateur sweep`"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError(cls.explain(path, error)) from None

    @staticmethod
    def explain(path: Path, error: ValidationError) -> str:
        """Return every mistake of the recipe in a file on a line of its own."""
        return explain(path, error, _kinds(), STEPS, INNER)


def _leaves_open(node: Any) -> bool:
    """Whether a value is one that `space` reads."""
    if isinstance(node, dict):
        return "choose" in node or {"from", "to"} <= node.keys() or _leaves_open([*node.values()])
    return isinstance(node, list) and any(_leaves_open(value) for value in node)


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
                yield from _quantize_mistakes(recipe, step, exported, packed, where)
                yield from _missing_data(recipe, step, where)
            case Export() if packed and packed.ends_the_chain:
                yield (
                    f"{where}: nothing exports what {packed.method} writes, found {step.step} after"
                    " it; leave it out, or quantize with int4-weights and `algorithm: gptq`"
                )
            case Export(format="tensorrt"):
                yield from _engine_mistakes(recipe, index, exported, where)
        yield from _unknown_names(recipe, step, earlier, where)
        if isinstance(step, Quantize) and step.in_torch:
            packed = step
        elif isinstance(step, Quantize | Export):
            exported = name if exported is None or step.step == "quantize" else exported
        earlier.append(name)
    yield from _runtime_mistakes(recipe)
    if recipe.baseline not in earlier[:-1]:
        yield f"baseline: {unknown(recipe.baseline, earlier[:-1])}"
    yield from _budget_mistakes(recipe)


def _engine_mistakes(recipe: Recipe, index: int, exported: str | None, where: str) -> Iterator[str]:
    """Yield why no engine can be built of what the steps before give."""
    if TASKS[recipe.task.kind].reduction == "next_token":
        yield (
            f"{where}: {recipe.task.kind} gives a graph with a key-value cache, which the profiles"
            " of an engine cannot hold here; expected format: onnx"
        )
    if exported and exported.startswith("export"):
        yield (
            f"{where}: an engine starts from a graph of standard operators, found one that"
            f" {exported} fused for ONNX Runtime; leave that step out"
        )
    for at, step in enumerate(recipe.steps[:index]):
        if isinstance(step, Quantize) and step.onnxruntime_alone:
            yield f"{where}: TensorRT cannot read steps.{at}: found {step.onnxruntime_alone}"
    if index + 1 < len(recipe.steps):
        yield (
            f"{where}: nothing starts from an engine, found {recipe.steps[index + 1].step} after"
            " it; move it before"
        )


def _runtime_mistakes(recipe: Recipe) -> Iterator[str]:
    """Yield what the runtime that measures cannot run."""
    target, last = recipe.target, recipe.steps[-1]
    for index, step in enumerate(recipe.steps):
        in_torch = isinstance(step, Quantize) and step.in_torch
        if isinstance(step, Quantize) and step.ends_the_chain:
            yield from _last_mistakes(recipe, step, f"steps.{index}")
        if target.runtime == "torch" and isinstance(step, Quantize | Export) and not in_torch:
            yield f"steps.{index}: {step.step} gives ONNX, expected target.runtime: onnxruntime"
        goal = step.goal if isinstance(step, Prune) else None
        if target.runtime == "tensorrt" and goal and (goal.speedup or goal.latency_ms):
            yield (
                f"steps.{index}.goal: found a goal of time, which would need an engine of every"
                " width that is tried; expected multiply_adds or parameters"
            )
        if goal and goal.quantized:
            yield from _unpriceable(recipe, f"steps.{index}.goal.quantized")
    if target.runtime == "tensorrt" and target.device != "cuda":
        yield (
            f"target.device: found {target.device}, expected cuda, where engines run; with"
            " runtime: onnxruntime the engine is built, and the graph it is built from is measured"
        )
    if target.runtime == "tensorrt" and not (
        isinstance(last, Export) and last.format == "tensorrt"
    ):
        yield "target.runtime: found tensorrt, expected `export` with format: tensorrt as last step"


def _unpriceable(recipe: Recipe, where: str) -> Iterator[str]:
    """Yield why models cannot be timed as they will be quantized."""
    step = next((step for step in recipe.steps if isinstance(step, Quantize)), None)
    if step is None:
        yield f"{where}: found no quantize step, expected one; leave the key out, or add the step"
    elif step.in_torch or step.calibrated:
        why = "gives a torch artifact" if step.in_torch else "takes calibration data"
        yield (
            f"{where}: found a quantize step that {why} ({step.method}), expected one that"
            " does not, of int8-dynamic, int8-weights, int4-weights or fp16; or leave the key out"
        )


def _last_mistakes(recipe: Recipe, step: Quantize, where: str) -> Iterator[str]:
    """Yield why what ends the chain cannot be made, or measured."""
    target, kind = recipe.target, recipe.task.kind
    if (target.runtime, target.device) != ("torch", "cpu"):
        yield (
            f"{where}: {step.method} is measured in torch on the CPU alone, found target.runtime:"
            f" {target.runtime} and target.device: {target.device}, expected torch and cpu; or"
            " quantize with int4-weights and `algorithm: gptq`"
        )
    if kind in {"seq2seq-lm", "image-classification"}:
        yield f"{where}: {step.method} takes a text and one stack of layers, found {kind}"


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
    recipe: Recipe, step: Quantize, exported: str | None, packed: Quantize | None, where: str
) -> Iterator[str]:
    on_cpu = step.in_torch or METHODS[step.method].on_cpu
    if not on_cpu and recipe.target.device == "cpu":
        yield (
            f"{where}: ONNX Runtime has no {step.method} products on the CPU, where this would be"
            " measured; expected target.device: cuda, or method: fp16"
        )
    if not on_cpu and step.allowed is not None:
        yield f"{where}: its limit is measured on the CPU, expected none with {step.method}"
    if step.allowed is not None and recipe.task.kind == "seq2seq-lm":
        yield (
            f"{where}: its limit chooses among the layers of one graph, found {recipe.task.kind},"
            " which gives two; leave the limit out"
        )
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
    if step.allowed is not None and splits.selection is None:
        yield f"{where}: its limit needs examples to choose on, expected task.splits.selection"
    yield from _limit_mistakes(recipe, step, where)


def _limit_mistakes(recipe: Recipe, limits: Limited | Limits | Slices, where: str) -> Iterator[str]:
    kind = recipe.task.kind
    name = recipe.task.metric or TASKS[kind].metrics[0]
    higher_is_better = METRICS[name].higher_is_better
    for key in ("max_drop", "max_relative_drop"):
        if getattr(limits, key, None) is not None and not higher_is_better:
            text = "perplexity grows when it gets worse, expected max_perplexity_ratio"
            yield f"{where}.{key}: {text}"
    if limits.max_perplexity_ratio is not None and higher_is_better:
        yield f"{where}.max_perplexity_ratio: {kind} has no perplexity, expected max_drop"
    if getattr(limits, "max_flips", None) is not None and METRICS[name].kind != "binary":
        yield f"{where}.max_flips: {name} does not call an example right or wrong; leave it out"
    if getattr(limits, "max_kl", None) is not None and not TASKS[kind].labelled:
        yield f"{where}.max_kl: {kind} has no class probabilities; leave it out"
    if getattr(limits, "min_agreement", None) is not None and TASKS[kind].regression:
        yield f"{where}.min_agreement: {kind} decides nothing; leave it out"


def _budget_mistakes(recipe: Recipe) -> Iterator[str]:
    budget = recipe.budget
    if budget.empty:
        yield "budget: found no limit, expected at least one, such as max_drop"
    yield from _limit_mistakes(recipe, budget, "budget")
    for part in ("slices", "regression"):
        if (limits := getattr(budget, part)) is not None:
            yield from _limit_mistakes(recipe, limits, f"budget.{part}")
    for name, share in LATENCIES.items():
        least = math.ceil(math.log(1 - TIMED_CONFIDENCE) / math.log(share) / CALLS)
        if getattr(budget, name) is not None and recipe.target.rounds < least:
            yield (
                f"budget.{name}: found target.rounds: {recipe.target.rounds}, expected {least} at"
                " least, for its interval to have an upper end"
            )
    if not recipe.target.dedicated:
        for name in budget.absolute:
            yield (
                f"budget.{name}: holds on a target that nothing else runs on, expected"
                " target.dedicated: true, or a ratio"
            )


def _kinds() -> dict[str, list[type[BaseModel]]]:
    """Return what has the keys that stand under each of the recipe's own; under "", those."""
    return {
        "": [Recipe],
        "model": [Model],
        "task": [TaskSettings, Splits],
        "target": [Target, Load],
        "budget": [Budget, Slices, Regression],
    }
