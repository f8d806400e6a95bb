"""Make a plan for the inputs of `cptq compress`, and carry it out on the model in memory."""

from __future__ import annotations

from collections.abc import Sequence

from cptq.allocation.allocate import allocate
from cptq.calibration.batches import Batch
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.ranks import ALONE, Ranks
from cptq.compression.blockwise import Steps, compress_model
from cptq.pipeline.inputs import CompressInputs
from cptq.pipeline.profile import build_masking
from cptq.types import CompressedLayer, Emit, Plan, SensitivityTable


def allocate_plan(
    inputs: CompressInputs, allocator: str, table: SensitivityTable | None, emit: Emit
) -> Plan:
    """Return the plan of an allocator within the target."""
    space = inputs.space
    assert inputs.ledger is not None  # a plan of --plan is not allocated
    return allocate(
        allocator,
        table,
        inputs.ledger,
        space.candidates,
        model_fingerprint=inputs.model.fingerprint,
        emit=emit,
    )


def carry_out(
    inputs: CompressInputs,
    plan: Plan,
    calibration: Calibration,
    held_out: Sequence[Batch],
    emit: Emit,
    steps: Steps | None = None,
    ranks: Ranks = ALONE,
) -> list[CompressedLayer]:
    """Carry a plan out on the model in memory by the run's compressor, as `compress_model` does."""
    return compress_model(
        inputs.model,
        calibration,
        plan,
        compressor=inputs.settings.compressor,
        float16_scales=inputs.runtime.float16_scales,
        layout=inputs.space.layout,
        masking=build_masking(inputs.settings),
        held_out=held_out,
        steps=steps,
        ranks=ranks,
        emit=emit,
    )
