"""What is signed verifies with its key alone, and with no file changed, added, lost or renamed."""

import json
import os
import subprocess
import sys

import pytest
from conftest import secateur

from exporters import MissingDependency
from pipeline import signing
from pipeline.manifest import SIGNATURE, Damaged, read, seal
from pipeline.reading import RecipeError


@pytest.fixture
def folder(tmp_path):
    """Give a released folder with a file in a folder of its own, and one with a dot."""
    folder = tmp_path / "artifact"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(b"weights")
    (folder / ".gitignore").write_text("nothing")
    seal(folder, {"verdict": {"outcome": "pass"}})
    return folder


@pytest.fixture
def keys(tmp_path):
    """Give a function that writes a pair of keys, private and public."""
    pytest.importorskip("model_signing", reason="needs the extra `sign`")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def make(name, curve=ec.SECP256R1, password=None):
        key, pem = ec.generate_private_key(curve()), serialization.Encoding.PEM
        locked = serialization.NoEncryption()
        if password:
            locked = serialization.BestAvailableEncryption(password.encode())
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked))
        plain = serialization.PublicFormat.SubjectPublicKeyInfo
        public.write_bytes(key.public_key().public_bytes(pem, plain))
        return private, public

    return make


def test_what_was_signed_verifies_and_stays_what_its_manifest_says(folder, keys):
    private, public = keys("mine")
    before = read(folder)
    assert signing.sign(folder, private) == folder / SIGNATURE
    signing.check(folder, public)
    assert read(folder) == before
    signing.sign(folder, private)  # again
    signing.check(folder, public)
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        "artifact", "mine.pem", "mine.pub",
    ]  # fmt: skip


def change(path):
    path.write_bytes(b"Weights")


CHANGES = {
    "changed": lambda folder: change(folder / "onnx" / "model.onnx"),
    "changed manifest": lambda folder: seal(folder, {"verdict": {"outcome": "fail"}}),
    "added": lambda folder: (folder / "extra").write_text(""),
    "added with a dot": lambda folder: (folder / ".gitattributes").write_text(""),
    "lost": lambda folder: (folder / ".gitignore").unlink(),
    "renamed": lambda folder: (folder / "onnx").rename(folder / "graph"),
    "linked": lambda folder: (folder / "link").symlink_to("onnx"),
    "no signature": lambda folder: (folder / SIGNATURE).write_text("{}"),
    "not signed": lambda folder: (folder / SIGNATURE).unlink(),
}


@pytest.mark.parametrize("how", CHANGES)
def test_what_is_not_what_was_signed_is_refused(folder, keys, how):
    private, public = keys("mine")
    signing.sign(folder, private)
    CHANGES[how](folder)
    with pytest.raises(Damaged, match=r"model\.sig: (does not verify|found none, expected a sig)"):
        signing.check(folder, public)


def test_a_manifest_that_was_written_again_does_not_help(folder, keys):
    private, public = keys("mine")
    signing.sign(folder, private)
    change(folder / "onnx" / "model.onnx")
    seal(folder, {"verdict": {"outcome": "pass"}})
    read(folder)  # the manifest is good
    done = secateur("verify", folder, "--public-key", public)
    assert done.returncode == 2
    assert "model.sig: does not verify with" in done.stderr


def test_every_byte_of_what_is_signed_is_guarded(folder, keys):
    private, public = keys("mine")
    signing.sign(folder, private)
    envelope = json.loads((folder / SIGNATURE).read_text())["dsseEnvelope"]
    whole = json.loads((folder / SIGNATURE).read_text())
    for where, text in (
        ("payload", envelope["payload"]),
        ("sig", envelope["signatures"][0]["sig"]),
    ):
        for at in range(0, len(text) - 2, 7):
            other = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
            changed = json.loads(json.dumps(whole))
            held = changed["dsseEnvelope"]
            (held if where == "payload" else held["signatures"][0])[where] = other
            (folder / SIGNATURE).write_text(json.dumps(changed))
            with pytest.raises(Damaged, match="does not verify"):
                signing.check(folder, public)


def test_another_key_is_refused(folder, keys):
    private, _ = keys("mine")
    _, other = keys("other")
    signing.sign(folder, private)
    with pytest.raises(Damaged, match=r"does not verify with .*other\.pub: Key mismatch"):
        signing.check(folder, other)


def test_a_key_with_a_password(folder, keys, monkeypatch):
    private, public = keys("mine", password="secret")
    for given in (None, "wrong"):
        with pytest.raises(
            RecipeError, match=r"mine\.pem: cannot be used: .*SECATEUR_KEY_PASSWORD"
        ):
            signing.sign(folder, private, given)
    assert not (folder / SIGNATURE).exists()
    monkeypatch.setenv("SECATEUR_KEY_PASSWORD", "secret")
    done = secateur("sign", folder, "--key", private)
    assert (done.returncode, done.stdout.strip()) == (0, f"signed: {folder}/model.sig")
    signing.check(folder, public)


def test_what_is_no_key_or_not_whole_is_not_signed(folder, keys, tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ec

    private, _ = keys("mine")
    with pytest.raises(RecipeError, match=r"none\.pem: cannot be read: No such file"):
        signing.sign(folder, tmp_path / "none.pem")
    signing.sign(folder, private)
    with pytest.raises(RecipeError, match=r"none\.pem: cannot be read: No such file"):
        signing.check(folder, tmp_path / "none.pem")
    with pytest.raises(RecipeError, match="Unsupported key for curve"):
        signing.sign(folder, keys("other", ec.SECP256K1)[0])
    with pytest.raises(RecipeError, match="cannot be used"):
        signing.sign(folder, folder / ".gitignore")
    change(folder / "onnx" / "model.onnx")
    with pytest.raises(Damaged, match=r"model\.onnx: found the sha256"):
        signing.sign(folder, private)


def test_the_tool_of_the_project_verifies_it_too(folder, keys):
    private, public = keys("mine")
    signing.sign(folder, private)
    command = [sys.executable, "-m", "model_signing", "verify", "key", folder]
    command += ["--signature", folder / SIGNATURE, "--public_key", public, "--no-ignore-git-paths"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_the_package_it_is_exit_4(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingDependency, match=r"not installed, .*install the extra `sign`: pip"):
        signing.check(folder, tmp_path / "key")
    done = secateur("sign", folder, "--key", tmp_path / "key")
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
