"""What a user writes of a step: the keys, their defaults, and what cannot stand together.

A step's settings know nothing of the other steps, of the model, or of the data.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from benchmarks.machine import Machine
from exporters import formats
from pipeline import bnb, gptq
from pipeline.compensation import REPAIRS
from pipeline.criteria import CRITERIA, GRADIENT, MOMENTS
from pipeline.masks import LEARNERS
from pipeline.quantization import METHODS
from pipeline.reading import Positive, Strict, unknown
from pipeline.weight_only import ALGORITHMS, ASYMMETRIC, CALIBRATED

Fraction = Annotated[float, Field(ge=0, lt=1)]


def one_of(known: Iterable[str]) -> AfterValidator:
    """Return a check that a name is known, with a suggestion when it is not."""
    names = sorted(known)

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(unknown(value, names))
        return value

    return AfterValidator(check)


class Training(Strict):
    """How the model is trained; with a teacher, towards the teacher's outputs too."""

    epochs: Positive = 1.0
    learning_rate: Positive = 5e-5
    batch_size: int = Field(default=32, ge=1)
    warmup: Fraction = 0.1
    """The share of the training in which the learning rate rises."""
    weight_decay: float = Field(default=0.01, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the models compute in; losses, weights and the optimizer stay as they are."""
    freeze_embeddings: bool = False
    """Leave the embedding tables as they are: less memory and time."""
    teacher: str | None = None
    """The stage whose outputs are imitated."""
    temperature: Positive = 2.0
    task_weight: float = Field(default=0.5, ge=0, le=1)
    """The weight of the task's own loss beside the teacher's."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """The weight of the distance between the hidden states of student and teacher."""
    patience: int | None = Field(default=None, ge=1)
    """Score the selection split at even distances, end after so many scores that are no better than
    the best, and keep the best weights."""
    evaluations: int = Field(default=10, ge=1)
    """How often the selection split is scored, with `patience`."""


class Goal(Strict):
    """What a model may cost on the target after a prune step, by one of these measures."""

    speedup: Annotated[float, Field(gt=1)] | None = None
    latency_ms: Positive | None = None
    multiply_adds: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share that is left."""
    parameters: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share that is left."""
    load: int = Field(default=0, ge=0)
    """At which of the target's loads, by its place among them."""
    quantized: bool = False
    """Times are those of models as the recipe's `quantize` will leave them, the uncut one too."""
    units: tuple[Literal["heads", "neurons", "layers"], ...] = Field(
        ("heads", "neurons"), min_length=1
    )
    """What may go. Layers go as a whole, beside heads or neurons."""
    search: int = Field(default=50, ge=0)
    """Steps of the search on the divergence from the dense model's outputs."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        measures = ("speedup", "latency_ms", "multiply_adds", "parameters")
        if set(self.units) == {"layers"}:
            raise ValueError("units: found layers alone, expected heads or neurons beside them")
        given = [name for name in measures if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"found {given or 'none'}, expected one of {list(measures)}")
        if self.quantized and not (self.speedup or self.latency_ms):
            raise ValueError(
                f"found `quantized` with {given[0]}, expected it with speedup or latency_ms"
            )
        return self


class Limited(Strict):
    """How much of the score on the selection split a step may take."""

    max_drop: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Absolute, for a metric where higher is better."""
    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None

    @property
    def allowed(self) -> float | None:
        """The largest loss, as `metrics.lost` counts it; None if there is no limit."""
        ratio = self.max_perplexity_ratio
        return self.max_drop if ratio is None else ratio - 1


class Prune(Limited):
    """Cut heads and neurons out of the model.

    With a limit, it stops before the round that takes more.
    """

    step: Literal["prune"]
    heads: Fraction = 0.0
    """The share of all head units that goes."""
    neurons: Fraction = 0.0
    """The share of all FFN neurons that goes."""
    layers: Fraction = 0.0
    """The share of all layers that goes, first of all."""
    sublayers: Fraction = 0.0
    """The share of all attentions and FFN that goes as a whole, before heads and neurons."""
    goal: Goal | None = None
    """In place of shares: what the model may cost; every layer gets a width of its own."""
    criterion: Annotated[str, one_of([*CRITERIA, *LEARNERS])] = "importance"
    repair: Annotated[str, one_of([*REPAIRS, "none"])] = "least-squares"
    per_layer: bool = False
    """The same share of every layer's units, in place of the lowest scores over all layers."""
    uniform: bool = False
    """Cut alike in every layer, and write a folder that stock transformers loads."""
    multiple: Annotated[int, Field(ge=1)] = 1
    """The number of neurons left in a layer is rounded to a multiple of this."""
    rounds: int = Field(default=1, ge=1)
    """Go to the shares in so many rounds: score anew, cut, repair, train."""
    finetune: Training | None = None
    """The training of every round, after a goal, or the one in which the criterion learns."""

    @property
    def calibrated(self) -> bool:
        """Whether the step needs calibration data."""
        scored = self.criterion in GRADIENT | MOMENTS
        judged = self.goal is not None or self.layers or self.sublayers
        return bool(scored or self.repair != "none" or judged)

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """What goes of layers, sublayers, heads and neurons."""
        return self.layers, self.sublayers, self.heads, self.neurons

    @model_validator(mode="after")
    def _cuts(self) -> Self:
        if any(self.shares) and self.goal is not None:
            raise ValueError("found shares and a `goal`, expected one of them")
        if not any(self.shares) and self.goal is None:
            raise ValueError(
                "expected a share of `heads`, `neurons`, `layers` or `sublayers` above 0,"
                " or a `goal`"
            )
        if self.criterion in LEARNERS and self.finetune is not None and self.finetune.patience:
            raise ValueError(
                f"{self.criterion} cuts more and more while it learns, so that early scores are the"
                " best; expected no `patience`"
            )
        if self.uniform and self.rounds > 1:
            raise ValueError("found `uniform` and `rounds`, expected one of them")
        if (self.layers or self.sublayers) and (self.rounds > 1 or self.criterion in LEARNERS):
            raise ValueError(
                f"layers and sublayers go at once, found rounds: {self.rounds} and criterion:"
                f" {self.criterion}; use several prune steps"
            )
        if self.sublayers and self.uniform:
            raise ValueError("found `sublayers` and `uniform`, expected one of them")
        beside = {
            self.criterion: self.criterion in LEARNERS,
            "rounds": self.rounds > 1,
            "per_layer": self.per_layer,
            "uniform": self.uniform,
            "a limit": self.allowed is not None,
        }
        found = [name for name, there in beside.items() if there]
        if self.goal is not None and found:
            raise ValueError(f"found {', '.join(found)} beside a goal, expected none of them")
        if self.criterion in LEARNERS and self.finetune is None:
            raise ValueError(f"{self.criterion} learns while the model trains, expected `finetune`")
        if self.criterion in LEARNERS and (self.rounds > 1 or self.allowed is not None):
            raise ValueError(
                f"{self.criterion} learns in one training, expected no `rounds` and no limit"
            )
        return self


class Finetune(Training):
    """Train the model."""

    step: Literal["finetune"]


class Quantize(Limited):
    """Store, and where the runtime can, compute in fewer bits; what a key does depends on it.

    With a limit, the layers that lose most are left as they are.
    """

    step: Literal["quantize"]
    method: Annotated[str, one_of([*METHODS, *bnb.METHODS, gptq.METHOD])] = "int8-dynamic"
    embeddings: bool = False
    """Quantize the embedding tables too."""
    migration: Fraction = 0.0
    """How much of what is hard to quantize moves from activations to weights (SmoothQuant)."""
    algorithm: Annotated[str, one_of(ALGORITHMS)] = "rtn"
    """How weights are rounded."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share a scale."""
    symmetric: bool | None = None
    """No zero points: unless given, so far as the algorithm can do without."""
    portable: bool = False
    """Standard ONNX operators alone, as other runtimes want them."""

    @property
    def in_torch(self) -> bool:
        """Whether it is the torch model that is quantized, and a torch model that comes of it."""
        return self.method in {*bnb.METHODS, gptq.METHOD}

    @property
    def ends_the_chain(self) -> bool:
        """Whether torch alone reads what the step writes, so that nothing can follow."""
        return self.method == gptq.METHOD

    @property
    def calibrated(self) -> bool:
        """Whether the step needs calibration data."""
        calibrated = self.ends_the_chain or (not self.in_torch and METHODS[self.method].calibrated)
        return calibrated or self.migration > 0 or self.algorithm in CALIBRATED

    @property
    def standard(self) -> bool:
        """Whether the graph that is quantized has standard operators alone."""
        return self.portable or (not self.in_torch and METHODS[self.method].whole)

    @property
    def options(self) -> dict[str, Any]:
        """What `quantization.Options` takes of the step."""
        given = self.model_dump(exclude={"step", "method", *Limited.model_fields})
        symmetric = self.algorithm not in ASYMMETRIC if self.symmetric is None else self.symmetric
        return given | {"symmetric": symmetric}

    def reduces_range(self, machine: Machine) -> bool:
        """Return whether weights get 7 bits, since the machine's products of 8 overflow.

        What is portable is for another runtime than the one here.
        """
        integer = not self.in_torch and METHODS[self.method].integer
        return integer and machine.saturates and not self.portable

    @property
    def onnxruntime_alone(self) -> str:
        """Why no engine can be built of what the step writes, and the way that works; or nothing.

        What TensorRT refuses: operators of ONNX Runtime's own, ranges that are found while the
        graph runs, zero points.
        """
        if self.in_torch:
            nf4 = (
                "nf4, which TensorRT has not: an engine would hold fp16 weights or wider; expected"
            )
            nf4 += " bnb-int8, or int4-weights with `portable: true`"
            return nf4 if self.method == "bnb-nf4" else ""
        method = METHODS[self.method]
        if method.whole or (self.portable and self.symmetric is not False):
            return ""
        if self.portable:
            return f"{self.method} with zero points, expected no `symmetric: false`"
        if "portable" in method.options:
            return f"{self.method} as ONNX Runtime alone reads it, expected `portable: true`"
        return (
            f"{self.method}, which ONNX Runtime alone reads, expected fp16 or bf16, or int8-static,"
            " int8-weights or int4-weights with `portable: true`"
        )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        known = {"step", "method"}
        if self.ends_the_chain:
            known |= {"block_size"}
        if not self.in_torch:
            known |= {*METHODS[self.method].options, *Limited.model_fields}
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        changed = {name for name, value in defaults.items() if getattr(self, name) != value}
        useless = sorted(changed - known)
        if useless:
            known -= {"step", "method", *Limited.model_fields}
            rest = f"none but {sorted(known)}" if known else "none of the others' keys"
            raise ValueError(f"found {useless} with {self.method}, expected {rest}")
        if self.algorithm in ASYMMETRIC and self.symmetric:
            raise ValueError(f"{self.algorithm} has zero points, expected no `symmetric: true`")
        columns = self.portable and self.method == "int8-weights"
        if columns and {"block_size", "symmetric"} & changed:
            raise ValueError(
                "portable int8-weights have a scale for each column, expected no `block_size` or"
                " `symmetric`"
            )
        if self.portable and self.algorithm != "rtn":
            raise ValueError(
                f"found `portable` and {self.algorithm}, expected rtn, the one algorithm that"
                " onnxruntime writes with standard operators"
            )
        return self


class Export(Strict):
    """Write the artifact in the format that is deployed."""

    step: Literal["export"]
    format: Annotated[str, one_of(formats())] = "onnx"
    workspace_bytes: int | None = Field(default=None, ge=1)
    """An engine's layer may use so much device memory beside its tensors."""
    timing_cache: str | None = None
    """A file with the times of kernels: a second build is faster with it. TensorRT's alone."""
    version_compatible: bool = False
    """The engine runs with later minor versions of TensorRT, too."""
    compute_capabilities: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """The GPUs that TensorRT for RTX builds for, such as [8.6, 8.9]; all that it supports unless
    given."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        given = [
            name
            for name in ("workspace_bytes", "timing_cache", "version_compatible")
            if getattr(self, name)
        ]
        given += ["compute_capabilities"] * bool(self.compute_capabilities)
        if given and self.format != "tensorrt":
            raise ValueError(f"found {given} with format {self.format}, expected format tensorrt")
        if self.compute_capabilities and (self.version_compatible or self.timing_cache):
            raise ValueError(
                "found `compute_capabilities`, of TensorRT for RTX, and `version_compatible` or"
                " `timing_cache`, of TensorRT; expected those of one of them"
            )
        return self


STEPS: Final[Mapping[str, type[BaseModel]]] = {
    "prune": Prune,
    "finetune": Finetune,
    "quantize": Quantize,
    "export": Export,
}
INNER: Final[Mapping[str, type[BaseModel]]] = {"finetune": Training, "goal": Goal}
"""Keys of a step that have keys themselves."""

Step = Annotated[Prune | Finetune | Quantize | Export, Field(discriminator="step")]


def trained(step: BaseModel) -> Training | None:
    """Return how a step trains, if it does."""
    return (
        step.finetune if isinstance(step, Prune) else step if isinstance(step, Finetune) else None
    )
