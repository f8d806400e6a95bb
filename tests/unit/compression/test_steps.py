"""A plan that is carried out after an earlier run died: equal to the bit, whatever was finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.compression.blockwise import Steps, compress_model
from cptq.layouts.packed import PACKED_LAYOUT
from cptq.types import Candidate, CompressedLayer, Event, Notice, Plan, Progress
from tests.conftest import TinyModel
from tests.reference.sensitivity import loaded, random_calibration
from tests.unit.compression.test_blockwise import plan_for

DENSE = Candidate(bits=16)
#: asymmetric, sparse, with narrow scales, one that falls back, and a dense one
KINDS = [
    Candidate(bits=3, group_size=16, symmetric=False),
    Candidate(bits=4, group_size=16, sparsity=0.5, pattern="unstructured"),
    Candidate(bits=4, group_size=16, scales="row"),
    Candidate(bits=5, group_size=20),
    DENSE,
]


class Died(Exception):
    """What ends a run here."""


class Disk:
    """Steps that stay when a run dies; it dies when so many have been saved."""

    def __init__(self, most: int = 10**6) -> None:
        self.kept: dict[str, list[CompressedLayer]] = {}
        self.most = most

    def save(self, step: str, layers: list[CompressedLayer]) -> list[CompressedLayer]:
        self.kept[step] = layers
        if len(self.kept) >= self.most:
            raise Died
        return layers

    @property
    def steps(self) -> Steps:
        return Steps(load=self.kept.get, save=self.save)


def build_plan(model: LoadedModel) -> Plan:
    plan = plan_for(model, KINDS)
    plan.choices.update(  # type: ignore[attr-defined]
        {
            unit.name: Candidate(bits=8, float8="e4m3")
            if "head" in unit.role
            else Candidate(bits=4, group_size=16)
            for unit in model.vocabulary
        }
    )
    return plan


def carry_out(
    model: LoadedModel, calibration: Calibration, emit: Callable[[Event], None], **more: Any
) -> list[CompressedLayer]:
    held_out = [{**random_calibration(model, rows=3, length=11).batches[0]}]
    return compress_model(
        model,
        calibration,
        build_plan(model),
        layout=PACKED_LAYOUT,
        held_out=held_out,
        emit=emit,
        **more,
    )


def read_bits(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def describe(layers: list[CompressedLayer]) -> list[Any]:
    """Everything about the layers but the seconds they took."""
    numbers = [
        (x.result.name, x.result.candidate, x.result.weight_error, x.result.output_error)
        for x in layers
    ]
    tensors = [[read_bits(t) for t in (x.codes, x.scale, x.zero, x.mask)] for x in layers]
    return [*numbers, *tensors, *(x.result.notes for x in layers)]


def read_state(model: LoadedModel) -> dict[str, Any]:
    return {name: read_bits(value) for name, value in model.module.state_dict().items()}


@pytest.mark.parametrize(
    ("arch", "compressor"),
    [
        *(("llama", "gptaq"), ("bert", "gptq")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *(("llama", "gptq"), ("bert", "gptaq"), ("olmoe", "gptaq")),
                *(("gpt2", "gptaq"), ("generic", "gptaq")),
            )
        ),
    ],
)
def test_a_run_that_died_after_any_step_ends_as_if_it_had_not(
    tiny_model: TinyModel, arch: str, compressor: str
) -> None:
    path = tiny_model(arch, tied=False) if arch in ("llama", "generic") else tiny_model(arch)
    whole = loaded(path)
    calibration = random_calibration(whole, rows=5, length=21)
    disk = Disk()
    wanted = carry_out(whole, calibration, lambda e: None, compressor=compressor, steps=disk.steps)
    plain = carry_out(loaded(path), calibration, lambda e: None, compressor=compressor)
    assert describe(plain) == describe(wanted)
    for count in range(1, len(disk.kept) + 1):
        dying, model = Disk(count), loaded(path)
        with pytest.raises(Died):
            carry_out(model, calibration, lambda e: None, compressor=compressor, steps=dying.steps)
        dying.most = 10**6
        model = loaded(path)
        found = carry_out(
            model, calibration, lambda e: None, compressor=compressor, steps=dying.steps
        )
        assert describe(found) == describe(wanted)
        assert read_state(model) == read_state(whole)


def test_a_finished_plan_runs_nothing(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    calibration = random_calibration(model, rows=5, length=21)
    disk = Disk()
    carry_out(model, calibration, lambda e: None, compressor="gptaq", steps=disk.steps)
    again = loaded(tiny_model("llama"))
    again.module.forward = None  # type: ignore[assignment]
    events: list[Event] = []
    carry_out(again, calibration, events.append, compressor="gptaq", steps=disk.steps)
    assert read_state(again) == read_state(model)
    assert not [event for event in events if isinstance(event, Notice)]  # whoever keeps them says
    assert [event.done for event in events if isinstance(event, Progress)] == [2]


def test_what_follows_a_step_that_is_missing_is_made_again(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    calibration = random_calibration(model, rows=5, length=21)
    disk = Disk()
    wanted = carry_out(model, calibration, lambda e: None, compressor="gptaq", steps=disk.steps)
    del disk.kept["block-0"]
    disk.kept["block-1"] = []  # never looked at: a block without the one before it is worth nothing
    again = loaded(tiny_model("llama"))
    found = carry_out(again, calibration, lambda e: None, compressor="gptaq", steps=disk.steps)
    assert describe(found) == describe(wanted)
