"""What the tests of the draft share."""

from __future__ import annotations

import pytest
import torch

from cptq.checkpoint.model import LoadedModel
from cptq.types import CompressedLayer, Plan
from tests.conftest import TinyModel
from tests.unit.artifact.builders import compress, load

Made = tuple[LoadedModel, list[CompressedLayer], Plan]


@pytest.fixture(scope="module")
def made(tiny_model: TinyModel) -> Made:
    model = load(tiny_model("llama", dtype=torch.float16))
    return model, *compress(model)
