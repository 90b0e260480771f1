"""A model as a folder: config.json, safetensors, and in the config what was cut.

A pruned folder holds matrices of other shapes than its family's class builds, so that the stock
`from_pretrained` refuses it. Here it is loaded through a subclass made on the spot, whose
`__init__` builds the model as usual and then cuts it as `config.pruning` says; everything else
(shards, dtypes, tied weights, device maps) is the stock loader's work. No pickle is read or
written, and no code that comes with a model is run.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from benchmarks.machine import Unavailable
from benchmarks.worker import Arrays, Predictor
from exporters import without_copies
from exporters.onnx.graph import quiet
from pipeline import bnb, gptq, selfcheck, surgery, trust

HUB: Final = (
    "revision",
    "subfolder",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "proxies",
)
"""Where a file is looked for: options of the configuration as of the weights."""
LABELS: Final = ("num_labels", "id2label", "label2id")
MASKS: Final = re.compile(r"\.(attn|attention)\.(masked_)?bias$")
"""Causal masks, which old files of GPT-2 and GPT-NeoX hold as tensors."""


UNSOUND: Final = (ArithmeticError, LookupError, RuntimeError)
"""What the library raises where the numbers and names of a configuration make no model."""


class ModelError(ValueError):
    """A model is missing, damaged, or not fit for its task. Printed without a traceback."""


def save_pretrained(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the model, cut or not, as config.json and safetensors; the tokenizer is not a part.

    Raises:
        NotADirectoryError: `folder` is a file.
        QuantizationError: the model was quantized, and called, see `bnb.check_unpacked`.
    """
    bnb.check_unpacked(model)
    if Path(folder).is_file():  # the library says so in a log line, and goes on
        raise NotADirectoryError(f"{folder}: found a file, expected a folder or none")
    model.save_pretrained(folder)


def from_pretrained(
    source: str | Path, auto_class: str | None = None, **options: Any
) -> PreTrainedModel:
    """Return the model of a folder or a hub id, in evaluation mode.

    Args:
        source: a folder that `save_pretrained` wrote, any other Hugging Face folder, or a hub id.
        auto_class: the name of the `AutoModelFor...` class; the class that was saved unless given.
        options: passed on to the library's `from_pretrained`; of the configuration's own numbers
            `num_labels`, `id2label` and `label2id` alone may be given.

    Raises:
        ModelError: no such model, damaged files, an option that is not known, tensors that are
            missing, of another shape, of layers that the model does not have, or with NaN; weights
            that are pickles, or code that comes with the model.
    """
    model, missing = load(source, auto_class, **options)
    if missing:
        raise ModelError(
            f"{source}: found no {_few(missing)}, expected every tensor of {type(model).__name__}"
        )
    return model


def load(
    source: str | Path, auto_class: str | None = None, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model and the names of the tensors that its files lack (they are random).

    Raises:
        ModelError: as `from_pretrained`, but for missing tensors.
    """
    config = read_config(source, **{name: options[name] for name in HUB if name in options})
    if Path(source).is_dir():
        with untrusted():
            trust.refuse_pickles(Path(source, options.get("subfolder", "")))
    kind = model_class(source, config, auto_class)
    config.update({name: options.pop(name) for name in LABELS if name in options})
    # Else weights of the hub that are no safetensors are fetched from a bot's pull request, another
    # commit than the one that is recorded.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        with _quantized(config, options):
            loaded: Any = _pruned(kind).from_pretrained(
                source,
                config=config,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are told below, by name
                **options,
            )
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{source}: {first_line(error)}") from error
    except (OSError, *UNSOUND) as error:
        raise ModelError(f"{source}: cannot be loaded: {first_line(error)}") from error
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise ModelError(
            f"{source}: found an option that cannot be given here: {first_line(error)}"
        ) from error
    except Exception as error:
        # safetensors' own error, which derives from Exception alone.
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(f"{source}: damaged weights: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    check(source, model, info)
    bnb.settle(model)
    model.eval()
    return model, sorted(info["missing_keys"])


def check(source: str | Path, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Compare files and model; `info` has the library's `unexpected_keys` and `mismatched_keys`.

    Raises:
        ModelError: they do not go together, or hold what is no number.
    """
    kind = type(model)
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"])
        raise ModelError(
            f"{source}: found {name} of the shape {tuple(found)}, expected {tuple(expected)} as"
            f" {kind.__name__} has it; the files are of another model"
        )
    # A head may be left behind, and masks of old files, but no layer.
    unexpected = [
        name
        for name in sorted(info["unexpected_keys"])
        if re.search(r"\.\d+\.", name) and not MASKS.search(name)
    ]
    if unexpected:
        raise ModelError(
            f"{source}: found {_few(unexpected)}, which {kind.__name__} does not have;"
            " the files are of another model or of a larger one"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue  # what lies on disk is read when it is used
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{source}: found NaN or infinity in {name}, expected numbers")


def without_weights(
    source: str | Path, auto_class: str | None = None, revision: str | None = None
) -> PreTrainedModel:
    """Return the model as its config says, cut or not, on the device `meta`.

    Raises:
        ModelError: no such model, or not one of a transformers class.
    """
    config = read_config(source, revision)
    config._attn_implementation = "eager"  # noqa: SLF001 - as from_pretrained's argument does
    kind = _pruned(model_class(source, config, auto_class))
    try:
        with torch.device("meta"):
            return kind(config).eval()
    except (ValueError, *UNSOUND) as error:
        raise ModelError(f"{source}: {first_line(error)}") from error


def skeleton(source: str | Path) -> PreTrainedModel:
    """Return the model that `from_pretrained` would, with parameters on the device `meta`.

    What its class computes and does not save, such as rotary frequencies, is there.

    Raises:
        ModelError: no such model, or not one of a transformers class.
    """
    config = read_config(source)
    kind = _pruned(model_class(source, config, None))
    try:
        with init_empty_weights(include_buffers=False):
            return kind(config).eval()
    except (ValueError, *UNSOUND) as error:
        raise ModelError(f"{source}: {first_line(error)}") from error


def read_config(
    source: str | Path, revision: str | None = None, **options: Any
) -> PretrainedConfig:
    """Return the configuration of a folder or a hub id; `options` are some of `HUB`.

    Raises:
        ModelError: there is none, it is not one, or it names code that comes with the model.
    """
    path = Path(source)
    looks_local = str(source).startswith((".", "/", "~"))
    if looks_local and not path.is_dir():
        raise ModelError(f"{source}: no such folder")
    if path.is_dir() and not (path / options.get("subfolder", "") / "config.json").is_file():
        raise ModelError(f"{source}: found no config.json, expected a Hugging Face model folder")
    options["revision"] = revision or "main"
    look_through(source, **options)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # what is wrong in a file makes the library stumble in any way
        if path.is_dir():
            raise ModelError(f"{source}/config.json: {first_line(error)}") from error
        raise ModelError(
            f"{source}: found neither as a folder here nor on the hub or in its local cache"
            f" ({first_line(error)})"
        ) from error
    attention = config._attn_implementation  # noqa: SLF001 - not in to_dict
    with untrusted():  # on the hub, it may be another one by now
        trust.refuse_code(
            config.to_dict() | {"attn_implementation": attention}, f"{source}/config.json"
        )
        trust.refuse_elsewhere(getattr(config, trust.WEIGHTS, None), source)
    return config


def look_through(source: str | Path, **hub: Any) -> None:
    """Raise ModelError if what comes with a model is more than data; `hub` are some of `HUB`."""
    with untrusted():
        trust.check(source, **hub)


def _quantized(config: PretrainedConfig, options: dict[str, Any]) -> AbstractContextManager[None]:
    """Return what to load in, with the options that quantized weights need, if they are."""
    quantized = options.get("quantization_config", getattr(config, "quantization_config", None))
    if quantized is not None and bnb.asked_for(quantized):
        bnb.library()
        options.setdefault("device_map", {"": "cpu"})  # else a GPU, if there is one
    if quantized is not None and gptq.asked_for(quantized):
        gptq.library()
        return quiet()  # it says which kernels it looks at
    return nullcontext()


@contextmanager
def untrusted() -> Iterator[None]:
    """Raise ModelError in the place of `trust.Untrusted`."""
    try:
        yield
    except trust.Untrusted as error:
        raise ModelError(str(error)) from error


def model_class(
    source: str | Path, config: PretrainedConfig, auto_class: str | None
) -> type[PreTrainedModel]:
    """Return the class of a model, or the one that `auto_class` has for it.

    Raises:
        ModelError: there is no such class.
    """
    if auto_class is None:
        names = config.architectures or []
        kind = getattr(transformers, names[0], None) if names else None
        if kind is None:
            raise ModelError(
                f"{source}: found architectures {names}, expected a transformers class"
            )
        return kind
    mapping = getattr(transformers, auto_class)._model_mapping  # noqa: SLF001 - no public way
    if type(config) not in mapping:
        raise ModelError(
            f"{source}: found a {config.model_type} model, which has no {auto_class};"
            " choose another task.kind or model"
        )
    kind = mapping[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


def _pruned(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass that cuts itself, as it is built, to what its config says is left."""

    def __init__(  # noqa: N807 - it becomes the class's
        self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any
    ) -> None:
        cut: Mapping[str, Any] | None = getattr(config, "pruning", None)
        if cut and not isinstance(cut, Mapping):
            raise ModelError(f"config.json: found pruning: {cut!r}, expected a mapping")
        if cut:
            config.pruning = None
        kind.__init__(self, config, *args, **kwargs)
        if cut:
            if "like" in cut:  # it was checked when it was cut
                self.config.pruning = {"like": cut["like"]}
            selfcheck.ensure(self)
            try:
                surgery.apply(self, cut)
            except (AttributeError, TypeError) as error:
                raise ModelError(
                    f"config.json: found a `pruning` of another form: {error}"
                ) from error
            # The record is written anew by the cut itself; keep every entry that was read.
            self.config.pruning = cut

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def open_predictor(folder: Path, *, device: str, threads: int) -> Predictor:
    """Return the predictor of a torch artifact: arrays of inputs to arrays of outputs.

    Raises:
        Unavailable: the device is not there.
    """
    return predictor(open_model(folder, device=device, threads=threads))


def open_resident(folder: Path, *, device: str, threads: int) -> Predictor:
    """Return a predictor that copies nothing back, see `exporters.without_copies`.

    Raises:
        Unavailable: the device is not there.
    """
    model = open_model(folder, device=device, threads=threads)

    def compute(tensors: dict[str, torch.Tensor]) -> None:
        with torch.inference_mode():
            model(**tensors)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return without_copies(lambda inputs: _put(inputs, model), compute)


def _put(inputs: Arrays, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(x).to(model.device) for name, x in inputs.items()}


def open_model(folder: Path, *, device: str, threads: int) -> PreTrainedModel:
    """Return the model of a folder where it is to run, in evaluation mode.

    Raises:
        Unavailable: the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("target.device: found no CUDA device, expected one; use device: cpu")
    torch.set_num_threads(threads)
    return nn.Module.to(from_pretrained(folder), device).eval()


def predictor(model: PreTrainedModel) -> Predictor:
    """Return the predictor of a model, in evaluation mode while it predicts."""

    def predict(inputs: Arrays) -> Arrays:
        model.eval()
        with torch.inference_mode():
            outputs = model(**_put(inputs, model))
        return {
            name: value.float().cpu().numpy()
            for name, value in outputs.items()
            if isinstance(value, torch.Tensor)
        }

    return predict


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""  # noqa: PLR2004
    return ", ".join(names[:3]) + rest


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
