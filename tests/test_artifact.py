"""What a run publishes, run and checked as its users do it: without torch, from its own folder."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROWS, secateur, write_recipe

from exporters import ExportError
from exporters.onnx import triton
from pipeline import run
from pipeline.artifact import try_out, without_paths
from pipeline.manifest import Damaged, read, seal
from pipeline.verification import verify

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = (
    "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'datasets')));"
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Give the artifact of a run."""
    folder = tmp_path_factory.mktemp("published")
    steps = [{"step": "finetune", "epochs": 10, "learning_rate": 2e-3}, {"step": "quantize"}]
    assert run(write_recipe(folder, steps=steps), folder / "out").verdict.outcome == "pass"
    return folder / "out" / "artifact"


@pytest.fixture
def artifact(published, tmp_path):
    """Give a copy that may be damaged."""
    shutil.copytree(published, tmp_path / "artifact")
    return tmp_path / "artifact"


def python(*arguments, cwd=None):
    """Run Python as a user does who has none of the project."""
    command = [sys.executable, "-P", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_infer_answers_as_the_stage_that_was_judged(published, tmp_path):
    texts = [text for text, _ in ROWS[800:830]]
    script = f"{WITHOUT_TORCH} import runpy; runpy.run_path('infer.py', run_name='__main__')"
    ran = python("-c", script, *texts, cwd=published)
    assert ran.returncode == 0, ran.stderr
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    right = [answer["label"] == f"LABEL_{label}" for answer, (_, label) in
             zip(answers, ROWS[800:830], strict=True)]  # fmt: skip
    assert sum(right) >= 24
    assert all(0.5 <= answer["probability"] <= 1 for answer in answers)


def test_infer_meets_the_recorded_outputs(published):
    ran = python("infer.py", "--golden", cwd=published)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("golden outputs: difference ")


def test_other_outputs_than_a_moment_ago_are_not_published(artifact):
    recorded = dict(np.load(artifact / "golden.npz"))
    recorded["output.logits"] += 1
    np.savez(artifact / "golden.npz", allow_pickle=False, **recorded)
    with pytest.raises(ExportError, match=r"model.onnx: found outputs that differ by .* from one"):
        try_out(artifact)


def test_verify_says_what_is_not_installed(published):
    script = (
        "import sys; sys.modules['onnxruntime'] = None;"
        f"from pipeline.cli import main; main(['verify', {str(published)!r}])"
    )
    ran = python("-c", "import sys; sys.path.insert(0, '.');" + script, cwd=ROOT)
    assert ran.returncode == 4
    assert "onnxruntime: not installed" in ran.stderr


@pytest.mark.parametrize(
    ("changed", "code", "told"),
    [
        ({"device": "cuda"}, 4, "expected CUDAExecutionProvider"),
        ({"runtime": "abacus"}, 2, "inference.json: found no sound settings"),
        ({"tolerance": "much"}, 2, "inference.json: found no sound settings"),
        ({"threads": None}, 2, "inference.json: found no sound settings"),
    ],
)
def test_verify_says_in_a_line_what_cannot_be_run(artifact, changed, code, told):
    settings = json.loads((artifact / "inference.json").read_text())
    (artifact / "inference.json").write_text(json.dumps(settings | changed))
    about = json.loads((artifact / "manifest.json").read_text())["about"]
    (artifact / "manifest.json").unlink()
    seal(artifact, about)
    ran = secateur("verify", artifact)
    assert ran.returncode == code, ran.stderr
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr


def test_infer_fails_beside_other_outputs(artifact):
    recorded = dict(np.load(artifact / "golden.npz"))
    recorded["output.logits"] = recorded["output.logits"][::-1]
    np.savez(artifact / "golden.npz", allow_pickle=False, **recorded)
    assert python("infer.py", "--golden", cwd=artifact).returncode == 1


def test_verify_needs_no_torch(published):
    script = f"{WITHOUT_TORCH} from pipeline.cli import main; main(['verify', '{published}'])"
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "released as: pass" in ran.stdout


def damage_a_bit(folder):
    path = folder / "onnx" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(folder):
    path = folder / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])


def put_a_link(folder):
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


def lose_a_file(folder):
    (folder / "tokenizer.json").unlink()


def add_a_file(folder):
    (folder / "extra.py").write_text("")


def edit_the_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"outcome": "pass"', '"outcome": "fail"', 1))


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_a_bit, "onnx/model.onnx: found the sha256 "),
        (cut_short, "onnx/model.onnx: found .* bytes, expected .*; it was cut or changed"),
        (put_a_link, "config.json: found a link, expected a plain file"),
        (lose_a_file, "tokenizer.json: missing"),
        (add_a_file, "extra.py: found a file that the manifest does not name"),
        (edit_the_manifest, "manifest.json: found another content than its own sha256 says"),
        (lose_the_manifest, "manifest.json: found none, expected a folder that secateur wrote"),
    ],
)
def test_damage_is_told_with_the_file(artifact, damage, told):
    damage(artifact)
    ran = secateur("verify", artifact)
    assert ran.returncode == 2
    assert re.search(told, ran.stderr)
    assert "Traceback" not in ran.stderr


def test_a_manifest_that_is_no_json_is_told(artifact):
    (artifact / "manifest.json").write_text("{")
    with pytest.raises(Damaged, match=r"manifest.json: cannot be read"):
        read(artifact)


def test_other_outputs_are_told_though_the_files_are_those_of_the_manifest(artifact):
    recorded = dict(np.load(artifact / "golden.npz"))
    recorded["output.logits"] *= 1.5
    np.savez(artifact / "golden.npz", allow_pickle=False, **recorded)
    seal(artifact, read_about(artifact))
    with pytest.raises(Damaged, match=r"found outputs that differ by .* from the recorded ones"):
        verify(artifact)


def read_about(folder):
    return json.loads((folder / "manifest.json").read_text())["about"]


def test_a_graph_that_is_none_is_told(artifact):
    about = read_about(artifact)
    (artifact / "onnx" / "model.onnx").write_bytes(b"no graph at all")
    seal(artifact, about)
    with pytest.raises(Damaged, match=r"model.onnx: not a sound graph"):
        verify(artifact)


def test_weights_outside_the_folder_are_told(artifact):
    about = read_about(artifact)
    path = artifact / "onnx" / "model.onnx"
    graph = onnx.load(path)
    onnx.save(graph, path, save_as_external_data=True, location="elsewhere.bin", size_threshold=0)
    (artifact / "onnx" / "elsewhere.bin").rename(artifact.parent / "elsewhere.bin")
    graph = onnx.load(path, load_external_data=False)
    for weight in graph.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = "../../elsewhere.bin"
    path.write_bytes(graph.SerializeToString())
    seal(artifact, about)
    with pytest.raises(
        Damaged, match=r"found the weights .* in \.\./\.\./elsewhere\.bin, expected them in"
    ):
        verify(artifact)


def test_a_stage_is_no_artifact(published):
    (stage, *_) = published.parent.glob("stages/quantize-*")
    with pytest.raises(Damaged, match=r"inference.json: found none, expected that of a released"):
        verify(stage)


def test_the_card_has_the_measured_numbers(published):
    card = (published / "README.md").read_text()
    report = json.loads((published.parent / "report.json").read_text())
    assert f"{report['stages'][-1]['score']['value']:.4f}" in card
    assert "pipeline_tag: text-classification" in card
    assert str(published.parent.parent) not in card  # the paths of this machine


def test_the_manifest_says_where_it_comes_from(published):
    about = read_about(published)
    assert "model.safetensors" in about["source"]
    assert about["machine"]["versions"]["onnxruntime"]
    assert about["recipe"]["steps"][1]["step"] == "quantize"


def test_the_model_repository_names_what_the_graph_takes(published):
    (model,) = (published / "triton").iterdir()
    text = (model / "config.pbtxt").read_text()
    assert f'name: "{model.name}"' in text
    assert '{ name: "input_ids", data_type: TYPE_INT64, dims: [-1] }' in text
    assert '{ name: "logits", data_type: TYPE_FP32, dims: [2] }' in text
    served = (model / "1" / "model.onnx").read_bytes()
    assert served == (published / "onnx" / "model.onnx").read_bytes()


def test_weights_beside_a_graph_come_along(tmp_path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 4])
    (tmp_path / "model.onnx_data").write_bytes(b"weights")
    graph = onnx.helper.make_graph([], "g", [value], [value])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    triton.write(tmp_path / "model.onnx", tmp_path / "t", "m", device="cuda", threads=1, rows=3)
    assert (tmp_path / "t" / "m" / "1" / "model.onnx_data").read_bytes() == b"weights"
    assert "kind: KIND_GPU" in (tmp_path / "t" / "m" / "config.pbtxt").read_text()


def test_no_folder_of_this_machine_is_published(tmp_path):
    (tmp_path / "data.csv").write_text("")
    recipe = {"model": {"source": str(tmp_path)}, "task": {"data": str(tmp_path / "data.csv")},
              "steps": [{"step": "export", "format": "onnx"}]}  # fmt: skip
    assert without_paths(recipe) == {
        "model": {"source": tmp_path.name}, "task": {"data": "data.csv"}, "steps": recipe["steps"],
    }  # fmt: skip
    assert without_paths({"model": "org/name"}) == {"model": "org/name"}


def test_a_torch_artifact_is_verified_too(tmp_path):
    steps = [{"step": "finetune", "epochs": 10, "learning_rate": 2e-3},
             {"step": "prune", "heads": 0.25}]  # fmt: skip
    target = {"runtime": "torch", "loads": [{"batch": 2, "sequence": 16}], "rounds": 6,
              "threads": 1}  # fmt: skip
    run(write_recipe(tmp_path, steps=steps, target=target), tmp_path / "out")
    found = verify(tmp_path / "out" / "artifact")
    assert found.graphs == 0
    assert found.difference <= 1e-5
    assert "from_pretrained" in (tmp_path / "out" / "artifact" / "README.md").read_text()
