"""An artifact goes to the hub as it is, with what an earlier one left behind taken away."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.machine import Unavailable
from pipeline.hub import push
from pipeline.manifest import Damaged, content, seal


class Hub(BaseHTTPRequestHandler):
    """What the library asks of the hub, as far as an upload goes."""

    def do_GET(self):
        if "/tree/" in self.path:
            files = [
                {"type": "file", "path": path, "size": 1, "oid": "0"} for path in self.server.there
            ]
            self.answer(files)
        else:
            self.answer({"id": "org/name", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/create"):
            self.server.created = json.loads(body)
            self.answer({"url": f"http://{self.headers['Host']}/org/name", "id": "0"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": file["path"], **modes} for file in files]})
        elif "/commit/" in self.path:
            self.server.lines = [json.loads(line) for line in body.splitlines()]
            self.answer(
                {
                    "commitOid": "0" * 40,
                    "commitUrl": f"http://{self.headers['Host']}/org/name/commit/0",
                }
            )
        else:
            self.answer({"errors": [], "warnings": []})

    def answer(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def artifact(tmp_path):
    (tmp_path / "artifact" / "onnx").mkdir(parents=True)
    (tmp_path / "artifact" / "config.json").write_text("{}")
    (tmp_path / "artifact" / "onnx" / "model.onnx").write_bytes(b"\x00\x01graph")
    seal(tmp_path / "artifact", {"verdict": {"outcome": "pass"}})
    return tmp_path / "artifact"


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pushed(artifact, hub, home):
    script = (
        "import sys; from pathlib import Path; from pipeline.hub import push;"
        "print(push(Path(sys.argv[1]), 'org/name'))"
    )
    return subprocess.run(
        [sys.executable, "-c", script, artifact],
        capture_output=True, text=True, check=False, timeout=100,
        env=os.environ | {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "HF_HOME": str(home),
                          "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"},
    )  # fmt: skip


def test_every_file_of_the_manifest_is_uploaded_and_no_other_stays(artifact, hub, tmp_path):
    hub.there = ["left.bin", "config.json", "manifest.json"]
    ran = pushed(artifact, hub, tmp_path / "home")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == f"http://127.0.0.1:{hub.server_port}/org/name/commit/0"
    assert hub.created["visibility"] == "private"
    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
             for line in hub.lines if line["key"] == "file"}  # fmt: skip
    assert files.keys() == {*content(artifact), "manifest.json"}
    assert files["onnx/model.onnx"] == b"\x00\x01graph"
    gone = [line["value"]["path"] for line in hub.lines if line["key"] == "deletedFile"]
    assert gone == ["left.bin"]


def test_a_repository_of_something_else_is_left_as_it_is(artifact, hub, tmp_path):
    hub.there = [".gitattributes", "README.md", "model.safetensors"]
    ran = pushed(artifact, hub, tmp_path / "home")
    assert ran.returncode == 1
    assert "--push org/name: found 2 files of something else there" in ran.stderr
    assert not hasattr(hub, "lines")


def test_a_hub_that_is_not_there_is_told(artifact):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(Unavailable, match="--push org/name: the hub did not take it"):
        push(artifact, "org/name")


def test_a_damaged_artifact_stays_here(artifact):
    (artifact / "config.json").write_text("{ }")
    with pytest.raises(Damaged, match=r"config.json: found 3 bytes, expected 2"):
        push(artifact, "org/name")
