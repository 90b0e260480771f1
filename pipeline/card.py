"""The model card of an artifact: what it is, what was measured, how to run and to check it.

Its metadata are those that the Hugging Face hub reads.
https://huggingface.co/docs/hub/model-cards
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCardData

from pipeline.report import check_line, evidence, stage_table, step_words

PIPELINES: Final = {
    "causal-lm": "text-generation",
    "seq2seq-lm": "text2text-generation",
    "text-regression": "text-classification",
}
"""The hub's name of a task, where it is another."""


def card(
    report: Mapping[str, Any], name: str, settings: Mapping[str, Any], *, answers: bool
) -> str:
    """Return README.md of an artifact.

    Args:
        report: the JSON of report.json.
        name: the model's.
        settings: what inference.json holds.
        answers: there is an infer.py.
    """
    recipe, last = report["recipe"], report["stages"][-1]
    runtime = settings["runtime"]
    source = recipe["model"]["source"]
    here = source.startswith("builtin:") or Path(source).expanduser().exists()
    data = recipe["task"]["data"]
    shown = Path(data).name if Path(data).expanduser().exists() else data
    task = PIPELINES.get(settings["task"], settings["task"])
    result = EvalResult(
        task_type=task,
        dataset_type=shown,
        dataset_name=shown,
        dataset_split=recipe["task"]["splits"]["gate"],
        metric_type=last["score"]["metric"],
        metric_value=round(last["score"]["value"], 6),
    )
    about = ModelCardData(
        base_model=None if here else source,
        eval_results=[result],
        library_name="transformers" if runtime == "torch" else "onnx",
        model_name=name,
        pipeline_tag=task,
        tags=["secateur", *sorted({step["step"] for step in recipe["steps"]})],
    )
    steps = "\n".join(f"1. {step_words(step)}" for step in recipe["steps"])
    checks = "\n".join(f"- {check_line(check)}" for check in report["verdict"]["checks"])
    use = {"onnxruntime": _ONNX, "tensorrt": _TENSORRT, "torch": _TORCH}[runtime]
    if answers:
        use = _INFER + use
    if last["format"] == "tensorrt" and runtime != "tensorrt":
        use += f"The engine was built ahead of time, and not run. {_TENSORRT}"
    needs = "no torch" if runtime == "onnxruntime" else "torch"
    return f"""---
{about.to_yaml()}
---

# {name}, compressed

`{name if here else source}`, made smaller and faster by secateur, and measured at every step:

{steps}

The licence and the limits of the model that it was made of hold for this one, too.

## Measured

{stage_table(report)}

Compared with the stage `{report["baseline"]}`. {evidence(report)}

The budget that it was released against, with 95 % intervals or those of its confidence:

{checks}

## Use

{use}
## Check

    secateur verify .            every file, the graph, the recorded outputs; needs {needs}

manifest.json holds the sha256 of every file, the recipe, what the source was, the machine with its
versions, and the verdict. On the recorded inputs (golden.npz), another machine should come within
{settings["tolerance"]:.1e} of the largest output.
"""


_INFER = """    pip install onnxruntime numpy tokenizers    (of images: pillow, no tokenizers)
    python infer.py "a text"                    (or an image file)
    python infer.py --golden                    the recorded inputs and outputs

"""

_ONNX = """The graph is `onnx/model.onnx`; inference.json holds the session options that it was
measured with.
For NVIDIA's Triton Inference Server: `tritonserver --model-repository triton`.

"""

_TORCH = """    from pipeline import from_pretrained  # of secateur: it opens what was cut

    model = from_pretrained(".")

"""

_TENSORRT = """`tensorrt/model.plan` is for the GPUs and the version of TensorRT that
`tensorrt/engine.json` names, built from `onnx/model.onnx`. For another one, make it again:

    secateur rebuild .

"""
