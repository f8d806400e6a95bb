"""Load the C library and describe weights to it.

setuptools builds `_packed` beside this file where a compiler is found (setup.py). It is loaded
after torch, so that both use one pool of OpenMP threads where torch uses libgomp. Structures are
those of packed.h, checked by `cptq_abi_version`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from cptq.inference.operations import PackedWeight
from cptq.layouts.levels import get_levels
from cptq.types import Candidate

#: where setuptools places the library
FOLDER = Path(__file__).parent
#: CPTQ_ABI_VERSION of packed.h
ABI_VERSION = 4
#: codes of enum cptq_type
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ROW_CODES = 3
#: types of dense weights: enum cptq_type and enum cptq_float8 of decoder.h
DENSE_TYPES = {**TYPES, torch.float8_e4m3fn: 8, torch.float8_e5m2: 9}
#: enum cptq_error
NO_MEMORY, NO_SUCH_ROW = -2, -3


class WeightStruct(ctypes.Structure):
    """`cptq_weight` of packed.h."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("out", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("code_words", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("scale_type", ctypes.c_int32),
        ("factor_type", ctypes.c_int32),
        ("factor", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("scale_words", ctypes.c_int64),
        ("zero_words", ctypes.c_int64),
        ("levels", ctypes.c_void_p),
    )


class Projection(ctypes.Structure):
    """`cptq_projection` of decoder.h: a packed weight or a dense one, a bias, a rule for inputs."""

    _fields_ = (
        ("weight", WeightStruct),
        ("dense", ctypes.c_void_p),
        ("dense_type", ctypes.c_int32),
        ("bias", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
        ("thresholds", ctypes.c_int64),
        ("rule", ctypes.c_int32),
    )


class LibraryError(Exception):
    """The library cannot be used; says why."""


@cache
def load_library() -> ctypes.CDLL:
    """Load the library and declare its functions.

    Raises:
        LibraryError: it was not built, does not load, or belongs to another version.
    """
    places = [FOLDER / f"_packed{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise LibraryError("it was not built")
    try:
        library = ctypes.CDLL(str(path))
        version = library.cptq_abi_version()
    except (OSError, AttributeError) as error:
        raise LibraryError(f"it cannot be loaded ({error})") from error
    if version != ABI_VERSION:
        raise LibraryError("it was built from another version of cptq")
    _declare(library)
    return library


def has_library() -> bool:
    """Return whether the library can be used."""
    try:
        load_library()
    except LibraryError:
        return False
    return True


def _declare(library: ctypes.CDLL) -> None:
    pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.cptq_cpu_features.restype = ctypes.c_char_p
    library.cptq_check.argtypes = (pointer,)
    library.cptq_linear.argtypes = (pointer, pointer, count, pointer, pointer, number, number)
    library.cptq_rows.argtypes = (pointer, pointer, count, pointer, number)
    library.cptq_dense_rows.argtypes = (pointer, count, count, pointer)
    size = ctypes.c_size_t
    library.cptq_decoder_bytes.argtypes = (pointer, count, number)
    library.cptq_decoder_bytes.restype = size
    library.cptq_decode.argtypes = (
        *(pointer, pointer, count, count, number),
        *(pointer, pointer, size, number),
    )


def describe_weight(weight: PackedWeight) -> WeightStruct:
    """Return the structure of a weight, whose tensors must outlive it.

    Raises:
        ValueError: a tensor is not contiguous, or has another shape than the scheme says.
    """
    out, inputs = weight.shape
    rows = weight.factor is not None
    struct = WeightStruct(
        bits=weight.scheme.bits,
        group=weight.scheme.group_size or inputs,
        out=out,
        inputs=inputs,
        codes=_find(weight.codes),
        code_words=weight.codes.shape[1],
        scale=_find(weight.scale),
        scale_type=ROW_CODES if rows else TYPES[weight.scale.dtype],
        factor_type=0 if weight.factor is None else TYPES[weight.factor.dtype],
        factor=None if weight.factor is None else _find(weight.factor),
        zero=None if weight.zero is None else _find(weight.zero),
        scale_words=weight.scale.shape[1] if rows else 0,
        zero_words=0 if weight.zero is None else weight.zero.shape[1],
        levels=_find_levels(weight.scheme),
    )
    if out and load_library().cptq_check(ctypes.byref(struct)):
        raise ValueError(f"the tensors of a packed weight do not fit {weight.scheme.label}")
    return struct


def _find_levels(scheme: Candidate) -> int | None:
    return ctypes.addressof(_copy_levels(scheme.levels, scheme.bits)) if scheme.levels else None


@cache
def _copy_levels(kind: str, bits: int) -> ctypes.Array[ctypes.c_int8]:
    """Return a table in memory that stays."""
    table = get_levels(kind, bits)
    return (ctypes.c_int8 * len(table))(*table)


def describe_dense(weight: Tensor) -> Projection:
    """Return the structure of a dense weight (out, in) without gaps, which must outlive it."""
    return Projection(
        weight=WeightStruct(out=weight.shape[0], inputs=weight.shape[1]),
        dense=weight.data_ptr(),
        dense_type=DENSE_TYPES[weight.dtype],
    )


def _find(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError("the tensors of a packed weight must be contiguous")
    return tensor.data_ptr()
