"""What an engine's inspector says of its layers is compared with what the graph asked for."""

import json

import pytest

from exporters import ExportError
from exporters.tensorrt import precisions


def layer(kind: str, tactic: str, types: list[str], key: str = "Format/Datatype", **more) -> dict:
    """Return a layer as an engine's inspector tells it in detail (see `precisions.found`)."""
    tensors = [{"Name": f"t{at}", "Dimensions": [8, 64], key: x} for at, x in enumerate(types)]
    named = {"Name": tactic, "LayerType": kind, "TacticName": tactic}
    return named | {"Inputs": tensors, "Outputs": tensors[:1]} | more


# The one that NVIDIA's documentation of the inspector shows, shortened.
DOCUMENTED = layer(
    "CaskConvolution",
    "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw",
    ["Thirty-two wide channel vectorized row major Int8 format."],
    Weights={"Type": "Int8", "Count": 131072},
)
HALF = layer("gemm", "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n", ["Half", "Half", "Float"])
BF16 = layer("gemm", "sm80_xmma_gemm_bf16bf16", ["BFloat16", "BFloat16"], key="DataType")
FP32 = layer("MatrixMultiply", "sm80_xmma_gemm_f32f32_tf32f32", ["Row major linear FP32"] * 2)
INT4 = layer("fusion", "weight_only_gemm", ["Half", "Int4"], key="DataType")
NORM = layer("kgen", "__myl_MeanSubMulMeanAddSqrDivMul", ["Float", "Float"])


def told(*layers) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["input_ids", "logits"]})


def test_the_precisions_of_heavy_layers_are_read():
    text = told(DOCUMENTED, HALF, HALF, BF16, FP32, INT4, NORM)
    assert precisions.found(text) == {"bf16": 1, "fp16": 2, "fp32": 1, "int4": 1, "int8": 1}
    precisions.audit({"int8": 14, "fp32": 4}, told(DOCUMENTED, FP32, FP32, NORM))
    precisions.audit({"fp16": 18}, told(HALF, NORM))
    precisions.audit({"bf16": 18}, told(BF16, NORM))


@pytest.mark.parametrize(
    ("asked", "layers", "message"),
    [
        ({"int8": 14, "fp32": 4}, [FP32, NORM], r"found no int8 layer among 1 fp32, .*the 14 that"),
        ({"int4": 14}, [HALF], "found no int4 layer among 1 fp16, expected .*folded away"),
        ({"fp16": 18}, [HALF, FP32, NORM], "found 1 products in fp32, expected at most 0 as in .*"),
        ({"fp16": 18}, [NORM], "found no product with a type among its layers"),
        ({"fp32": 18}, ["names", "alone"], "found no product with a type among its layers"),
    ],
)
def test_an_engine_that_is_not_what_was_asked_for_is_refused(asked, layers, message):
    with pytest.raises(ExportError, match=message):
        precisions.audit(asked, told(*layers))
