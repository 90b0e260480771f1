"""What comes with a model is data: what names code, is a pickle or leads elsewhere is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import secateur, write_model
from tiny_models import SIZES, tiny
from transformers import BertConfig, ViTImageProcessor

from pipeline import from_pretrained, sources
from pipeline.checkpoint import ModelError, read_config, without_weights

CONFIG = BertConfig(**SIZES, architectures=["BertForSequenceClassification"]).to_dict()
SMUGGLED = {
    "auto_map": {"auto_map": {"AutoConfig": "evil.EvilConfig"}},
    "auto_map of another repository": {"auto_map": {"AutoModel": "org/name--evil.Evil"}},
    "auto_map below": {"vision_config": {"deep": [{"auto_map": {"AutoModel": "evil.Evil"}}]}},
    "a flag": {"trust_remote_code": True},
    "a flag below": {"text_config": {"backbone_kwargs": {"trust_remote_code": "yes"}}},
    "an attention": {"_attn_implementation_internal": "org/kernel"},
    "an attention of a revision": {"attn_implementation": "org/kernel@main:fn"},
    "attentions by part": {
        "_attn_implementation": {"": "eager", "text_config": "paged|org/kernel"}
    },
    "experts": {"encoder": {"_experts_implementation": "org/kernel"}},
    "kernels": {"kernel_config": {"kernel_mapping": {"RMSNorm": "org/kernel:RMSNorm"}}},
    "a pipeline": {"custom_pipelines": {"evil": {"impl": "evil.EvilPipeline"}}},
}


def write_config(folder: Path, changes: object, name: str = "config.json") -> Path:
    """Write a configuration, or change the one that is there."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    there = json.loads(path.read_text()) if path.exists() else CONFIG
    path.write_text(json.dumps(there | changes))
    return folder


@pytest.mark.parametrize("how", SMUGGLED)
def test_a_configuration_that_names_code_is_refused(tmp_path, how):
    write_config(tmp_path, SMUGGLED[how])
    for read in (read_config, without_weights, from_pretrained):
        with pytest.raises(ModelError, match=r"config\.json: found .*, which names code, expected"):
            read(tmp_path)
    done = secateur("inspect", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


HARMLESS = {"auto_map": {}, "trust_remote_code": False, "attn_implementation": "sdpa"}
HARMLESS |= {"custom_pipelines": None, "conv_kernel": [3, 3], "name": "org/name"}


def test_the_same_keys_without_code_are_not(tmp_path):
    write_config(tmp_path, HARMLESS)
    assert read_config(tmp_path).model_type == "bert"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json"])
def test_a_tokenizer_with_code_is_refused(tmp_path, name):
    write_model(tmp_path)
    write_config(tmp_path, {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, name)
    with pytest.raises(ModelError, match=f"{name}: found auto_map"):
        sources.processor(str(tmp_path), "AutoTokenizer", None)
    with pytest.raises(ModelError, match=f"{name}: found auto_map"):
        from_pretrained(tmp_path)


def test_an_image_processor_with_code_is_refused(tmp_path):
    tiny("vit").save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert sources.processor(str(tmp_path), "AutoImageProcessor", None) is not None
    write_config(
        tmp_path, {"auto_map": {"AutoImageProcessor": "evil.Evil"}}, "preprocessor_config.json"
    )
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: found auto_map"):
        sources.processor(str(tmp_path), "AutoImageProcessor", None)


def test_a_caller_cannot_ask_for_code(tmp_path):
    write_model(tmp_path)
    with pytest.raises(ModelError, match="found an option that cannot be given here"):
        from_pretrained(tmp_path, trust_remote_code=True)


BAD_JSON = {
    "not JSON": ("{", "not JSON"),
    "a list": ("[]", "found list, expected a mapping"),
    "nested": ("[" * 100_000, "nested too deep"),
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, what):
    text, message = BAD_JSON[what]
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def test_pickles_alone_are_refused_and_beside_safetensors_left_alone(tmp_path):
    model = write_model(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"not read")
    from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"found weights in pytorch_model\.bin alone, a pickle"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "pytorch_model.bin", "/tmp/x.safetensors", 3]
)
def test_weights_that_an_index_places_elsewhere_are_refused(tmp_path, shard):
    model = write_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), shard)}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"found weights in .*, expected a file \*\.safetensors"):
        from_pretrained(tmp_path / "model")


def test_weights_that_a_configuration_places_in_a_pickle_are_refused(tmp_path):
    write_model(tmp_path)
    write_config(tmp_path, {"transformers_weights": "adapter_model.bin"})
    with pytest.raises(ModelError, match=r"found weights in 'adapter_model\.bin'"):
        from_pretrained(tmp_path)


def test_weights_of_a_configuration_that_changed_since_it_was_looked_through(tmp_path, monkeypatch):
    """As on the hub, where two reads may find two commits."""
    write_model(tmp_path)
    write_config(tmp_path, {"transformers_weights": "adapter_model.bin"})
    monkeypatch.setattr("pipeline.trust.check", lambda *_, **__: None)
    with pytest.raises(ModelError, match=r"found weights in 'adapter_model\.bin'"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("config.json", "configuration_files"),
        ("tokenizer_config.json", "fast_tokenizer_files"),
    ],
)
def test_files_to_read_instead_are_refused(tmp_path, name, key):
    write_model(tmp_path)
    write_config(tmp_path, {key: [f"{name}.4.0.0.json"]}, name)
    with pytest.raises(ModelError, match=f"{name}: found {key}: .*, which names files to read"):
        read_config(tmp_path)


def test_an_adapter_is_refused(tmp_path):
    write_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/name"}')
    with pytest.raises(ModelError, match=r"found adapter_config\.json, expected the weights of a"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "anything"])
def test_a_link_out_of_a_model_is_refused(tmp_path, name):
    write_model(tmp_path / "model")
    path = tmp_path / "model" / name
    path.touch()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f"model/{name}: found a link to .*elsewhere, expected a"):
        from_pretrained(tmp_path / "model")


def test_a_link_within_a_model_and_to_a_model_are_followed(tmp_path):
    write_model(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.rename(weights.with_name("weights"))
    weights.symlink_to("weights")
    (tmp_path / "link").symlink_to("model")
    from_pretrained(tmp_path / "link")


def as_in_the_cache(model: Path, repository: Path) -> Path:
    """Return a snapshot of the model's files, laid out as the hub's library does."""
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for at, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, blobs / str(at))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(at)))
    return snapshot


def test_the_links_of_the_hub_s_cache_are_followed_and_no_others(tmp_path):
    write_model(tmp_path / "model")
    snapshot = as_in_the_cache(tmp_path / "model", tmp_path / "models--org--name")
    assert from_pretrained(snapshot).num_parameters() > 0
    (tmp_path / "secret").write_text("{}")
    (snapshot / "generation_config.json").symlink_to(Path("..", "..", "..", "secret"))
    with pytest.raises(ModelError, match=r"generation_config\.json: found a link to .*secret"):
        from_pretrained(snapshot)


def test_a_model_of_the_hub_is_looked_through_too(tmp_path):
    write_model(tmp_path / "model")
    for at, cache in enumerate(("good", "evil")):
        if at:
            write_config(tmp_path / "model", SMUGGLED["auto_map below"])
        as_in_the_cache(tmp_path / "model", tmp_path / cache / "models--org--name")
    assert read_config("org/name", cache_dir=tmp_path / "good").model_type == "bert"
    with pytest.raises(ModelError, match=r"org/name/config\.json: found vision_config\.deep\.0\.a"):
        read_config("org/name", cache_dir=tmp_path / "evil")


def test_no_weights_come_from_a_pull_request(tmp_path, monkeypatch):
    """With a network, the library would ask a bot to convert those of a repository without any."""
    model = write_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    as_in_the_cache(tmp_path / "model", tmp_path / "models--org--name")
    asked = []
    monkeypatch.setattr("transformers.modeling_utils.is_offline_mode", lambda: False)
    monkeypatch.setattr(
        "transformers.modeling_utils.auto_conversion",
        lambda *found, **_: asked.append(found) or (None, "main", False),
    )
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    with pytest.raises(ModelError, match="does not appear to have a file named"):
        from_pretrained("org/name", cache_dir=tmp_path)
    assert asked == []


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    write_model(tmp_path / "model")
    as_in_the_cache(tmp_path / "model", tmp_path / "models--org--name")
    found = {"hub": "org/name", "commit": "0" * 40}
    assert sources.identity("org/name", None) == found == sources.identity("org/name", "main")
    with pytest.raises(ModelError, match="org/nothing: found no commit on the hub: "):
        sources.identity("org/nothing", None)
