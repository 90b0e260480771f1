"""Weights in fewer bits: codes and scales by hand, and outputs that stay near."""

import numpy as np
import pytest
from conftest import multiplying

from exporters import onnx as exporter
from exporters.onnx.graph import store
from pipeline import weight_only


def test_codes_and_scales_by_hand():
    weight = np.array([[127.0, -1.0], [-63.4, 0.5], [0.0, 0.0]], np.float32)
    codes, scales = weight_only.rounded(weight, 0)
    np.testing.assert_allclose(scales, [[1.0, 1 / 127]], rtol=1e-6)
    assert codes.tolist() == [[127, -127], [-63, 64], [0, 0]]


def test_the_root_of_an_inverse_by_hand():
    # [[2, -1], [-1, 1]] is the inverse of [[1, 1], [1, 2]], and UT U of this U.
    root = weight_only._root_of_inverse(np.array([[1.0, 1.0], [1.0, 2.0]]))
    np.testing.assert_allclose(root, [[2**0.5, -(0.5**0.5)], [0, 0.5**0.5]], atol=1e-15)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_loses_less_of_the_outputs_than_rounding(symmetric):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 48)) @ generator.normal(size=(48, 48))
    weight = generator.normal(size=(48, 20))

    def lost(gram):
        codes, scales, zeros = weight_only.gptq(weight, gram, 16, symmetric=symmetric)
        assert codes.max() <= 15
        spread = [np.repeat(part, 16, axis=0) for part in (scales, zeros)]
        return np.linalg.norm(x @ (spread[0] * (codes.astype(float) - spread[1]) - weight))

    assert lost(x.T @ x / len(x)) < 0.8 * lost(np.eye(48))  # nothing follows from uncorrelated rows


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # of torch, in hqq
@pytest.mark.parametrize("algorithm", ["rtn", "hqq", "k-quant", "gptq"])
def test_blocks_multiply_as_the_matrix_does(tmp_path, algorithm):
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(72, 20)).astype(np.float32)  # 4.5 blocks: the last is padded
    x = generator.normal(size=(100, 72)).astype(np.float32)
    graph = weight_only.blockwise(
        multiplying(weight), 4, algorithm, 16, frozenset(), symmetric=False,
        calibration=lambda: iter([{"x": x}]),
    )  # fmt: skip
    store(graph, tmp_path / "q.onnx")
    found = exporter.predictor(tmp_path / "q.onnx", device="cpu", threads=1)({"x": x})["y"]
    # 16 normal weights span about 3.5 deviations in 15 steps: an error of a sqrt(12)th of a step.
    error = np.linalg.norm(found - x @ weight) / np.linalg.norm(x @ weight)
    assert 0.02 < error < 0.1


def test_dead_weights_have_a_scale_all_the_same():
    codes, scales = weight_only.rounded(np.zeros((2, 3), np.float32), 1)
    assert not codes.any()
    assert (scales > 0).all()
