"""A compressor that does harm is told; one that does none is not, and the weights stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cptq.checkpoint.weights import get_weight
from cptq.compression.blockwise import compress_model
from cptq.compression.restored import restore_layers
from cptq.layouts.pack_quantized import PACK_QUANTIZED
from cptq.numerics.grid import dequantize_layer
from cptq.pipeline.nearest_check import warn_if_worse_than_nearest
from cptq.types import Budget, Candidate, Plan
from tests.conftest import Heard, TinyModel
from tests.reference.sensitivity import loaded, random_calibration


@pytest.mark.parametrize("harm", [False, True])
def test_harm_is_told_and_leaves_the_weights(
    tiny_model: TinyModel, heard: Heard, harm: bool
) -> None:
    model = loaded(tiny_model("llama"))
    text = random_calibration(model, rows=8, length=24)
    choices = {unit.name: Candidate(bits=4, group_size=16) for unit in model.units}
    plan = Plan(
        model_fingerprint=model.fingerprint,
        budget=Budget(limit_bytes=0, asked="by hand"),
        allocator="by hand",
        metric=None,
        table_digest=None,
        choices=choices,
        predicted_bytes=0,
        predicted_loss=None,
    )
    layers = compress_model(model, text, plan, compressor="nearest", emit=heard)
    if harm:
        layers[3] = replace(layers[3], codes=layers[3].codes.flip(1))
        restore_layers(model, layers)
    heard.clear()
    options = {"layout": PACK_QUANTIZED, "float16_scales": False, "emit": heard}
    warn_if_worse_than_nearest(model, layers, choices, "gptq", text.batches, **options)
    assert [("worse than nearest" in message) for message in heard.notices] == [True] * harm
    for layer in layers:
        now = get_weight(model.linear(layer.spec.name))
        assert torch.equal(now, dequantize_layer(layer, model.dtype))
