"""Refuse, before any work, a family that the runtime's loader does not open compressed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cptq.allocation.cost import explain_layer_refusal
from cptq.artifact.formats import FORMATS
from cptq.artifact.trial_load import Trial, count_trial_blocks, try_loading
from cptq.checkpoint.architectures import GENERIC
from cptq.checkpoint.model import LoadedModel
from cptq.config import RUNTIMES, Runtime
from cptq.errors import ModelError
from cptq.types import Candidate, Emit, Notice, Unit, is_expert

#: the runtimes whose loader is at hand
STOCK, OWN = LOADERS = ("transformers", "cptq")
#: how much of the linears' weights may stay dense so that stock transformers loads the rest
DENSE_SHARE = 0.1


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
    plain = [_strip(c) for c in candidates if not (c.dense or c.float8)]
    if _is_known(model) or not plain:
        return
    fits = model.memory.count_loadable_blocks(model.layers) if model.memory else None
    if fits is not None and fits < count_trial_blocks(model):
        message = "memory holds too few blocks to try beforehand whether the result loads"
        emit(Notice(kind="info", subject=runtime.name, message=message))
        return
    candidate = min(plain, key=lambda c: abs(c.bits - 4))
    _refuse_mostly_dense(model, runtime, candidate, trust_remote_code)
    found = _try(model, runtime, form, candidate, units, trust_remote_code)
    if found is None:
        return
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
    if _is_known(model):
        return None
    found = _try(model, runtime, form, candidate, units, trust_remote_code)
    return found.why if found is not None and found.known else None


def _is_known(model: LoadedModel) -> bool:
    """Whether the family is known to load; dense stacks of experts beside packed layers may not."""
    stacked = any(is_expert(spec.name) and _is_stacked(spec.name) for spec in model.tensors)
    return model.family != GENERIC.family and not stacked


def _is_stacked(name: str) -> bool:
    return not name.endswith(".weight")


def explain_mostly_dense(model: LoadedModel, runtime: Runtime) -> str | None:
    """Return why a runtime is refused that leaves much dense because of how it loads, or None."""
    if runtime.format != RUNTIMES[STOCK].format or any(s.expert for s in model.layers):
        return None
    units = [(unit, sum(spec.numel for spec in unit.layers)) for unit in model.units]
    whole = sum(size for _, size in units)
    dense = sum(size for u, size in units if any(spec.initialized for spec in u.layers))
    if dense <= DENSE_SHARE * whole:
        return None
    return (
        f"stock transformers reads the weights of linears of a {type(model.module).__name__} "
        f"as it loads it, so that {dense / whole:.0%} of them would stay dense"
    )


def _refuse_mostly_dense(
    model: LoadedModel, runtime: Runtime, candidate: Candidate, trusted: bool
) -> None:
    """Refuse a runtime that leaves much dense because of how it loads, where another does not.

    Raises:
        ModelError: names the other runtime.
    """
    why = explain_mostly_dense(model, runtime)
    way = _find_way(model, candidate, trusted, [OWN]) if why else None
    if why and way:
        raise ModelError(why, allowed=f"{way}, which loads it")


def _strip(candidate: Candidate) -> Candidate:
    """Return a candidate on the plain grid, which loaders know best and which a 0 lies on."""
    return replace(candidate, scales="", levels="", sparsity=0.0, pattern="none", symmetric=True)


def _try(
    model: LoadedModel,
    runtime: Runtime,
    form: str,
    candidate: Candidate,
    units: Iterable[Unit],
    trusted: bool,
) -> Trial | None:
    """Try the loader; None: there is nothing to pack, over which it could stumble."""
    layout = FORMATS.get(form).layout
    packed = {
        spec.name
        for unit in units
        for spec in unit.layers
        if explain_layer_refusal(spec, candidate, layout, runtime) is None
    }
    if not packed:
        return None
    return try_loading(model, form, candidate, packed, trust_remote_code=trusted)


def _build_error(
    model: LoadedModel, runtime: Runtime, why: str, candidate: Candidate, trusted: bool
) -> ModelError:
    """Name the first options whose loader passes the same trial."""
    kind = type(model.module).__name__
    loader = "cptq" if runtime.format == "packed" else "stock transformers"
    way = _find_way(model, candidate, trusted, LOADERS)
    if way:
        return ModelError(
            f"{loader} does not load a compressed {kind} ({why})", allowed=f"{way}, which loads it"
        )
    return ModelError(
        f"neither stock transformers nor cptq loads a compressed {kind} ({why})",
        allowed="families of docs/runtimes-and-formats.md",
    )


def _find_way(
    model: LoadedModel, candidate: Candidate, trusted: bool, runtimes: Iterable[str]
) -> str | None:
    """Return the first options whose loader opens a short model of zeros, with something packed."""
    mixture = any(is_expert(spec.name) for spec in model.tensors)
    for other in (RUNTIMES[name] for name in runtimes):
        if mixture and not other.experts:
            continue
        ways = {f"--runtime {other.name}": model.all_units}
        if other.vocabulary:
            ways[f"--runtime {other.name} --embedding-bits 16"] = model.units
        for words, units in ways.items():
            if _try(model, other, other.format, candidate, units, trusted) == Trial():
                return words
    return None
