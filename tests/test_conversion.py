"""An engine of a model folder, without a recipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_model

from exporters import tensorrt
from pipeline import prune_heads, save_pretrained
from pipeline.checkpoint import ModelError
from pipeline.conversion import convert
from pipeline.manifest import read


def test_optimum_cli_builds_an_engine_of_a_model_that_was_cut(tmp_path):
    model = write_model(tmp_path / "model")
    prune_heads(model, {1: [0]})
    save_pretrained(model, tmp_path / "model")
    program = Path(sys.executable).with_name("optimum-cli")
    command = [program, "export", "tensorrt", tmp_path / "model", tmp_path / "engine",
               "--sequence", "1", "16", "64", "--compute-capabilities", "8.6"]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("built: tensorrt_rtx")
    about, _ = read(tmp_path / "engine")
    assert {"tensorrt/model.plan", "tensorrt/engine.json", "onnx/model.onnx"} <= about.keys()
    engine = json.loads((tmp_path / "engine" / "tensorrt" / "engine.json").read_text())
    assert engine["profile"]["input_ids"]["max"] == [32, 64]
    again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert again.returncode == 2
    assert "there already, expected a new folder" in again.stderr


@pytest.mark.parametrize(
    ("family", "batch", "message"),
    [
        ("llama", (1, 2, 4), "found LlamaForCausalLM, expected an encoder of text"),
        ("bert", (1, 8, 4), r"--batch: found \[1, 8, 4\], expected three rising numbers"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, family, batch, message):
    write_model(tmp_path / "model", family)
    with pytest.raises(ModelError, match=message):
        convert(str(tmp_path / "model"), tmp_path / "engine", batch=batch, sequence=(1, 8, 16),
                settings=tensorrt.Settings(compute_capabilities=(8.6,)))  # fmt: skip
    assert not (tmp_path / "engine").exists()
