"""`cptq inspect`: what files hold, and of a dense checkpoint what `compress` would do with it.

Only headers and settings are read. Which runtimes take the result is asked of the same checks that
`compress` makes: the constraint sets, the families of GGUF, and for families that are not known by
name the trial of the loader on a few blocks of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from cptq.allocation.cost import explain_layer_refusal
from cptq.artifact.formats import FORMATS
from cptq.artifact.gguf.families import find_family
from cptq.artifact.inspect import Inspection
from cptq.artifact.inspect import inspect as inspect_files
from cptq.artifact.manifest import MANIFEST
from cptq.checkpoint.architectures import GENERIC
from cptq.checkpoint.files import read_config
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.outline import outline_model
from cptq.checkpoint.refusals import check_directory
from cptq.config import RUNTIMES, InspectSettings, ModelSettings, Runtime
from cptq.errors import ArtifactError, CptqError
from cptq.pipeline.load_check import explain_mostly_dense, explain_trial
from cptq.types import Candidate, LayerSpec, Prospect, ProspectPart, Unit

#: the width that runtimes are asked about: all take it
_BITS = 4
_UNTRACED = (
    "the path through the model depends on values: matrices are in the order of the modules, and "
    "all count as used"
)


def inspect(settings: InspectSettings) -> Inspection:
    """Inspect a directory or a file; look ahead where it is a checkpoint that cptq did not write.

    Raises:
        ArtifactError, ModelError: the path is none of these, or is damaged.
    """
    path = settings.path.expanduser()
    try:
        found = inspect_files(path)
    except ArtifactError:
        if path.is_dir():
            check_directory(path)  # says more about an adapter than that it has no weights
        raise
    if not (path / "config.json").is_file() or (path / MANIFEST).exists():
        return found
    return replace(found, prospect=look_ahead(path, settings.trust_remote_code))


def look_ahead(path: Path, trust_remote_code: bool = False) -> Prospect:
    """Return what `compress` would do with a checkpoint."""
    settings = ModelSettings(model=str(path), trust_remote_code=trust_remote_code)
    try:
        model, traced = outline_model(settings, conv1d=True)
    except CptqError as error:
        return Prospect(refusal=str(error))
    trial = cache(partial(_explain_trial, model, trust_remote_code))
    runtimes = {name: _judge(model, runtime, trial) for name, runtime in RUNTIMES.items()}
    known = model.family != GENERIC.family
    return Prospect(
        kind=model.kind,
        family=model.family if known else "unknown, so blocks and roles are inferred",
        blocks=len(model.block_names),
        parts=tuple(_list_parts(model)),
        groups=_count_groups(model.units),
        runtimes=runtimes,
        notes=() if traced else (_UNTRACED,),
    )


def _list_parts(model: LoadedModel) -> Iterable[ProspectPart]:
    """Yield the compressed roles, the vocabulary, what stays dense by its reason, and the rest."""
    sizes = {spec.name: spec.nbytes for spec in model.tensors}
    outer = {unit.layers[0].name: unit.role for unit in model.vocabulary}
    rows: dict[tuple[str, str, bool], list[LayerSpec]] = {}
    for spec in model.layers:
        rows.setdefault(_find_fate(spec, outer), []).append(spec)
    for (what, fate, packed), specs in sorted(rows.items(), key=lambda row: not row[0][2]):
        yield ProspectPart(
            what=what,
            fate=fate,
            packed=packed,
            tensors=len(specs),
            nbytes=sum(sizes.get(spec.weight_name, 0) for spec in specs),
            example=specs[0].name,
        )
    listed = {spec.weight_name for spec in model.layers}
    rest = [spec for spec in model.tensors if spec.name not in listed]
    for what, wide in (("stacks and other tensors", True), ("norms and biases", False)):
        some = [spec for spec in rest if (len(spec.shape) > 1) is wide]
        if some:
            fate = "in no linear layer; kept dense" if wide else "kept dense"
            nbytes = sum(spec.nbytes for spec in some)
            yield ProspectPart(
                what=what,
                fate=fate,
                packed=False,
                tensors=len(some),
                nbytes=nbytes,
                example=some[0].name,
            )


def _find_fate(spec: LayerSpec, outer: dict[str, str]) -> tuple[str, str, bool]:
    """Return (what it is, what becomes of it, whether it is compressed)."""
    if spec.compressible:
        conv1d = spec.kind == "conv1d"
        return spec.role, "compressed by --runtime cptq, llamacpp" if conv1d else "compressed", True
    if spec.name in outer:
        return outer[spec.name], "8-bit floats, or 3 to 8 bits by --runtime cptq, llamacpp", True
    if spec.tied_to in outer:
        return "head", f"one matrix with {spec.tied_to}", True
    return spec.role, spec.reason or "kept dense", False


def _count_groups(units: Iterable[Unit]) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    for unit in units:
        if len(unit.layers) > 1:
            roles = " + ".join(dict.fromkeys(layer.role for layer in unit.layers))
            found[unit.role] = (roles, found.get(unit.role, ("", 0))[1] + 1)
    return found


def _explain_trial(model: LoadedModel, trusted: bool, form: str) -> str | None:
    """Return why the loader of a file format does not open the model; None if it does."""
    runtime = next(known for known in RUNTIMES.values() if known.format == form)
    candidate = Candidate(bits=_BITS, group_size=runtime.group_size)
    ask = partial(explain_trial, model, runtime, form, candidate, trust_remote_code=trusted)
    why = ask(model.all_units)
    if why is not None and runtime.vocabulary and ask(model.units) is None:
        return f"only with --embedding-bits 16: {why}"
    return why


def _judge(
    model: LoadedModel, runtime: Runtime, trial: Callable[[str], str | None]
) -> tuple[bool, str]:
    """Return whether a runtime takes the model compressed, and how much of it or why not."""
    try:
        runtime.check_tensors(spec.name for spec in model.tensors)
        if runtime.gguf:
            find_family(read_config(model.path), model.kind)
    except CptqError as error:
        return False, error.problem
    candidate = Candidate(bits=_BITS, group_size=runtime.group_size)
    form = runtime.format_for(model.layers, asymmetric=False, uneven=bool(runtime.levels))
    layout = FORMATS.get(form).layout
    specs = [spec for unit in model.units for spec in unit.layers]
    refused = [explain_layer_refusal(spec, candidate, layout, runtime) for spec in specs]
    reasons = [why for why in refused if why is not None]
    if specs and len(reasons) == len(specs):
        return False, f"no layer: {reasons[0]}"
    why = explain_mostly_dense(model, runtime) or trial(form)
    if why is not None:
        return False, why
    some = f"{len(specs) - len(reasons)} of {len(specs)} linears"
    return True, f"{some}; {len(reasons)} stay dense: {reasons[0]}" if reasons else "all linears"
