"""The tensors that are budgeted are those that packing gives; their bits are those promised."""

from __future__ import annotations

import pytest
import torch

from cptq.layouts.packed import (
    PACKED_LAYOUT,
    count_stored,
    explain_misfit,
    list_packed_tensors,
    resolve_candidate,
)
from cptq.numerics.masks import build_magnitude_mask
from cptq.types import Candidate, LayerKind, LayerSpec


def layer(out: int, inputs: int, kind: LayerKind = "linear") -> LayerSpec:
    return LayerSpec(name="x", block=0, role="q", kind=kind, shape=(out, inputs), dtype="F16")


LABELS = ("w4g64", "w4c", "w3g64-asym", "w2c-asym", "w4g32-s50", "w8c-asym-s37", "w4g8-2:4", "w16")
LABELS += ("w4g32-row", "w3g32-e4m3", "w2g32-e5m2", "f8e4m3", "f8e5m2", "w4g32-row-s50")
LABELS += ("w4g32-nl-row", "w5c-nl", "w4g32-iq4nl")


@pytest.mark.parametrize("label", LABELS)
def test_labels_are_read_back(label: str) -> None:
    assert Candidate.parse(label).label == label


@pytest.mark.parametrize("label", ["w4g64-4:2", "w4g64-s50-2:4", "w9c", "w4g64-asym-asym", "w4"])
def test_other_labels_are_refused(label: str) -> None:
    with pytest.raises(ValueError, match=f"'{label}'"):
        Candidate.parse(label)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("shape", [(1, 10), (3, 7), (12, 33)])
def test_as_many_weights_are_stored_as_a_mask_keeps(
    sparsity: float, shape: tuple[int, int]
) -> None:
    W_OI = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scheme = Candidate(bits=4, sparsity=sparsity, pattern="unstructured")
    assert count_stored(shape, scheme) == int(build_magnitude_mask(W_OI, sparsity).sum())


@pytest.mark.parametrize(
    ("label", "bits"),
    [
        ("w4c", 4),
        ("w3g64-asym", 3 + 3 / 64),
        ("w4c-s50", 1 + 0.5 * 4),
        ("w4c-2:4", 0.75 + 4 / 2),
        ("w8c-s75", 1 + 0.25 * 8),
    ],
)
def test_bits_a_weight_without_scales(label: str, bits: float) -> None:
    shape = (512, 4096)
    specs = list_packed_tensors("x", shape, "F16", Candidate.parse(label))
    nbytes = sum(spec.nbytes for spec in specs if not spec.name.endswith("_scale"))
    assert 8 * nbytes / (512 * 4096) == pytest.approx(bits, rel=1e-6)


def test_what_cannot_be_packed_is_said() -> None:
    parse = Candidate.parse
    assert explain_misfit((3, 6), parse("w4g4")) == "groups of 4 do not divide 6 inputs"
    assert "multiple of 4" in str(explain_misfit((3, 6), parse("w4c-2:4")))
    assert "stores no weight" in str(explain_misfit((3, 6), parse("w4c-s100")))
    assert "16 bits" in str(explain_misfit((3, 6), parse("w16")))
    assert "levels of 7 bits; there are those of 2 and 3" in str(
        explain_misfit((3, 64), parse("w7g32-nl"))
    )
    assert "zero points" in str(explain_misfit((3, 64), parse("w4g32-asym-nl")))
    assert "none of them is 0" in str(explain_misfit((3, 64), parse("w4g32-nl-s50")))
    sparse = PACKED_LAYOUT.explain_refusal(layer(8, 8, "embedding"), parse("w4c-s50"))
    assert sparse is not None
    assert PACKED_LAYOUT.explain_refusal(layer(8, 8, "embedding"), parse("w4c-asym")) is None
    assert PACKED_LAYOUT.explain_refusal(layer(8, 8, "conv1d"), parse("w4g64")) is None


def test_a_group_that_does_not_divide_is_resolved_first() -> None:
    assert resolve_candidate(Candidate.parse("w4g64"), 80).label == "w4g40"
    assert resolve_candidate(Candidate.parse("w4g64"), 64).label == "w4c"
    specs = PACKED_LAYOUT.tensors(layer(3, 80), Candidate.parse("w4g64"))
    assert [(spec.name, spec.shape) for spec in specs] == [
        ("x.weight", (3, 10)),
        ("x.weight_scale", (3, 2)),
    ]
