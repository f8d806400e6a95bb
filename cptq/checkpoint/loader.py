"""Load a checkpoint or an artifact from a directory or a Hub id, behind checks of its files.

`load` is the public `cptq.load`: transformers' own `from_pretrained` with the auto class that
config.json names, except that weights which it would initialize randomly are an error.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from cptq.checkpoint.architectures import GENERIC, Architecture, get_architecture
from cptq.checkpoint.contradictions import report_stale_copies, report_untied_head
from cptq.checkpoint.experts import unstack_experts
from cptq.checkpoint.files import (
    check_sizes,
    compute_fingerprint,
    find_weight_files,
    read_config,
)
from cptq.checkpoint.hub import resolve_checkpoint
from cptq.checkpoint.inventory import Inventory, take_inventory
from cptq.checkpoint.load_errors import explain_load_errors, refuse_library_errors
from cptq.checkpoint.memory import Memory
from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.checkpoint.opening import choose_load_dtype, has_rounded_buffers, list_parts
from cptq.checkpoint.pages import MappedFiles
from cptq.checkpoint.refusals import (
    check_config,
    check_directory,
    check_stored,
    find_method,
    refuse_compressed,
)
from cptq.checkpoint.resident import ResidentWeights
from cptq.checkpoint.spill import Spill
from cptq.checkpoint.stored import (
    find_main_dtype,
    find_weights,
    list_stored_tensors,
    list_unpacked_tensors,
    read_stored_tensors,
)
from cptq.checkpoint.tokenizer import load_tokenizer, report_missing_bos
from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.config import ModelSettings
from cptq.errors import ModelError, UsageError
from cptq.inference import compressed_quantizer
from cptq.inference.compressed_tensors import METHOD as COMPRESSED_TENSORS
from cptq.inference.compressed_tensors import UnsupportedError, read_groups
from cptq.inference.modules import remove_rules
from cptq.inference.native.library import has_library
from cptq.numerics.finite import is_finite
from cptq.types import Emit, Event, ModelKind, Notice, Progress, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO_CLASSES: Mapping[ModelKind, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
    "encoder": "AutoModel",
}
#: builds the encoder of an encoder-decoder alone, for the class that such a checkpoint names
TEXT_ENCODER = ("EncoderModel", "AutoModelForTextEncoding")
RUN_DTYPES = ("auto", "float32", "bfloat16", "float16")
_ENDINGS: tuple[tuple[str, ModelKind], ...] = (
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    ("ForMaskedLM", "masked-lm"),
    ("ForSequenceClassification", "classifier"),
    ("Model", "encoder"),
)
#: where transformers lists classes with other endings (BertGenerationDecoder)
_LISTED: tuple[tuple[Mapping[str, Any], ModelKind], ...] = (
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal-lm"),
    (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "masked-lm"),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "classifier"),
    (modeling_auto.MODEL_MAPPING_NAMES, "encoder"),
)


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    activation_sparsity: bool = True,
) -> PreTrainedModel:
    """Load a transformers model in evaluation mode: packed, compressed-tensors or dense.

    Args:
        path: a directory, or a Hub id.
        device: "auto" (the first GPU if there is one, else the CPU), "cpu", "cuda", "cuda:N",
            "mps".
        dtype: the type it computes in: "auto" (float32 on a CPU, the checkpoint's on a GPU),
            "float32", "bfloat16", "float16". Packed codes stay packed; their scales and all dense
            weights are converted.
        revision: branch, tag or commit on the Hub.
        token: access token for the Hub.
        trust_remote_code: allow Python code that comes with the model to run.
        cache_dir: where downloads are kept.
        activation_sparsity: apply the rules of an artifact that drops inputs at run time; False
            removes them from the model.

    Raises:
        CptqError: not found, not readable, not a text model, or a file that does not match; the
            message says which and what to do.

    Warns:
        UserWarning: what `cptq` would print as a warning.
    """
    settings = ModelSettings(
        model=os.fspath(path),
        device=device,
        dtype=dtype,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    module = load_model(settings, _warn, plain=True).module
    if not activation_sparsity:
        remove_rules(module)
    return cast("PreTrainedModel", module)


def _warn(event: Event) -> None:
    if isinstance(event, Notice) and event.kind == "warning":
        warnings.warn(f"{event.subject}: {event.message}", stacklevel=5)


def open_module(
    path: str, kind: ModelKind, *, device: str, dtype: str, trust_remote_code: bool
) -> nn.Module:
    """Load the module alone, as `load` does: no tokenizer, no inventory, no hashes.

    Raises:
        ModelError: not readable, or random weights.
    """
    settings = ModelSettings(model=path, trust_remote_code=trust_remote_code)
    place, run_dtype = torch.device(device), getattr(torch, dtype)
    with explain_load_errors(path):
        module = _load_module(Path(path), kind, run_dtype, place, settings, _warn)
        return module.to(place).eval()


def load_model(
    settings: ModelSettings,
    emit: Emit,
    *,
    conv1d: bool = False,
    experts: bool = False,
    memory: Memory | None = None,
    plain: bool = False,
    dense: bool = False,
) -> LoadedModel:
    """Load a dense checkpoint or a compressed artifact.

    Args:
        settings: which, and how.
        emit: receives progress and notices.
        conv1d: count the Conv1D layers of GPT-2 as compressible.
        experts: split stacks of experts (`cptq.checkpoint.experts`).
        memory: what a dense model may take of it; None: it is in memory as a whole.
        plain: leave the model as transformers loads it, all of it in memory.
        dense: refuse what is compressed already, before it is loaded.

    Raises:
        ModelError: not found, not readable, not a text model, NaN weights, random weights,
            or compressed already where it must not be.
        UsageError: unknown device or dtype.
    """
    with refuse_library_errors(settings.model):
        return _load(settings, emit, conv1d, experts, memory, plain, dense)


def _load(
    settings: ModelSettings,
    emit: Emit,
    conv1d: bool,
    experts: bool,
    memory: Memory | None,
    plain: bool,
    dense: bool,
) -> LoadedModel:
    """Do what `load_model` says."""
    device, path = pick_device(settings.device), resolve_checkpoint(settings, emit)
    config, kind, files, stored = check_checkpoint(settings, path, dense=dense)
    report_stale_copies(files, emit)
    dtype = pick_dtype(settings.dtype, device, stored)
    emit(Progress(stage="load", done=0, total=None, message=settings.model))
    quantized = config.get("quantization_config") is not None
    family = get_architecture(str(config.get("model_type")))
    narrow = dtype if quantized or plain else choose_load_dtype(stored, dtype)
    with explain_load_errors(settings.model, find_method(config)):
        module = _load_module(path, kind, narrow, device, settings, emit).eval()
        if narrow is not dtype and has_rounded_buffers(module):
            module = _load_module(path, kind, dtype, device, settings, emit).eval()
    module.requires_grad_(False)
    mapped = MappedFiles(files)
    if not quantized:
        _refuse_not_finite(module, mapped)
    if experts and not quantized:
        unstack_experts(module, stored)
    resident = None
    if quantized or plain:
        module.to(device)
    else:
        resident = ResidentWeights(device, dtype, _limit_weights(memory, device), mapped)
        resident.manage(module, list_parts(module, family))
        module.config.dtype = dtype
    tensors = (
        list_unpacked_tensors(module, stored) if quantized else list_stored_tensors(module, stored)
    )
    report_untied_head(module, config, emit)
    tokenizer = load_tokenizer(path, settings, emit)
    report_missing_bos(str(config.get("model_type")), tokenizer, emit)
    found = _take_inventory(module, family, tensors, quantized, emit, conv1d)
    if memory is not None:
        memory.check(found.layers)
    return LoadedModel(
        source=settings.model,
        path=path,
        module=module,
        tokenizer=tokenizer,
        config=cast(PretrainedConfig, module.config),
        kind=kind,
        family=family.family,
        tensors=tensors,
        fingerprint=compute_fingerprint(files),
        quantized=quantized,
        device=device,
        dtype=dtype,
        resident=resident,
        spill=(
            memory.make_spill(resident.limit if resident else None, found.layers)
            if memory
            else Spill()
        ),
        memory=memory,
        block_names=found.block_names,
        layers=found.layers,
        units=found.units,
        vocabulary=found.vocabulary,
    )


class Checked(NamedTuple):
    """What a checkpoint holds by its small files: config, kind, weight files and their tensors."""

    config: Mapping[str, Any]
    kind: ModelKind
    files: list[Path]
    stored: dict[str, TensorSpec]


def check_checkpoint(settings: ModelSettings, path: Path, *, dense: bool) -> Checked:
    """Read the small files of a checkpoint and refuse what cannot be loaded; no weight is read.

    Args:
        settings: which model, and whether pickles may be read.
        path: its directory.
        dense: refuse what is compressed already.

    Raises:
        ModelError: says what is wrong, and what to give or to type instead.
    """
    config = _read_checked_config(path)
    if dense:
        refuse_compressed(settings.model, config)
    kind, files = detect_kind(config, path), find_weights(path, settings)
    stored = read_stored_tensors(path, files, settings)
    check_sizes(path, config, stored)
    check_stored(settings.model, config, stored)
    return Checked(config, kind, files, stored)


def _read_checked_config(path: Path) -> Mapping[str, Any]:
    """Return config.json of a directory that holds a model which can be read."""
    check_directory(path)
    config = read_config(path)
    check_config(path, config)
    return config


def _limit_weights(memory: Memory | None, device: torch.device) -> int | None:
    """Return the bytes that matrices may take.

    A GPU has memory of its own: unless --max-memory says less, matrices take a share of what is
    free there, and a larger model is on it block by block.
    """
    if memory is None:
        return None
    if device.type == "cpu" or memory.asked:
        return memory.weights
    if device.type != "cuda":
        return None
    gc.collect()  # a model refers to itself: an earlier one is still there until this
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(memory.of_gpu * (torch.cuda.mem_get_info(device)[0] + kept))


def read_spec(settings: ModelSettings, emit: Emit) -> ModelSpec:
    """Read a model's config and tokenizer, and none of its weights.

    Raises:
        ModelError: not found, not readable, not a text model, or a directory without weight files.
    """
    path = resolve_checkpoint(settings, emit)
    config = _read_checked_config(path)
    kind = detect_kind(config, path)
    find_weights(path, settings)
    with explain_load_errors(settings.model):
        loaded = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=settings.trust_remote_code
        )
    return ModelSpec(
        source=settings.model,
        path=path,
        tokenizer=load_tokenizer(path, settings, emit),
        config=loaded,
        kind=kind,
        family=get_architecture(str(config.get("model_type"))).family,
    )


def _take_inventory(
    module: nn.Module,
    family: Architecture,
    tensors: tuple[TensorSpec, ...],
    quantized: bool,
    emit: Emit,
    conv1d: bool,
) -> Inventory:
    if quantized:
        return Inventory(block_names=(), layers=(), units=())
    if family is GENERIC:
        message = "unknown family; blocks, roles and fused groups were inferred"
        emit(Notice(kind="info", subject=type(module).__name__, message=message))
    named = {spec.name: spec for spec in tensors}
    return take_inventory(module, family, named, emit, conv1d=conv1d)


def detect_kind(config: Mapping[str, Any], path: Path) -> ModelKind:
    """Return which of the four kinds a checkpoint is, by the class that wrote it."""
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    if config.get("is_encoder_decoder") and not name.endswith(("ForCausalLM", TEXT_ENCODER[0])):
        raise ModelError(
            f"{path} holds a {name or 'model'}, an encoder-decoder, which cptq does not support",
            allowed="causal LMs, masked LMs, sequence classifiers, encoders",
            hint="its encoder alone works where transformers has a class for it, such as "
            "T5EncoderModel: load it by that class and save it to another directory",
        )
    for ending, kind in _ENDINGS:
        if name.endswith(ending):
            return kind
    for listed, kind in _LISTED:
        if name in listed.values():
            return kind
    raise ModelError(
        f"{path} holds a {name or 'model that names no architecture'}, which cptq does not support",
        allowed="...ForCausalLM, ...LMHeadModel, ...ForMaskedLM, ...ForSequenceClassification, "
        "...Model in config.json's architectures",
    )


def choose_auto_class(config: Mapping[str, Any], kind: ModelKind) -> str:
    """Return the auto class that loads a checkpoint of this config.json."""
    named = config.get("architectures")
    ending, auto = TEXT_ENCODER
    alone = isinstance(named, list) and bool(named) and str(named[0]).endswith(ending)
    return auto if alone and kind == "encoder" else AUTO_CLASSES[kind]


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the first GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", allowed="auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name} needs a GPU, but torch finds none", allowed="auto, cpu")
    return device


def pick_dtype(name: str, device: torch.device, stored: Mapping[str, TensorSpec]) -> torch.dtype:
    """Return the type the model runs in; `auto` is float32 on a CPU, the stored one on a GPU."""
    if name not in RUN_DTYPES:
        raise UsageError(f"unknown dtype {name!r}", allowed=", ".join(RUN_DTYPES))
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    return torch.float32 if device.type == "cpu" else TORCH_DTYPES[find_main_dtype(stored)]


def _load_module(
    path: Path,
    kind: ModelKind,
    dtype: torch.dtype,
    device: torch.device,
    settings: ModelSettings,
    emit: Emit,
) -> nn.Module:
    load = partial(
        getattr(transformers, choose_auto_class(read_config(path), kind)).from_pretrained,
        path,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
        trust_remote_code=settings.trust_remote_code,
        use_safetensors=False if settings.allow_pickle and not find_weight_files(path) else None,
    )
    opened = _open_packed(load, path, device, settings, emit)
    module, info = opened or load()
    bad = {key: sorted(map(str, info[key])) for key in ("missing_keys", "mismatched_keys")}
    for key, names in bad.items():
        if names:
            raise ModelError(
                f"{path} does not fill the model: {len(names)} {key.replace('_', ' ')}, "
                f"first {names[0]}; transformers would initialize these weights randomly",
                hint="check that config.json's architectures belongs to these weights",
            )
    if info["unexpected_keys"]:
        names = sorted(map(str, info["unexpected_keys"]))
        message = f"{len(names)} tensors of the checkpoint are not in the model and are dropped"
        emit(Notice(kind="warning", subject=names[0], message=message))
    return module  # type: ignore[no-any-return]


def _open_packed(
    load: Callable[..., Any],
    path: Path,
    device: torch.device,
    settings: ModelSettings,
    emit: Emit,
) -> Any:
    """Open a compressed-tensors checkpoint packed.

    Returns None for all other checkpoints, and for those that stock transformers must compute,
    which a notice says.
    """
    stock = read_config(path).get("quantization_config")
    if not isinstance(stock, dict) or stock.get("quant_method") != COMPRESSED_TENSORS:
        return None
    compressed_quantizer.register()
    try:
        read_groups(stock)
        _require_kernels(device)
        if not find_weight_files(path):
            raise UnsupportedError("its weights are pickled")
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=settings.trust_remote_code
        )
        config.quantization_config = {"quant_method": compressed_quantizer.METHOD, "stock": stock}
        return load(config=config)
    except UnsupportedError as error:
        message = f"it is not kept packed, but multiplied out by stock transformers: {error}"
        emit(Notice(kind="info", subject=settings.model, message=message))
        return None


def _require_kernels(device: torch.device) -> None:
    """Refuse where packed products would be slower than dense ones, or have not been timed."""
    if device.type != "cpu":
        raise UnsupportedError(f"packed products on {device.type} have not been timed yet")
    if not has_library():
        raise UnsupportedError("the C library of cptq is missing")


def _refuse_not_finite(module: nn.Module, mapped: MappedFiles) -> None:
    for name, parameter in module.named_parameters():
        if not is_finite(parameter):
            raise ModelError(
                f"the weight {name} holds NaN or infinity, so no measurement would be meaningful",
                hint="try --dtype float32"
                if parameter.dtype is torch.float16
                else "use a checkpoint whose weights are finite",
            )
        mapped.drop_pages(parameter)
