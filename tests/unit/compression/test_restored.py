"""Compressed layers in a model: whole, and row by row."""

from __future__ import annotations

import pytest
import torch

from cptq.checkpoint.loader import load_model
from cptq.checkpoint.memory import BASE, Memory
from cptq.checkpoint.pages import MappedFiles
from cptq.checkpoint.weights import get_weight
from cptq.compression import nearest
from cptq.compression.layer import compress_layer
from cptq.compression.restored import Restored, restore_layers
from cptq.config import ModelSettings
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.types import Candidate, Event
from tests.conftest import TinyModel
from tests.unit.artifact.builders import load

CANDIDATES = [
    Candidate(bits=4, group_size=16),
    Candidate(bits=3, group_size=16, symmetric=False),
    Candidate(bits=4, group_size=16, sparsity=0.5, pattern="2:4"),
    Candidate(bits=8, float8="e4m3"),
]


def quiet(_event: Event) -> None: ...


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.label)
def test_rows_are_those_of_the_whole(tiny_model: TinyModel, candidate: Candidate) -> None:
    model = load(tiny_model("llama", tied=True))
    spec = next(s for s in model.layers if s.block == 0)
    W_OI = get_weight(model.linear(spec.name)).float()
    layer = compress_layer(spec, W_OI, None, candidate, nearest.compress, PACKED_LAYOUT)
    restored = Restored(layer, model.device, torch.float32)
    ids_BT = torch.tensor([[0, 3, 3], [1, len(W_OI) - 1, 2]])
    assert torch.equal(restored.take_rows(ids_BT), restored()[ids_BT])
    restored.drop_pages(MappedFiles())  # of codes that lie in no file: nothing is lost
    assert torch.equal(restored.take_rows(ids_BT), restored()[ids_BT])


def test_an_embedding_multiplies_out_the_rows_that_it_looks_up(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model("llama", tied=False)
    ids_BT = torch.arange(6)[None]
    made: list[int] = []
    whole = Restored.__call__

    def count(self: Restored) -> torch.Tensor:
        W_OI = whole(self)
        made.append(len(W_OI))
        return W_OI

    monkeypatch.setattr(Restored, "__call__", count)
    found = []
    for memory in (None, Memory(total=BASE)):
        model = load_model(ModelSettings(model=str(path)), quiet, memory=memory)
        (unit,) = (u for u in model.vocabulary if u.role == "embedding")
        W_OI = get_weight(model.linear(unit.name)).float()
        asked = Candidate(bits=4, group_size=16)
        layer = compress_layer(unit.layers[0], W_OI, None, asked, nearest.compress, PACKED_LAYOUT)
        restore_layers(model, [layer])
        made.clear()
        embedding = model.module.get_input_embeddings()  # type: ignore[operator]
        found.append(embedding(ids_BT))
    assert made == [ids_BT.numel()]
    assert torch.equal(*found)
