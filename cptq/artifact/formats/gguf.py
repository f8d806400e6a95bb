"""`gguf`: one file for llama.cpp with tokenizer and settings inside; nothing is quantized again.

Symmetric codes become ggml's Q4_0, Q5_0 and Q8_0 blocks bit for bit, asymmetric ones Q4_1 and Q5_1
(`numerics.gguf_blocks`), if 32 divides the inputs and the groups and float16 holds the scales and
the scales times zero points (`numerics.grid`). Symmetric codes of 3 and 6 bits with `k` scales
become Q3_K and Q6_K (`numerics.gguf_super_blocks`), if 256 divides the inputs. Dense matrices are
stored as F16 if float16 holds every value, else as BF16 or F32 as in the checkpoint; vectors, and
matrices for which llama.cpp requires it, as F32. The weights of the file are therefore exactly
those of the artifact.

Limits: the families of `artifact.gguf.families`. Q2_K, Q4_K and Q5_K are not written: their groups
have minima that are integers times a second factor, which zero points times scales are not.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from cptq import __version__
from cptq.artifact.companions import LICENCE, copy_companions
from cptq.artifact.content import Content
from cptq.artifact.formats.interface import Format, build_refusal
from cptq.artifact.gguf.families import (
    Config,
    Family,
    compute_rope_factors,
    find_family,
    order_rows,
    report_differences,
)
from cptq.artifact.gguf.reload import compute_gguf_digests, reload_in_llama_cpp
from cptq.artifact.gguf.vocabulary import add_vocabulary, find_tokenizer_model, read_tokenizer
from cptq.artifact.reload import ReloadCheck, ReloadSample
from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.errors import ArtifactError
from cptq.layouts.gguf import (
    GGUF_LAYOUT,
    SUPER_BYTES,
    SUPER_MOST,
    GgufSizes,
    align,
    count_row_bytes,
    explain_shape,
    explain_type,
    find_type,
)
from cptq.numerics.gguf_blocks import compute_minimum, fits_float16, pack_blocks
from cptq.numerics.gguf_super_blocks import pack_super_blocks
from cptq.numerics.super_scales import split_supers
from cptq.types import CompressedLayer, Emit, ModelKind, TensorSpec

#: llama.cpp's names for files of mostly one type; of Q3_K there are three, S that of Q3_K alone
_FILE_TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q3_K": 11,
    "Q6_K": 18,
    "IQ4_NL": 25,
}
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor of the file: its name there, its source and its type."""

    name: str
    spec: TensorSpec
    kind: str
    layer: CompressedLayer | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        if self.layer is not None:
            return self.layer.spec.shape
        return self.spec.shape[::-1] if self.transposed else self.spec.shape

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of the bytes (uint8)."""
        *rows, last = self.shape
        width = count_row_bytes(last, self.kind) if self.layer else last * _WIDTHS[self.kind]
        return (*rows, width)


class Gguf(Format):
    """The format described at the top of this module."""

    name = "gguf"
    layout = GGUF_LAYOUT
    tags = ("gguf", "llama.cpp")
    library = None
    sharded = False

    def check(self, content: Content) -> None:
        config = read_config(content)
        family = find_family(config, content.kind)
        find_tokenizer_model(read_tokenizer(content.path))
        _refuse_layers(list(content.compressed.values()))
        list(_list_entries(content, family, config))

    def estimate_bytes(self, content: Content) -> int:
        """Return an upper bound; the vocabulary is estimated as twice its tokenizer.json."""
        config = read_config(content)
        entries = list(_list_entries(content, find_family(config, content.kind), config))
        data = sum(int(np.prod(entry.byte_shape)) + 32 + 128 for entry in entries)
        return data + 2 * (content.path / "tokenizer.json").stat().st_size + (1 << 16)

    def write(self, content: Content, place: Path, emit: Emit) -> dict[str, int]:
        path = place / make_file_name(content)
        config = read_config(content)
        family = find_family(config, content.kind)
        entries = list(_list_entries(content, family, config))
        report_differences([spec.name for spec in content.tensors], family, config, emit)
        _write_file(path, content, config, family, entries, emit)
        copy_companions(content, place, emit, only=LICENCE)
        return {path.name: path.stat().st_size}

    def check_reload(
        self,
        place: Path,
        kind: ModelKind,
        sample: ReloadSample,
        emit: Emit,
        source: Path | None = None,
    ) -> ReloadCheck:
        tokenizer = None if source is None else source / "tokenizer.json"
        return reload_in_llama_cpp(find_only_file(place), kind, sample, emit, tokenizer)

    def compute_digests(self, place: Path, files: Iterable[str]) -> dict[str, str]:
        return {n: d for name in files for n, d in compute_gguf_digests(place / name).items()}

    def describe_loading(self, content: Content) -> Sequence[str]:
        return [
            "```bash",
            f'llama-cli -m {make_file_name(content)} -p "Once upon a time"',
            "```",
            "",
            "Or use `Llama(model_path=...)` of llama-cpp-python, or any program built on "
            "llama.cpp. The file contains the tokenizer and all settings.",
            "",
        ]


GGUF = Gguf()


def make_file_name(content: Content) -> str:
    """Return the base model's name as a file name."""
    return re.sub(r"[^\w.-]+", "-", content.base_name.rpartition("/")[2]) + ".gguf"


def find_only_file(place: Path) -> Path:
    """Return the one GGUF file of a directory.

    Raises:
        ArtifactError: there is none, or more than one.
    """
    found = sorted(place.glob("*.gguf"))
    if len(found) != 1:
        raise ArtifactError(f"{place} holds {len(found)} GGUF files", allowed="one")
    return found[0]


def read_config(content: Content) -> dict[str, Any]:
    """Read all settings of the model, including defaults."""
    try:
        config = AutoConfig.from_pretrained(content.path, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{content.path / 'config.json'} cannot be read: {error}") from error
    found: dict[str, Any] = config.to_dict()
    return found


def _refuse_layers(layers: Sequence[CompressedLayer]) -> None:
    """Raise ArtifactError for layers that no block type holds exactly."""
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        why = _explain_refusal(layer)
        if why is not None:
            reasons.setdefault(why, []).append(layer.spec.name)
    for why, names in reasons.items():
        raise build_refusal(
            names,
            f"GGUF cannot hold {why}",
            allowed="artifacts of cptq compress --runtime llamacpp; or --format dense",
        )


def _explain_refusal(layer: CompressedLayer) -> str | None:
    inputs, candidate = layer.spec.shape[1], layer.result.candidate
    kind = find_type(candidate)
    if kind is None:
        return explain_type(candidate)
    shape = explain_shape(inputs, inputs // layer.scale.shape[1], candidate)
    if shape is not None:
        return shape
    if kind in SUPER_BYTES:
        return _explain_super_scales(layer)
    if not fits_float16(layer.scale):
        return "scales that are not exact in float16"
    if layer.zero is not None and not fits_float16(compute_minimum(layer.scale, layer.zero, kind)):
        return "scales times zero points that are not exact in float16"
    return None


def _explain_super_scales(layer: CompressedLayer) -> str | None:
    try:
        split_supers(layer.scale, SUPER_MOST[layer.result.candidate.bits])
    except ValueError as error:
        return f"a super-block here: {error}"
    return None


def _list_entries(content: Content, family: Family, config: Config) -> Iterator[_Entry]:
    """List the tensors of the file in checkpoint order."""
    blocks = config.get("num_hidden_layers") or config["n_layer"]
    names = family.build_name_map(blocks)
    conv1d = {spec.weight_name for spec in content.layers if spec.transposed}
    for spec in content.tensors:
        if spec.name.endswith(family.left_out):
            continue
        name = names.get_name(family.translate_name(spec.name), (".weight", ".bias"))
        if name is None:
            raise ArtifactError(
                f"llama.cpp's {family.arch.name.lower()} has no tensor for {spec.name}"
            )
        layer = content.compressed.get(spec.name)
        if layer is not None:
            kind = find_type(layer.result.candidate)
            assert kind is not None
        else:
            kind = _choose_dense_type(content, spec, family)
        yield _Entry(name=name, spec=spec, kind=kind, layer=layer, transposed=spec.name in conv1d)


def _choose_dense_type(content: Content, spec: TensorSpec, family: Family) -> str:
    """Return F32 for vectors, and for a matrix the narrowest exact type that llama.cpp accepts."""
    if len(spec.shape) < 2 or spec.name.endswith(family.always_f32):
        return "F32"
    return "F16" if spec.dtype == "F16" or fits_float16(content.get_dense(spec)) else spec.dtype


def measure_sizes(content: Content) -> GgufSizes:
    """Return what the file of a model holds beside packed weights, to count budgets with.

    The header is written to a temporary file: its size does not depend on how tensors are packed.

    Raises:
        ArtifactError: llama.cpp does not know the family or the tokenizer.
    """
    config = read_config(content)
    family = find_family(config, content.kind)
    find_tokenizer_model(read_tokenizer(content.path))
    entries = list(_list_entries(content, family, config))
    with TemporaryDirectory(prefix="cptq-gguf-") as folder:
        path = Path(folder) / "header.gguf"
        writer, factors = _write_header(path, content, config, family, entries, lambda event: None)
        writer.close()
        frame = align(path.stat().st_size)
    if factors is not None:
        frame += align(4 * len(factors))
    dense = dict.fromkeys((spec.name for spec in content.tensors), 0)
    dense |= {entry.spec.name: align(int(np.prod(entry.byte_shape))) for entry in entries}
    return GgufSizes(frame=frame, dense=dense)


def _write_file(
    path: Path,
    content: Content,
    config: Config,
    family: Family,
    entries: Sequence[_Entry],
    emit: Emit,
) -> None:
    writer, factors = _write_header(path, content, config, family, entries, emit)
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for entry in entries:
        order = order_rows(family, config, entry.spec.name)
        writer.write_tensor_data(_pack_bytes(content, entry, order))
    writer.close()
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _write_header(
    path: Path,
    content: Content,
    config: Config,
    family: Family,
    entries: Sequence[_Entry],
    emit: Emit,
) -> tuple[gguf.GGUFWriter, Tensor | None]:
    """Write all that comes before the tensors; return the writer, and the rotary factors if any."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.arch])
    _describe(writer, content, entries)
    family.sizes(writer, config)
    add_vocabulary(writer, content.path, config["vocab_size"], emit)
    factors = compute_rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype("f4"), 4 * len(factors))
    for entry in entries:
        shape, kind = entry.byte_shape, gguf.GGMLQuantizationType[entry.kind]
        size = int(np.prod(shape))
        writer.add_tensor_info(entry.name, shape, np.dtype("u1"), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer, factors


def _describe(writer: gguf.GGUFWriter, content: Content, entries: Sequence[_Entry]) -> None:
    kinds = Counter(entry.kind for entry in entries if entry.layer is not None)
    writer.add_name(content.base_name)
    writer.add_file_type(_FILE_TYPES[kinds.most_common(1)[0][0]] if kinds else 1)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("cptq.version", __version__)
    writer.add_string("cptq.base_fingerprint", content.fingerprint)


def _pack_bytes(content: Content, entry: _Entry, order: Tensor | None) -> np.ndarray[Any, Any]:
    """Return the bytes of a tensor, uint8 of `entry.byte_shape`."""
    layer = entry.layer
    if layer is not None:
        parts = [x if x is None else x.cpu() for x in (layer.codes, layer.scale, layer.zero)]
        if order is not None:
            parts = [x if x is None else x[order] for x in parts]
        codes, scale, zero = parts
        assert codes is not None
        assert scale is not None
        supers = entry.kind in SUPER_BYTES
        packed: np.ndarray[Any, Any] = (
            pack_super_blocks(codes, scale, entry.kind)
            if supers
            else pack_blocks(codes, scale, entry.kind, zero)
        ).numpy()
        return packed
    value = content.get_dense(entry.spec).detach().cpu()
    value = value.T if entry.transposed else value
    value = (value if order is None else value[order]).to(TORCH_DTYPES[entry.kind]).contiguous()
    raw: np.ndarray[Any, Any] = value.view(torch.uint8).numpy()
    return raw
