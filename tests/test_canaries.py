"""Files that would create `canary` if any of their code were run, or any of their paths written."""

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import multiplying, secateur, write_recipe
from onnx import TensorProto
from released import released, released_torch

from pipeline import from_pretrained
from pipeline.budget import Budget
from pipeline.checkpoint import ModelError
from pipeline.manifest import fingerprint, seal
from pipeline.reading import RecipeError

CANARY = "canary"


class Bomb:
    """Creates the canary, here, when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path(CANARY),)


PICKLE = pickle.dumps(Bomb())
CODE = f"open({CANARY!r}, 'w').close()\n"
SHELL = f"touch {CANARY}"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Give a folder with a model, its data and a recipe."""
    folder = tmp_path_factory.mktemp("good")
    write_recipe(folder)
    return folder


@pytest.fixture
def here(good, tmp_path, monkeypatch):
    """Give a copy of it, where commands are run, with code beside the model and the data."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    change_recipe(model={"source": "model"}, data="data.csv")
    for name in ("evil.py", "modeling_evil.py", "custom_generate/generate.py", "setup.py"):
        path = Path("model", name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(CODE)
    return tmp_path


def change_recipe(model=None, **task):
    """Change the recipe's model, and keys of its task."""
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["model"] |= model or {}
    recipe["task"] |= task
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))


def config(name="config.json", **changes):
    def change():
        path = Path("model", name)
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(held | changes))

    return change


def weights(name, content=PICKLE):
    """Return what leaves pickles as the only weights, under such names."""

    def change():
        Path("model", "model.safetensors").unlink()
        Path("model", name).write_bytes(content)

    return change


def zipped():
    """Return a bomb as torch writes it."""
    stream = io.BytesIO()
    torch.save(Bomb(), stream)
    return stream.getvalue()


def sharded():
    weights("pytorch_model.bin", zipped())()
    index = {"metadata": {}, "weight_map": {"classifier.bias": "pytorch_model.bin"}}
    Path("model", "model.safetensors.index.json").write_text(json.dumps(index))


def named():
    weights("adapter_model.bin", zipped())()
    config(transformers_weights="adapter_model.bin")()


def instead(**changes):
    """Return what has another configuration read, beside it a pickle and the good weights."""

    def change():
        held = json.loads(Path("model", "config.json").read_text())
        Path("model", "config.4.0.0.json").write_text(json.dumps(held | changes))
        Path("model", "adapter_model.bin").write_bytes(zipped())
        config(configuration_files=["config.4.0.0.json"])()

    return change


MODELS = {
    "pickled weights": weights("pytorch_model.bin"),
    "zipped weights": weights("pytorch_model.bin", zipped()),
    "weights under another name": weights("model.pkl"),
    "a pickle called safetensors": weights("model.safetensors"),
    "a zip called safetensors": weights("model.safetensors", zipped()),
    "an index of pickles": sharded,
    "weights that the config names": named,
    "weights that another config names": instead(transformers_weights="adapter_model.bin"),
    "an attention in another config": instead(_attn_implementation_internal="org/kernel"),
    "another vocabulary": config(
        "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"]
    ),
    "a model of its own": config(auto_map={"AutoModel": "modeling_evil.Evil"}),
    "a configuration of its own": config(auto_map={"AutoConfig": "evil.Evil"}, model_type="evil"),
    "one below": config(text_config={"auto_map": {"AutoConfig": "evil.Evil"}}),
    "a tokenizer of its own": config(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    ),
    "a processor of its own": config(
        "processor_config.json", auto_map={"AutoProcessor": "evil.Evil"}
    ),
    "a flag": config("generation_config.json", trust_remote_code=True),
    "an attention": config(_attn_implementation_internal="model/evil"),
    "a pipeline": config(custom_pipelines={"evil": {"impl": "evil.Evil", "pt": ["AutoModel"]}}),
    "a link": lambda: Path("model", "notes").symlink_to("/etc/hostname"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_no_code_of_a_model_is_run(here, name):
    MODELS[name]()
    with pytest.raises(ModelError):
        from_pretrained("model")
    done = secateur("run", "recipe.yaml")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not Path(CANARY).exists()
    assert not any(path.name == "manifest.json" for path in Path("runs").rglob("*"))


def beside():
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pkl"):
        Path("model", name).write_bytes(PICKLE)


HARMLESS = {
    "pickles beside the weights": beside,
    "a chat template": config(
        "tokenizer_config.json", chat_template="{{ cycler.__init__.__globals__.os.system('"
        + SHELL + "') }}",
    ),
    "a vocabulary elsewhere": config("tokenizer_config.json", vocab_file="../evil.txt"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_nobody_asks_for_is_left_alone(here, name):
    HARMLESS[name]()
    from_pretrained("model")
    assert secateur("check", "recipe.yaml").returncode == 0
    assert not Path(CANARY).exists()


def folder_of(name, content):
    Path("data").mkdir()
    Path("data", name).write_bytes(content)
    change_recipe(data="data")


def tarred():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("1.pkl", "1.pyd", "1.pth", f"../{CANARY}", "1.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(PICKLE)
            tar.addfile(member, io.BytesIO(PICKLE))
    return stream.getvalue()


def linked_to():
    folder_of("gate.csv", Path("data.csv").read_bytes())
    Path("data", "train.csv").symlink_to(Path("data.csv").resolve())


def named_by_a_readme(text):
    folder_of("README.md", f"---\n{text}\n---\n".encode())
    shutil.copyfile("data.csv", "data/train.csv")


RECIPES = {
    "a pickle as data": lambda: (
        Path("data.pkl").write_bytes(PICKLE), change_recipe(data="data.pkl"),
    ),
    "a folder of pickles": lambda: folder_of("train.pkl", PICKLE),
    "a tar of pickles": lambda: folder_of("train.tar", tarred()),
    "a script": lambda: folder_of("data.py", CODE.encode()),
    "a README that runs": lambda: named_by_a_readme(
        f"configs: !!python/object/apply:os.system ['{SHELL}']"
    ),
    "a README that leads out": lambda: named_by_a_readme(
        "configs:\n- config_name: default\n  data_files: ../data.csv"
    ),
    "a README that leads to the network": lambda: named_by_a_readme(
        "configs:\n- config_name: default\n  data_files: https://127.0.0.1:9/data.csv"
    ),
    "a link that leads out": linked_to,
    "a subset that leads out": lambda: (
        folder_of("train.csv", b"text,label\na,1\n"), change_recipe(subset=f"../../{CANARY}"),
    ),
    "a split with code": lambda: change_recipe(splits={"gate": f"train[:{CODE.strip()}]"}),
    "a revision that leads out": lambda: change_recipe(
        model={"source": "org/name", "revision": f"../../../{CANARY}"}
    ),
    "a source for a shell": lambda: change_recipe(model={"source": f"$({SHELL})"}),
    "a folder for a shell": lambda: change_recipe(model={"source": f"./x; {SHELL}"}),
    "data for a shell": lambda: change_recipe(data=f"`{SHELL}`.csv"),
    "data for a pipe": lambda: change_recipe(data=f"| {SHELL}"),
    "a column for a shell": lambda: change_recipe(columns={"text": f"$({SHELL})"}),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_no_code_of_data_or_names_is_run(here, name):
    RECIPES[name]()
    done = secateur("check", "recipe.yaml")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(here.rglob(CANARY))


YAML = {
    "apply": f"!!python/object/apply:os.system ['{SHELL}']",
    "new": f"!!python/object/new:os.system ['{SHELL}']",
    "apply deep": f"model: {{source: !!python/object/apply:builtins.open [{CANARY}, w]}}",
    "name": "model: !!python/name:os.system",
    "module": "model: !!python/module:evil",
}


@pytest.mark.parametrize("name", YAML)
def test_no_tag_of_a_recipe_or_budget_makes_an_object(here, name):
    Path("evil.yaml").write_text(YAML[name])
    assert secateur("check", "evil.yaml").returncode == 2
    with pytest.raises(RecipeError, match="not YAML"):
        Budget.from_yaml(Path("evil.yaml"))
    assert not Path(CANARY).exists()


def elsewhere(folder, location):
    """Place a graph's weights elsewhere."""
    graph = multiplying(np.ones((2, 2), np.float32))
    tensor = graph.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value="16")
    (folder / "onnx" / "model.onnx").write_bytes(graph.SerializeToString())


def linked(folder, link):
    """Place them in a file that has another name, too."""
    elsewhere(folder, "model.onnx_data")
    Path("weights").write_bytes(np.ones((2, 2), np.float32).tobytes())
    link(Path("weights").resolve(), folder / "onnx" / "model.onnx_data")


def names_a_file(folder):
    held = json.loads((folder / "manifest.json").read_text())
    held["files"][f"../{CANARY}"] = {"bytes": 0, "sha256": "0" * 64}
    held["sha256"] = fingerprint({name: held[name] for name in ("files", "about")})
    (folder / "manifest.json").write_text(json.dumps(held, indent=1, sort_keys=True))


ARTIFACTS = {
    "pickled outputs": lambda folder: np.savez(
        folder / "golden.npz", allow_pickle=True, **{"input.x": np.array([Bomb()], object)}
    ),
    "a pickle for outputs": lambda folder: (folder / "golden.npz").write_bytes(PICKLE),
    "a pickle for a graph": lambda folder: (folder / "onnx" / "model.onnx").write_bytes(PICKLE),
    "weights above": lambda folder: elsewhere(folder, f"../../{CANARY}"),
    "weights anywhere": lambda folder: elsewhere(folder, "/etc/hostname"),
    "weights behind a link": lambda folder: linked(folder, lambda to, at: at.symlink_to(to)),
    "weights behind a hard link": lambda folder: linked(folder, lambda to, at: at.hardlink_to(to)),
}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_no_code_of_an_artifact_is_run_and_no_path_followed(here, name):
    """Whoever changed it wrote the manifest anew, too."""
    folder = here / "artifact"
    released(folder)
    assert secateur("verify", folder).returncode == 0
    ARTIFACTS[name](folder)
    seal(folder, {"verdict": {"outcome": "pass"}})
    done = secateur("verify", folder)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert not list(here.rglob(CANARY))


@pytest.mark.parametrize("name", ["a model of its own", "zipped weights"])
def test_no_code_of_a_torch_artifact_is_run(here, name):
    shutil.rmtree("model")
    released_torch(Path("model"))
    assert secateur("verify", "model").returncode == 0
    MODELS[name]()
    seal(Path("model"), {"verdict": {"outcome": "pass"}})
    done = secateur("verify", "model")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert not list(here.rglob(CANARY))


def test_no_file_outside_of_an_artifact_is_one_of_it(here):
    folder = here / "artifact"
    released(folder)
    (here / CANARY).write_text("")
    names_a_file(folder)
    done = secateur("verify", folder)
    assert done.returncode == 2
    assert "../canary: missing" in done.stderr


def test_there_are_thirty_and_more():
    tables = (MODELS, HARMLESS, RECIPES, YAML, ARTIFACTS)
    assert sum(map(len, tables)) >= 30


def test_the_canary_sings(here):
    """What these files hold does create it, where it is run."""
    pickle.loads(PICKLE)
    Path(CANARY).unlink()
    exec(CODE)
    assert Path(CANARY).exists()
