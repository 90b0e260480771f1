"""A model cut block by block is the one that is cut in memory, and fits where that does not."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROWS, secateur, write_model
from safetensors.torch import load_file
from tiny_models import FAMILIES, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import from_pretrained, prune_by_blocks, pruning, save_pretrained
from pipeline.checkpoint import ModelError
from pipeline.reading import RecipeError

REFUSED = {"albert", "bart", "marian", "mbart", "mt5", "pegasus", "t5", "whisper"}
DEFAULT = {"bert", "llama", "gemma2", "gpt2", "deberta-v2", "vit"}


def batches(model):
    """Return what gives four batches of other lengths, one window of each padded."""

    def give():
        for length in range(9, 13):
            generator = torch.Generator().manual_seed(length)
            if model.main_input_name == "pixel_values":
                yield {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)}
                continue
            ids = torch.randint(3, 99, (4, length), generator=generator)
            mask = torch.ones_like(ids)
            ids[1, 5:], mask[1, 5:] = 0, 0
            yield {"input_ids": ids, "attention_mask": mask}

    return give


def in_memory(source, target, data, **asked):
    model = from_pretrained(source)
    options = {"criterion": asked["criterion"], "repair": asked["repair"], "seed": 3}
    options |= {"uniform": asked.get("per_layer", False), "multiple": asked.get("multiple", 1)}
    shares = {"heads": asked["heads"], "neurons": asked["neurons"]}
    choice = pruning.choose_and_cut(model, shares, data=data, total=4, **options)
    save_pretrained(model, target)
    return choice


def assert_equal(folder, expected):
    """Assert that two folders hold the same model, with the same units left, to rounding."""
    found, wanted = from_pretrained(folder), from_pretrained(expected)
    same = [{**m.config.to_dict(), "_name_or_path": None} for m in (found, wanted)]
    assert same[0] == same[1]
    assert sorted(p.name for p in folder.glob("model*")) == sorted(
        p.name for p in expected.glob("model*")
    )
    tensors = [load_file(path / "model.safetensors") for path in (folder, expected)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[1].items():
        assert tensors[0][name].dtype == tensor.dtype
        torch.testing.assert_close(tensors[0][name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow])
        for name in sorted(FAMILIES.keys() - REFUSED)
    ],
)
def test_it_is_what_the_cut_in_memory_is(family, tmp_path):
    model = tiny(family)
    save_pretrained(model, tmp_path / "model")
    asked = {"heads": 0.3, "neurons": 0.3, "criterion": "flap", "repair": "least-squares"}
    data = batches(model)
    expected = in_memory(tmp_path / "model", tmp_path / "memory", data, **asked)
    found = prune_by_blocks(tmp_path / "model", tmp_path / "blocks", data=data, **asked)
    assert {path: units for path, units in found.removed.items() if units} == expected.removed
    assert found.scored == expected.scored
    assert found.repairs.keys() == expected.repairs.keys()
    assert any(after < before for before, after in found.repairs.values())
    assert_equal(tmp_path / "blocks", tmp_path / "memory")


@pytest.mark.parametrize(
    "asked",
    [
        {"criterion": "random", "repair": "none", "per_layer": True},
        {"criterion": "magnitude", "repair": "none", "multiple": 8},
        {"criterion": "magnitude", "repair": "bias", "activations": "memory"},
        {"criterion": "reconstruction", "repair": "none"},
    ],
)
def test_criteria_and_repairs(asked, tmp_path):
    model = tiny("bert")
    save_pretrained(model, tmp_path / "model")
    asked = {"heads": 0.25, "neurons": 0.5} | asked
    data = batches(model)
    expected = in_memory(tmp_path / "model", tmp_path / "memory", data, **asked)
    needed = {} if asked["criterion"] == "random" else {"data": data}
    found = prune_by_blocks(tmp_path / "model", tmp_path / "blocks", seed=3, **needed, **asked)
    assert {path: units for path, units in found.removed.items() if units} == expected.removed
    assert_equal(tmp_path / "blocks", tmp_path / "memory")


def test_a_cut_model_in_bf16_is_cut_again_and_stays_bf16(tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    save_pretrained(model.bfloat16(), tmp_path / "model")
    asked = {"heads": 0.25, "neurons": 0.25, "criterion": "magnitude", "repair": "none"}
    prune_by_blocks(tmp_path / "model", tmp_path / "once", **asked)
    prune_by_blocks(tmp_path / "once", tmp_path / "twice", **asked)
    found = from_pretrained(tmp_path / "twice")
    assert found.dtype == torch.bfloat16
    heads = sum(pruning.units(found).heads.values())
    assert heads == round(0.75 * round(0.75 * sum(pruning.units(model).heads.values())))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"heads": 1.0}, "heads: found 1, expected at least 0 and less than 1"),
        ({}, "prune: expected a share of heads or neurons above 0"),
        ({"heads": 0.5, "criterion": "fisher"}, "criterion: found 'fisher', expected one of.*grad"),
        ({"heads": 0.5, "repair": "most"}, "repair: found 'most', expected one of"),
        ({"neurons": 0.5, "multiple": 0}, "multiple: found 0, expected at least 1"),
        (
            {"neurons": 0.5, "multiple": 64, "criterion": "random", "repair": "none"},
            "multiple: found 64, expected at most 48, the neurons of a layer",
        ),
        ({"heads": 0.5}, "data: found none, expected text to calibrate on"),
        (
            {"heads": 0.01, "criterion": "random", "repair": "none"},
            "prune: found nothing to cut with heads: 0.01",
        ),
        (
            {"heads": 0.5, "repair": "bias", "data": lambda: iter(())},
            "repair: found no bias in .*, expected one; use least-squares or none",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, asked, message):
    save_pretrained(tiny("llama"), tmp_path / "model")
    with pytest.raises(RecipeError, match=message):
        prune_by_blocks(tmp_path / "model", tmp_path / "cut", **asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_command_writes_a_folder_once(tmp_path):
    write_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentence for sentence, _ in ROWS[:40]))
    command = ("prune", tmp_path / "model", tmp_path / "cut", "--heads", "0.25", "--neurons", "0.5")
    command += ("--text", text, "--max-length", "16")
    done = secateur(*command)
    assert done.returncode == 0, done.stderr
    assert "9 heads and 72 neurons left" in done.stdout
    assert sum(pruning.units(from_pretrained(tmp_path / "cut")).heads.values()) == 9
    assert (tmp_path / "cut" / "tokenizer.json").is_file()
    again = secateur(*command)
    assert again.returncode == 2
    assert "Traceback" not in again.stderr
    assert "cut: there already, expected a new folder" in again.stderr
    with pytest.raises(ModelError, match="there already, expected a new folder"):
        prune_by_blocks(
            tmp_path / "model", tmp_path / "cut", heads=0.5, criterion="random", repair="none"
        )


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (4, (), "found 4 lines, expected at least 5, of which one is held out"),
        (9, ("--max-length", "999"), "--max-length: .*: found 999, expected at most 64"),
    ],
)
def test_text_that_does_not_do_is_refused(tmp_path, lines, more, message):
    write_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the film\n" * lines)
    more = ("--max-length", "16", *more)
    done = secateur(
        "prune", tmp_path / "model", tmp_path / "cut", "--heads", "0.5", "--text", text, *more
    )
    assert done.returncode == 2
    assert re.search(message, done.stderr)


def test_another_model_s_tokenizer_is_refused(tmp_path):
    write_model(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 99', '"vocab_size": 10'))
    text = tmp_path / "text.txt"
    text.write_text("the film\n" * 9)
    done = secateur(
        "prune", tmp_path / "model", tmp_path / "cut", "--heads", "0.5", "--text", text,
        "--max-length", "16",
    )  # fmt: skip
    assert done.returncode == 2
    assert "expected less than 10, the rows of the embedding table" in done.stderr


SIZES = {
    "hidden_size": 384,
    "num_hidden_layers": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 768,
    "vocab_size": 1000,
}
LIMITED = """
import json, resource, sys
import numpy as np
import torch
from transformers import LlamaForCausalLM
from benchmarks.memory import peak_rss_bytes
from pipeline import from_pretrained, prune_by_blocks, quantize_by_blocks
from pipeline import weight_only
import pipeline.pruning

torch.set_num_threads(1)
weight_only.gptq(np.ones((32, 32)), np.eye(32), 32, symmetric=True)  # BLAS takes its buffers
source, target, what, allowed = sys.argv[1:4] + [int(sys.argv[4])]

def data():
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        yield {"input_ids": torch.randint(1000, (4, 32), generator=generator)}

with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
floor = peak_rss_bytes()
resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, used + allowed))
if what == "load":
    from_pretrained(source)
elif what == "quantize":
    quantize_by_blocks(source, target, data=data, block_size=32)
else:
    prune_by_blocks(
        source, target, heads=0.25, neurons=0.25, criterion="flap", data=data, activations=what
    )
print(json.dumps(peak_rss_bytes() - floor))
"""


@pytest.fixture
def large(tmp_path):
    """A model in a folder, and what works on it, to another folder, in a quarter of its memory."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.1))
    save_pretrained(model, tmp_path / "model")
    allowed = (tmp_path / "model" / "model.safetensors").stat().st_size // 4

    def limited(what):
        command = [sys.executable, "-c", LIMITED, tmp_path / "model", tmp_path / "blocks", what]
        return subprocess.run(
            [str(word) for word in (*command, allowed)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def work(what):
        assert limited("load").returncode != 0  # it binds
        done = limited(what)
        assert done.returncode == 0, done.stderr
        taken = json.loads(done.stdout)
        print({"model": 4 * allowed / 1e6, "allowed": allowed / 1e6, "taken": taken / 1e6})
        assert taken < allowed

    return model, work


@pytest.mark.slow
def test_a_model_of_four_times_the_memory_is_quantized_and_saved(tmp_path, large):
    model, work = large
    work("quantize")
    written = sum(path.stat().st_size for path in (tmp_path / "blocks").glob("*.safetensors"))
    assert written < 0.2 * sum(p.nbytes for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_model_of_four_times_the_memory_is_cut_repaired_and_saved(tmp_path, large, where):
    model, work = large
    work(where)

    def data():
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            yield {"input_ids": torch.randint(1000, (4, 32), generator=generator)}

    pruning.choose_and_cut(
        model.eval(),
        {"heads": 0.25, "neurons": 0.25},
        criterion="flap",
        repair="least-squares",
        data=data,
        total=4,
    )
    save_pretrained(model, tmp_path / "memory")
    assert_equal(tmp_path / "blocks", tmp_path / "memory")
