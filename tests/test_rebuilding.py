"""An engine is made again in place, from the graph beside it, or nothing is changed."""

import hashlib
import shutil

import pytest
from conftest import secateur

from exporters import tensorrt
from pipeline import rebuilding
from pipeline.checkpoint import ModelError
from pipeline.manifest import seal
from pipeline.rebuilding import rebuild
from pipeline.store import verify


def test_an_artifact_is_rebuilt_as_a_whole(tmp_path, built_ahead):
    folder, _ = built_ahead
    artifact = tmp_path / "artifact"
    shutil.copytree(folder / "out" / "artifact", artifact)
    before = verify(artifact)
    (artifact / "model.sig").write_text("the signature of what was there before")
    done = secateur("rebuild", artifact)
    assert done.returncode == 0, done.stderr
    assert "rebuilt: tensorrt_rtx" in done.stdout
    assert "not measured" in done.stdout
    after = verify(artifact)
    assert after.about["verdict"] == before.about["verdict"]
    assert after.about["rebuilt"]["verdict"].startswith("that of the engine before")
    about = tensorrt.described(artifact)
    plan = (artifact / tensorrt.PLAN).read_bytes()
    assert about["plan"]["sha256"] == hashlib.sha256(plan).hexdigest()
    assert about["settings"]["compute_capabilities"] == [8.6]
    assert not (artifact / "model.sig").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_what_cannot_be_rebuilt_is_left_as_it_is(tmp_path, built_ahead):
    folder, _ = built_ahead
    artifact = tmp_path / "artifact"
    shutil.copytree(folder / "out" / "artifact", artifact)
    about = verify(artifact).about
    graph = artifact / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    done = secateur("rebuild", artifact)
    assert done.returncode == 2
    assert "onnx/model.onnx: found " in done.stderr
    assert "bytes, expected" in done.stderr
    seal(artifact, about)
    with pytest.raises(ModelError, match=r"model\.onnx: not the file that the engine was built"):
        rebuild(artifact)
    assert verify(artifact) is not None
    shutil.rmtree(artifact / "tensorrt")
    seal(artifact, about)
    with pytest.raises(
        ModelError, match=r"found no tensorrt/engine\.json, expected an artifact of"
    ):
        rebuild(artifact)


def test_no_file_that_an_engine_names_is_written():
    """A timing cache is the builder's own file, wherever an artifact from elsewhere has it."""
    settings = dict.fromkeys(tensorrt.RECORDED, ()) | {"timing_cache": "/etc/passwd"}
    before = {"settings": settings, "library": {"name": "tensorrt_rtx"}}
    assert rebuilding._settings(before).timing_cache is None
