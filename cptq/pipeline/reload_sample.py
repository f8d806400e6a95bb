"""A short input, and what the compressed model in memory makes of it: the check of an artifact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cptq.artifact.formats import FORMATS
from cptq.artifact.reload import TOLERANCE, ReloadSample
from cptq.calibration.batches import trim_padding
from cptq.calibration.replay import BlockReplay, forward
from cptq.pipeline.inputs import CompressInputs
from cptq.types import Emit, Notice

#: tokens of the input on which a written artifact is compared with the model in memory
SAMPLE_TOKENS = 64
#: what a load in float32 may differ by from a run in a narrower type, as a share of the largest
#: output: a few units of bfloat16's last place
NARROW_TOLERANCE = 0.05


@torch.no_grad()
def build_sample(inputs: CompressInputs) -> ReloadSample:
    """Return a short input and the outputs of the compressed model in memory for it."""
    model, batches = inputs.model, inputs.calibration.batches
    # without token types, which llama.cpp does not take; a model without them gets zeros
    names = ("input_ids", "attention_mask")
    batch = trim_padding({name: batches[0][name][:1, :SAMPLE_TOKENS] for name in names})
    exact = model.device.type == "cpu" and model.dtype == torch.float32
    return ReloadSample(
        inputs=batch,
        expected=_select_output(forward(model, batch)),
        tolerance=TOLERANCE if exact else NARROW_TOLERANCE,
        trust_remote_code=inputs.settings.model.trust_remote_code,
    )


@torch.no_grad()
def build_short_sample(
    inputs: CompressInputs, sample: ReloadSample, emit: Emit
) -> ReloadSample | None:
    """Return a sample of the first blocks alone, where memory holds no more of a loaded model."""
    model = inputs.model
    if model.memory is None or not FORMATS.get(inputs.space.form).multiplied_out:
        return None
    count = model.memory.count_loadable_blocks(model.layers)
    if count is None:
        return None
    message = (
        f"the check in a fresh process loads the first {count} of {len(model.blocks)} blocks, as "
        "memory holds no more of the model multiplied out"
    )
    emit(Notice(kind="info", subject="artifact", message=message))
    replay = BlockReplay(model, [dict(sample.inputs)])
    hidden = replay.embed(0)
    for block in range(count):
        hidden = replay.run(block, hidden, 0)
    return replace(
        sample,
        expected=_select_output(replay.finish(hidden, 0)),
        blocks=count,
        left_out=tuple(f"{name}." for name in model.block_names[count:]),
    )


def _select_output(output: Any) -> torch.Tensor:
    answer = output.logits if hasattr(output, "logits") else output.last_hidden_state
    assert isinstance(answer, torch.Tensor)
    return answer.float().cpu()
