"""From what a user typed to a `LoadedModel`, with one clear sentence where that fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from cptq.checkpoint.architectures import GENERIC, architecture
from cptq.checkpoint.experts import unstack_experts
from cptq.checkpoint.files import (
    PICKLE_INDEX,
    PICKLE_SINGLE,
    check_sizes,
    checkpoint_tensors,
    fingerprint,
    pickle_files,
    read_config,
    weight_files,
)
from cptq.checkpoint.hub import resolve
from cptq.checkpoint.layers import Inventory, take_inventory, tied_names
from cptq.checkpoint.model import LoadedModel, ModelSpec
from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.config import ModelSettings
from cptq.errors import CptqError, ModelError, UsageError
from cptq.runtime.modules import packed_modules
from cptq.types import Emit, ModelKind, Notice, Progress, TensorSpec

AUTO_CLASSES: Mapping[ModelKind, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
    "encoder": "AutoModel",
}
RUN_DTYPES = ("auto", "float32", "bfloat16", "float16")
_ENDINGS: tuple[tuple[str, ModelKind], ...] = (
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    ("ForMaskedLM", "masked-lm"),
    ("ForSequenceClassification", "classifier"),
    ("Model", "encoder"),
)


def load_model(
    settings: ModelSettings, emit: Emit, *, conv1d: bool = False, experts: bool = False
) -> LoadedModel:
    """Load a dense checkpoint or a compressed artifact.

    `conv1d` counts the Conv1D layers of GPT-2 among the compressible, `experts` takes stacks of
    experts apart (`cptq.checkpoint.experts`).

    Raises:
        ModelError: not found, not readable, not a text model, NaN weights, random weights.
        UsageError: unknown device or dtype.
    """
    device, path = pick_device(settings.device), resolve(settings, emit)
    config = read_config(path)
    kind = model_kind(config, path)
    files = _weight_paths(path, settings)
    stored = _stored_types(path, files, settings)
    check_sizes(path, config, stored)
    dtype = pick_dtype(settings.dtype, device, stored)
    emit(Progress(stage="load", done=0, total=None, message=settings.model))
    with _hub_errors_explained(settings.model):
        module = _from_pretrained(path, kind, dtype, settings, emit).to(device).eval()
    module.requires_grad_(False)
    quantized = config.get("quantization_config") is not None
    if not quantized:
        _refuse_not_finite(module)
    if experts and not quantized:
        unstack_experts(module, stored)
    tensors = unpacked_view(module, stored) if quantized else stored_tensors(module, stored)
    family = architecture(str(config.get("model_type")))
    return LoadedModel(
        source=settings.model,
        path=path,
        module=module,
        tokenizer=_load_tokenizer(path, settings, emit),
        config=cast(PretrainedConfig, module.config),
        kind=kind,
        family=family.family,
        tensors=tensors,
        fingerprint=fingerprint(files),
        quantized=quantized,
        device=device,
        dtype=dtype,
        **_inventory(module, family, tensors, quantized, emit, conv1d),
    )


def read_spec(settings: ModelSettings, emit: Emit) -> ModelSpec:
    """Read a model's config and tokenizer, and none of its weights.

    Raises:
        ModelError: not found, not readable, not a text model, or a directory without weight files.
    """
    path = resolve(settings, emit)
    config = read_config(path)
    kind = model_kind(config, path)
    _weight_paths(path, settings)
    with _hub_errors_explained(settings.model):
        loaded = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=settings.trust_remote_code
        )
    return ModelSpec(
        source=settings.model,
        path=path,
        tokenizer=_load_tokenizer(path, settings, emit),
        config=loaded,
        kind=kind,
        family=architecture(str(config.get("model_type"))).family,
    )


def _inventory(
    module: nn.Module,
    family: Any,
    tensors: tuple[TensorSpec, ...],
    quantized: bool,
    emit: Emit,
    conv1d: bool,
) -> dict[str, Any]:
    if quantized:
        found = Inventory(block_names=(), layers=(), units=())
    else:
        if family is GENERIC:
            emit(
                Notice(
                    kind="info",
                    subject=type(module).__name__,
                    message="no known family; blocks, roles and fused groups were inferred",
                )
            )
        named = {spec.name: spec for spec in tensors}
        found = take_inventory(module, family, named, emit, conv1d=conv1d)
    return {"block_names": found.block_names, "layers": found.layers, "units": found.units}


def model_kind(config: Mapping[str, Any], path: Path) -> ModelKind:
    """Which of the four kinds a checkpoint is, by the class that wrote it."""
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    for ending, kind in _ENDINGS:
        if name.endswith(ending):
            return kind
    raise ModelError(
        f"{path} holds a {name or 'model that names no architecture'}, which cptq does not handle",
        allowed="...ForCausalLM, ...LMHeadModel, ...ForMaskedLM, ...ForSequenceClassification, "
        "...Model in config.json's architectures",
    )


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", allowed="auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name} needs a GPU and torch sees none", allowed="auto, cpu")
    return device


def pick_dtype(name: str, device: torch.device, stored: Mapping[str, TensorSpec]) -> torch.dtype:
    """The type the model runs in; `auto` is float32 on a CPU, the checkpoint's on a GPU."""
    if name not in RUN_DTYPES:
        raise UsageError(f"unknown dtype {name!r}", allowed=", ".join(RUN_DTYPES))
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    return torch.float32 if device.type == "cpu" else TORCH_DTYPES[_main_dtype(stored)]


def _main_dtype(stored: Mapping[str, TensorSpec]) -> str:
    """The floating type that holds most of the bytes."""
    bytes_by: dict[str, int] = {}
    for spec in stored.values():
        if spec.dtype in ("F16", "BF16", "F32", "F64"):
            bytes_by[spec.dtype] = bytes_by.get(spec.dtype, 0) + spec.nbytes
    return max(bytes_by, key=lambda dtype: bytes_by[dtype], default="F32")


def stored_tensors(module: nn.Module, stored: Mapping[str, TensorSpec]) -> tuple[TensorSpec, ...]:
    """The model's tensors as a dense artifact holds them: once each, in their storage types."""
    ties, usual = tied_names(module), _main_dtype(stored)
    specs = []
    for name, tensor in module.state_dict().items():
        if name in ties:
            continue
        known = stored.get(name)
        floating = tensor.is_floating_point()
        dtype = known.dtype if known else (usual if floating else _dtype_name(tensor.dtype))
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(tensor.shape)))
    return tuple(specs)


def unpacked_view(module: nn.Module, stored: Mapping[str, TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors of an artifact with each packed weight as it is dense."""
    state, packed, specs = module.state_dict(), packed_modules(module), []
    for name, spec in stored.items():
        layer, _, part = name.rpartition(".")
        shape = state.get(f"{layer}.weight_shape")
        dense = packed[layer].shape if layer in packed else None
        if part == "weight_packed" and shape is not None:
            dense, shape = tuple(shape.tolist()), None
        if part in ("weight", "weight_packed") and dense is not None:
            dtype = stored[f"{layer}.weight_scale"].dtype
            specs.append(TensorSpec(name=f"{layer}.weight", dtype=dtype, shape=dense))
        elif (dense is None and shape is None) or not part.startswith("weight_"):
            specs.append(spec)
    return tuple(specs)


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in TORCH_DTYPES.items() if known is dtype)


def _weight_paths(path: Path, settings: ModelSettings) -> list[Path]:
    files = weight_files(path) or (pickle_files(path) if settings.allow_pickle else [])
    if files:
        return files
    pickles = [name for name in (PICKLE_SINGLE, PICKLE_INDEX) if (path / name).exists()]
    if pickles:
        raise ModelError(
            f"{path} has only pickled weights ({pickles[0]}), which can run code when opened",
            allowed="safetensors",
            hint="pass --allow-pickle if you trust whoever made the file",
        )
    raise ModelError(f"{path} has no model.safetensors and no index of shards")


def _stored_types(path: Path, files: list[Path], settings: ModelSettings) -> dict[str, TensorSpec]:
    """The tensors as the checkpoint stores them; of pickles everything but the data is read."""
    if weight_files(path):
        return checkpoint_tensors(path)
    specs = {}
    with _hub_errors_explained(settings.model):
        for file in files:
            loaded = torch.load(file, map_location="meta", weights_only=True)
            for name, value in loaded.items():
                if isinstance(value, torch.Tensor):
                    dtype, shape = _dtype_name(value.dtype), tuple(value.shape)
                    specs[name] = TensorSpec(name=name, dtype=dtype, shape=shape)
    return specs


def _from_pretrained(
    path: Path, kind: ModelKind, dtype: torch.dtype, settings: ModelSettings, emit: Emit
) -> nn.Module:
    auto = getattr(transformers, AUTO_CLASSES[kind])
    module, info = auto.from_pretrained(
        path,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
        trust_remote_code=settings.trust_remote_code,
        use_safetensors=False if settings.allow_pickle and not weight_files(path) else None,
    )
    bad = {key: sorted(map(str, info[key])) for key in ("missing_keys", "mismatched_keys")}
    for key, names in bad.items():
        if names:
            raise ModelError(
                f"{path} does not fill the model: {len(names)} {key.replace('_', ' ')}, "
                f"first {names[0]}; stock transformers would invent these weights",
                hint="check that config.json's architectures belongs to these weights",
            )
    if info["unexpected_keys"]:
        names = sorted(map(str, info["unexpected_keys"]))
        message = f"{len(names)} tensors of the checkpoint are not in the model and are dropped"
        emit(Notice(kind="warning", subject=names[0], message=message))
    return module  # type: ignore[no-any-return]


@contextmanager
def _hub_errors_explained(source: str) -> Iterator[None]:
    try:
        yield
    except (CptqError, MemoryError):
        raise
    except Exception as error:  # there is no telling what a damaged file makes transformers raise
        raise ModelError(f"transformers cannot load {source}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of a message, and the second where the first announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _refuse_not_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(
                f"the weight {name} holds NaN or infinity, so nothing measured on it would mean "
                "anything",
                hint="use a checkpoint whose weights are finite",
            )


def _load_tokenizer(path: Path, settings: ModelSettings, emit: Emit) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # a damaged tokenizer.json raises no less general an error
        message = f"cannot be loaded: {_reason(error)}"
        emit(Notice(kind="warning", subject="tokenizer", message=message))
        return None
