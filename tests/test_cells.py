"""Heads and neurons as cells: which are left, and how they scored."""

from xml.etree import ElementTree as ET

from html_tree import Tree
from reports import CUT, HEADS, LAYERS, content, failed, passed

from pipeline.cells import layers


def drawn(stages) -> Tree:
    return Tree("".join(ET.tostring(e, encoding="unicode", method="html") for e in layers(stages)))


def test_cells_show_which_heads_are_left_of_the_first_stage():
    tree = drawn(content(passed())["stages"])
    kept, cut = (
        [a["title"] for a in tree.of_class(state) if "title" in a] for state in ("kept", "cut")
    )
    assert len(kept) == sum(map(len, CUT)) == 39
    assert len(cut) == 6 * 12 - 39
    assert "layer 2, head 3: kept" in kept
    assert "layer 2, head 4: cut" in cut
    assert "39 of 72 heads, 4608 of 9216 neurons left." in tree.text


def test_cells_are_those_of_a_model_that_had_been_cut_before():
    sample = content(passed())
    for stage in sample["stages"]:
        stage["kept_heads"] = [[0, 5, 7]] * LAYERS
    sample["stages"][3]["kept_heads"] = [[0, 7]] * LAYERS
    sample["stages"][4]["kept_heads"] = [[0, 7]] * LAYERS
    tree = drawn(sample["stages"])
    cut = [a["title"] for a in tree.of_class("cut") if "title" in a]
    assert cut == [f"layer {layer}, head 5: cut" for layer in range(LAYERS)]
    # one picture for the neurons of prune, one for the heads of quantize, one for the scores
    assert len(tree.of_class("layers")) == 3


def test_heads_are_coloured_by_the_rank_of_their_score():
    found = {a["title"]: a for a in drawn(content(passed())["stages"]).of_class("score")}
    assert len(found) == LAYERS * HEADS
    lowest, highest = found["layer 0, head 0: 0"], found["layer 5, head 11: 5.11"]
    assert (lowest["style"], highest["style"]) == ("--rank:0%", "--rank:100%")
    gone = [title for title, a in found.items() if "gone" in a["class"]]
    assert len(gone) == 72 - 39
    assert "layer 2, head 4: 2.04, cut" in gone


def test_scores_of_a_model_that_had_been_cut_have_the_numbers_of_the_uncut_one():
    sample = content(passed())
    for stage in sample["stages"]:
        stage["kept_heads"] = [[0, 5, 7], [1]]
        stage["neurons"] = [1, 1]
    sample["stages"][1]["details"] = {
        "scores": {"decoder.layers.1.encoder_attn": [0.3], "decoder.layers.0.self_attn": [1, 2, 3]},
        "scored": {"decoder.layers.1.encoder_attn": [1], "decoder.layers.0.self_attn": [0, 5, 7]},
        "removed": {"decoder.layers.0.self_attn": [5]},
    }
    tree = drawn(sample["stages"])
    assert [a["title"] for a in tree.of_class("score")] == [
        "layer 1, head 1: 0.3",
        "layer 0, head 0: 1",
        "layer 0, head 5: 2, cut",
        "layer 0, head 7: 3",
    ]
    assert "decoder.layers.N.encoder_attn" in tree.text


def test_nothing_cut_is_said_in_words():
    tree = drawn(content(failed())["stages"])
    assert "No stage cut heads or neurons." in tree.text
    assert not tree.of_class("layers")
