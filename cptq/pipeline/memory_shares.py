"""How a run shares out the memory that it may take: as facts, and as a notice at its beginning."""

from __future__ import annotations

from cptq.checkpoint.memory import count_least
from cptq.checkpoint.model import LoadedModel
from cptq.errors import ModelError
from cptq.report.estimate import MemoryFacts
from cptq.report.formatting import format_bytes
from cptq.types import Emit, Notice


def report_memory(model: LoadedModel, emit: Emit) -> None:
    """Emit a notice where the model does not fit into its share of the memory."""
    memory = model.memory
    if memory is None or model.held_whole:
        return
    place = "in memory" if model.device.type == "cpu" else f"on {model.device}"
    within = (
        f", within {format_bytes(memory.total)}" if memory.asked or place == "in memory" else ""
    )
    message = f"one block at a time is {place}{within}"
    if model.device.type == "cpu" and model.spill.limit is not None:
        limit, folder = model.spill.limit, memory.folder or "a temporary directory"
        beyond = f" beyond {format_bytes(limit)}" if limit else ""
        message += f"; activations{beyond} go to {folder}"
    subject = "--max-memory" if memory.asked else "memory"
    emit(Notice(kind="info", subject=subject, message=message))


def describe_memory(model: LoadedModel) -> MemoryFacts:
    """Return how the limit on memory is shared out."""
    memory = model.memory
    if memory is None:
        raise ModelError("the model was loaded without a limit on memory")
    limit = model.resident.limit if model.resident else None
    numels = {spec.weight_name: spec.numel for spec in model.layers if spec.tied_to is None}
    return MemoryFacts(
        total=memory.total,
        asked=memory.asked,
        weights=memory.weights if limit is None else limit,
        activations=model.spill.limit or 0,
        whole=sum(numels.values()) * model.dtype.itemsize,
        least=count_least(model.layers),
        held_whole=model.held_whole,
    )
