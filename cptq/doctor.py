"""`cptq doctor`: what is installed, what the machine has, and what is missing.

It works where the packages it looks for do not: each is asked for its version in its metadata, and
what computes (devices, kernels) is asked only where torch can be imported.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import psutil

from cptq import __version__
from cptq.config import DoctorSettings
from cptq.data.files import find_data_directory, find_first
from cptq.errors import DataError
from cptq.report.formatting import format_bytes
from cptq.report.health import Finding, Health

#: package -> what it is for
OPTIONAL = {
    "llama-cpp-python": ("llama_cpp", "runs .gguf files: pip install 'cptq[llamacpp]'"),
    "lm-eval": ("lm_eval", "cptq eval --lm-eval: pip install 'cptq[lm-eval]'"),
    "triton": ("triton", "packed products on a GPU: pip install 'cptq[gpu]'"),
}
_WAY = "put it below the directory of --data-dir or CPTQ_DATA, or let the Hub be reached"
_GLUE = ("SST-2", "CoLA", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI")
#: data set -> files of which one must be there
DATA = {
    "WikiText-2, evaluation": ("wikitext-2-raw/wiki.test.raw",),
    "WikiText, calibration": (
        "wikitext-2-raw/wiki.train.raw",
        "wikitext-103/wiki.valid.tokens",
    ),
    "GLUE": tuple(f"{place}{task}/dev.tsv" for place in ("glue/", "") for task in _GLUE),
}


def examine(settings: DoctorSettings) -> Health:
    """Return what was found."""
    return Health(
        findings=(
            *_list_versions(),
            *_list_machine(),
            *_list_kernels(),
            *_list_data(settings.data_dir),
        )
    )


def _list_versions() -> Iterator[Finding]:
    yield Finding(section="Versions", name="cptq", found=__version__, required=True)
    python = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    yield Finding(section="Versions", name="python", found=python, required=True)
    for package in _list_required():
        yield Finding(
            section="Versions",
            name=package,
            found=_find_version(package),
            required=True,
            remedy=f"pip install {package}",
        )
    for package, (_, remedy) in OPTIONAL.items():
        yield Finding(section="Versions", name=package, found=_find_version(package), remedy=remedy)


def _list_required() -> list[str]:
    """Return the names of the packages that cptq's own metadata requires."""
    try:
        lines = requires("cptq") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        lines = ["torch", "transformers", "safetensors", "numpy", "compressed-tensors"]
    plain = [line for line in lines if "extra ==" not in line]
    return [line.split(">")[0].split("=")[0].split("<")[0].split(";")[0].strip() for line in plain]


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _list_machine() -> Iterator[Finding]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    facts = {
        "processors": f"{os.cpu_count()} ({psutil.cpu_count(logical=False) or '?'} cores)",
        "memory": f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}",
        "disk here": f"{format_bytes(disk.free)} free of {format_bytes(disk.total)}",
    }
    for name, found in facts.items():
        yield Finding(section="Machine", name=name, found=found)
    if find_spec("torch") is None:
        return
    torch = import_module("torch")
    yield Finding(section="Machine", name="threads of torch", found=str(torch.get_num_threads()))
    for name, found in _list_devices(torch):
        yield Finding(
            section="Machine", name=name, found=found, remedy="cptq computes on the processor"
        )


def _list_devices(torch: object) -> Iterator[tuple[str, str]]:
    cuda = getattr(torch, "cuda")  # noqa: B009  mypy: a module as an object
    if not cuda.is_available():
        yield "GPU", ""
        return
    for index in range(cuda.device_count()):
        facts = cuda.get_device_properties(index)
        yield f"GPU {index}", f"{facts.name}, {format_bytes(facts.total_memory)}"


def _list_kernels() -> Iterator[Finding]:
    """Look for the C library, and for the instructions that it takes on this machine."""
    remedy = "install a C compiler (gcc or clang), then install cptq again"
    if find_spec("torch") is None:
        return
    library = import_module("cptq.inference.native.library")
    try:
        features = library.load_library().cptq_cpu_features().decode()
    except library.LibraryError as error:
        yield Finding(section="Kernels", name="C library", found="", remedy=f"{error}; {remedy}")
        return
    words = f"built; instructions: {features}"
    yield Finding(section="Kernels", name="C library", found=words)


def _list_data(data_dir: Path | None) -> Iterator[Finding]:
    try:
        root = find_data_directory(data_dir)
    except DataError as error:
        yield Finding(section="Data", name="directory", found="", remedy=str(error))
        return
    yield Finding(
        section="Data",
        name="directory",
        found=str(root or ""),
        remedy="name one with --data-dir or CPTQ_DATA; without, the Hub is asked",
    )
    for name, files in DATA.items():
        place = None if root is None else find_first(root, files)
        found = "" if root is None or place is None else str(place.relative_to(root))
        yield Finding(section="Data", name=name, found=found, remedy=_WAY)
    manual = "Python's own manual, with every Python"
    yield Finding(section="Data", name="pydoc", found=manual)
