"""Find out, before anything is measured, whether the loader of a format opens a compressed family.

Some families read `module.weight` of their linears themselves (Mamba, RWKV) or were not made for
packed modules at all. That shows when what was written is loaded, after all the work. So a model of
the same config is written in the format and loaded and run by its loader: with the fewest first
blocks that show every kind of block, a vocabulary of a few tokens, and zero weights. Where a family
cannot be shortened, with all its blocks, if memory holds them.

Where that fails, the same model is tried dense. If that fails, too, the short model is at fault and
nothing was learned.

Cost: those blocks once in float32 as the loader multiplies them out, in this process; the families
that `checkpoint.architectures` describes are known to load and need no trial. Limit: values are
not compared; the check of the written artifact does that.
"""

from __future__ import annotations

import copy
import io
import json
import tempfile
from collections.abc import Collection, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from cptq.artifact import stock_load
from cptq.artifact.content import Content
from cptq.artifact.formats import FORMATS
from cptq.artifact.formats.interface import SafetensorsFormat
from cptq.checkpoint.experts import unstack_experts
from cptq.checkpoint.files import read_config
from cptq.checkpoint.inventory import find_ties
from cptq.checkpoint.load_errors import extract_reason
from cptq.checkpoint.loader import choose_auto_class
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import TORCH_DTYPES, get_scale_dtype
from cptq.inference.operations import exact_products
from cptq.layouts.groups import resolve_group
from cptq.types import Candidate, CompressedLayer, LayerResult, LayerSpec, TensorSpec

#: tokens of the vocabulary and of the input
VOCABULARY, TOKENS = 64, 4
_SPECIALS = ("pad", "bos", "eos", "sep", "cls", "unk", "decoder_start")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of a trial: `why` it does not load, or why it could not be tried (`known`)."""

    why: str | None = None
    known: bool = True


def count_trial_blocks(model: LoadedModel) -> int:
    """Return how many first blocks show every kind of block, by the names of their matrices."""
    kinds: dict[int, set[tuple[str, str]]] = {block: set() for block in range(len(model.blocks))}
    for spec in model.layers:
        if spec.block is not None:
            inner = spec.name.removeprefix(f"{model.block_names[spec.block]}.")
            kinds[spec.block].add((inner, spec.kind))
    seen: list[set[tuple[str, str]]] = []
    for block, kind in kinds.items():
        if kind not in seen:
            seen.append(kind)
            most = block + 1
    return most


def try_loading(
    model: LoadedModel,
    form: str,
    candidate: Candidate,
    packed: Collection[str],
    *,
    trust_remote_code: bool,
) -> Trial:
    """Write a short model of zeros, and load it as users do.

    Args:
        model: the whole one.
        form: a name of `FORMATS`, of one that `from_pretrained` loads.
        candidate: how the layers that are `packed` are stored.
        packed: names of layers.
        trust_remote_code: let code that comes with the model run.
    """
    count = count_trial_blocks(model)
    found = _try_blocks(model, count, form, candidate, packed, trust_remote_code)
    if not found.known and count == 1 < len(model.blocks):
        # some families (RWKV) divide by the number of blocks less one
        found = _try_blocks(model, 2, form, candidate, packed, trust_remote_code)
    if not found.known and _fits(model):
        found = _try_blocks(model, None, form, candidate, packed, trust_remote_code)
    return found


def _fits(model: LoadedModel) -> bool:
    """Whether memory holds all blocks as the loader multiplies them out."""
    fits = model.memory.count_loadable_blocks(model.layers) if model.memory else None
    return fits is None or fits >= len(model.blocks)


def _try_blocks(
    model: LoadedModel,
    blocks: int | None,
    form: str,
    candidate: Candidate,
    packed: Collection[str],
    trusted: bool,
) -> Trial:
    """Try the first blocks (None: all), compressed, and dense where that fails."""
    try:
        short = _build_short_model(model, blocks, trusted)
    except Exception as error:  # a config can refuse to be shortened in any way
        return Trial(why=extract_reason(error), known=False)
    layers = [_make_zero_layer(spec, candidate) for spec in short.layers if spec.name in packed]
    why = _explain_failure(short, layers, form)
    dense = None if why is None else _explain_failure(short, [], form)
    return Trial(why=dense or why, known=dense is None)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Short:
    """A model of few blocks: its config, and its tensors and layers as the whole model has them."""

    model: LoadedModel
    config: Any
    tensors: tuple[TensorSpec, ...]
    layers: tuple[LayerSpec, ...]
    trust_remote_code: bool


def _build_short_model(model: LoadedModel, blocks: int | None, trusted: bool) -> _Short:
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text = text if blocks is None else stock_load.shorten(text, blocks)
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    for part in {id(part): part for part in (config, text)}.values():
        for name in (f"{word}_token_id" for word in _SPECIALS):
            if getattr(part, name, None) is not None:
                setattr(part, name, 0 if name == "pad_token_id" else None)
    with torch.device("meta"):
        auto = getattr(transformers, choose_auto_class(read_config(model.path), model.kind))
        module: nn.Module = auto.from_config(config, trust_remote_code=trusted)
    stored = {spec.name: spec.dtype for spec in model.tensors}
    unstack_experts(module, stored)
    ties = find_ties(module)
    shapes = {n: tuple(x.shape) for n, x in module.state_dict().items() if n not in ties}
    tensors = tuple(
        TensorSpec(name=name, dtype=stored[name], shape=shape) for name, shape in shapes.items()
    )
    names = {name for name, _ in module.named_modules()}
    layers = tuple(
        replace(spec, shape=shapes[spec.weight_name])
        if spec.kind in ("embedding", "head") and spec.weight_name in shapes
        else spec
        for spec in model.layers
        if spec.name in names
    )
    return _Short(
        model=model, config=config, tensors=tensors, layers=layers, trust_remote_code=trusted
    )


def _make_zero_layer(spec: LayerSpec, candidate: Candidate) -> CompressedLayer:
    out, inputs = spec.shape
    group = resolve_group(inputs, candidate.group_size) or inputs
    zero = None if candidate.symmetric else torch.zeros(out, inputs // group, dtype=torch.int8)
    return CompressedLayer(
        spec=spec,
        result=LayerResult(
            name=spec.name,
            candidate=candidate,
            group_size=candidate.group_size and group,
            nbytes=0,
            weight_error=0.0,
            output_error=None,
            seconds=0.0,
        ),
        codes=torch.zeros(out, inputs, dtype=torch.int8),
        scale=torch.ones(out, inputs // group, dtype=get_scale_dtype(spec)),
        zero=zero,
    )


def _explain_failure(short: _Short, layers: list[CompressedLayer], form: str) -> str | None:
    """Return why the written model does not load; None if it does."""
    chosen = FORMATS.get(form)
    assert isinstance(chosen, SafetensorsFormat)
    with tempfile.TemporaryDirectory(prefix="cptq-trial-") as folder:
        source, place = Path(folder) / "model", Path(folder) / "written"
        source.mkdir()
        place.mkdir()
        try:
            short.config.save_pretrained(source)
            _write(chosen, _build_content(short, source, layers), place)
            report = _load(short, place, chosen.imports)
        except Exception as error:  # whatever the family's code does with modules it does not know
            return f"{type(error).__name__}: {extract_reason(error)}"
    lost = [name for key in ("missing", "unexpected", "mismatched") for name in report[key]]
    return f"{len(lost)} keys do not fit, first {lost[0]}" if lost else None


def _write(form: SafetensorsFormat, content: Content, place: Path) -> None:
    """Write in the format; of every layer, whose rows are all equal, only one is packed."""

    def pack(layer: CompressedLayer, spec: TensorSpec) -> torch.Tensor:
        zero = None if layer.zero is None else layer.zero[:1]
        row = replace(layer, codes=layer.codes[:1], scale=layer.scale[:1], zero=zero)
        return form.pack_layer_tensor(row, spec).expand(spec.shape).contiguous()

    quick = copy.copy(form)
    vars(quick)["pack_layer_tensor"] = pack
    quick.write(content, place, lambda event: None)


def _build_content(short: _Short, source: Path, layers: list[CompressedLayer]) -> Content:
    known = {spec.name: spec for spec in short.tensors}

    def fetch(name: str) -> torch.Tensor | None:
        spec = known.get(name)
        return None if spec is None else torch.zeros(spec.shape, dtype=TORCH_DTYPES[spec.dtype])

    return Content(
        source=short.model.source,
        path=source,
        kind=short.model.kind,
        family=short.model.family,
        fingerprint=short.model.fingerprint,
        tensors=short.tensors,
        layers=short.layers,
        compressed={layer.spec.weight_name: layer for layer in layers},
        fetch=fetch,
    )


def _load(short: _Short, place: Path, imports: tuple[str, ...]) -> Mapping[str, Any]:
    """Load and run the directory as the reload check does, in this process."""
    ids = torch.arange(1, TOKENS + 1)[None]
    save_file({"input_ids": ids}, place.parent / "inputs")
    job: dict[str, Any] = {
        "directory": str(place),
        "auto_class": choose_auto_class(read_config(short.model.path), short.model.kind),
        "attention": None,
        "trust_remote_code": short.trust_remote_code,
        "blocks": None,
        "left_out": [],
        "imports": list(imports),
        "threads": torch.get_num_threads(),
    } | {name: str(place.parent / name) for name in ("inputs", "answer", "report")}
    file = place.parent / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    told = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)  # what is wrong is in the report
    try:
        # exact, as the reload check computes; compressed-tensors shows a bar, whatever is asked
        with exact_products(), redirect_stderr(io.StringIO()):
            stock_load.main(str(file))
    finally:
        logging.set_verbosity(told)
    found: Mapping[str, Any] = json.loads(Path(job["report"]).read_text(encoding="utf-8"))
    return found
