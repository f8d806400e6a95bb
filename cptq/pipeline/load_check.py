"""Refuse, before any work, a family that the runtime's loader does not open compressed."""

from __future__ import annotations

from collections.abc import Iterable

from cptq.allocation.cost import explain_layer_refusal
from cptq.artifact.formats import FORMATS
from cptq.artifact.trial_load import Trial, count_trial_blocks, try_loading
from cptq.checkpoint.architectures import GENERIC
from cptq.checkpoint.model import LoadedModel
from cptq.config import RUNTIMES, Runtime
from cptq.errors import ModelError
from cptq.types import Candidate, Emit, Notice, Unit

#: the runtimes whose loader is at hand
LOADERS = ("transformers", "cptq")


def check_loadable(
    model: LoadedModel,
    runtime: Runtime,
    form: str,
    candidates: Iterable[Candidate],
    units: Iterable[Unit],
    emit: Emit,
    *,
    trust_remote_code: bool,
) -> None:
    """Try the loader on a short model of zeros, if the family is not known to load.

    Args:
        model: the whole one.
        runtime: that it is compressed for.
        form: the file format.
        candidates: of which the plain one next to 4 bits is tried.
        units: what may be packed.
        emit: receives a notice where nothing can be tried.
        trust_remote_code: let code that comes with the model run.

    Raises:
        ModelError: it does not load; names the runtime whose loader opens it, if there is one.
    """
    plain = [c for c in candidates if not (c.dense or c.float8 or c.scales or c.sparsity)]
    if model.family != GENERIC.family or not plain:
        return
    fits = model.memory.count_loadable_blocks(model.layers) if model.memory else None
    if fits is not None and fits < count_trial_blocks(model):
        message = "memory holds too few blocks to try beforehand whether the result loads"
        emit(Notice(kind="info", subject=runtime.name, message=message))
        return
    candidate = min(plain, key=lambda c: abs(c.bits - 4))
    found = _try(model, runtime, form, candidate, units, trust_remote_code)
    if not found.known:
        message = f"whether the result loads could not be tried beforehand: {found.why}"
        emit(Notice(kind="info", subject=runtime.name, message=message))
    elif found.why is not None:
        raise _build_error(model, runtime, found.why, candidate, trust_remote_code)


def explain_trial(
    model: LoadedModel,
    runtime: Runtime,
    form: str,
    candidate: Candidate,
    units: Iterable[Unit],
    *,
    trust_remote_code: bool,
) -> str | None:
    """Return why the runtime's loader does not open a short model of zeros; None if it does.

    None also for a family that is known to load, and where nothing could be tried.
    """
    if model.family != GENERIC.family:
        return None
    found = _try(model, runtime, form, candidate, units, trust_remote_code)
    return found.why if found.known else None


def _try(
    model: LoadedModel,
    runtime: Runtime,
    form: str,
    candidate: Candidate,
    units: Iterable[Unit],
    trusted: bool,
) -> Trial:
    layout = FORMATS.get(form).layout
    packed = {
        spec.name
        for unit in units
        for spec in unit.layers
        if explain_layer_refusal(spec, candidate, layout, runtime) is None
    }
    if not packed:  # nothing that a loader could stumble over
        return Trial()
    return try_loading(model, form, candidate, packed, trust_remote_code=trusted)


def _build_error(
    model: LoadedModel, runtime: Runtime, why: str, candidate: Candidate, trusted: bool
) -> ModelError:
    """Name the first options whose loader passes the same trial."""
    kind = type(model.module).__name__
    loader = "cptq" if runtime.format == "packed" else "stock transformers"
    for name in LOADERS:
        other = RUNTIMES[name]
        ways = {f"--runtime {name}": model.all_units}
        if other.vocabulary:
            ways[f"--runtime {name} --embedding-bits 16"] = model.units
        for words, units in ways.items():
            found = _try(model, other, other.format, candidate, units, trusted)
            if found == Trial():
                return ModelError(
                    f"{loader} does not load a compressed {kind} ({why})",
                    allowed=f"{words}, which loads it",
                )
    return ModelError(
        f"neither stock transformers nor cptq loads a compressed {kind} ({why})",
        allowed="families of docs/runtimes-and-formats.md",
    )
