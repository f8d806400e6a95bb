"""The package as users get it: built, checked, and installed into an empty environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.conftest import TinyModel

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
#: what a build reads
SOURCES = ("cptq", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def run(*words: object, cwd: Path) -> str:
    """Run a command outside the checkout; its output, or a failure that shows it."""
    environment = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_sources(place: Path) -> Path:
    """Copy what a build reads, without what was built in the checkout."""
    place.mkdir()
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    for name in SOURCES:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, place / name, **({"ignore": built} if source.is_dir() else {}))
    return place


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an empty environment."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=True)
    folder = "Scripts" if sys.platform == "win32" else "bin"
    return place / folder / "python"


def test_the_wheel_works_where_nothing_else_is_installed(
    python: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source, dist = copy_sources(tmp_path / "source"), tmp_path / "dist"
    pip = (python, "-m", "pip", "install", "--quiet", "--no-compile", "-c")
    run(*pip, ROOT / "constraints.txt", "build", "twine", cwd=tmp_path)
    run(python, "-m", "build", "--outdir", dist, source, cwd=tmp_path)
    (wheel,) = dist.glob("*.whl")
    (archive,) = dist.glob("*.tar.gz")
    assert "PASSED" in run(python, "-m", "twine", "check", "--strict", wheel, archive, cwd=tmp_path)
    with ZipFile(wheel) as content:
        names = content.namelist()
    for needed in ("cptq/py.typed", "cptq/report/templates/report.css"):
        assert needed in names
    assert not any(name.startswith("tests/") for name in names)

    run(*pip, ROOT / "constraints.txt", wheel, cwd=tmp_path)
    cptq = python.parent / "cptq"
    assert "compress" in run(cptq, "--help", cwd=tmp_path)
    assert "cptq works" in run(cptq, "doctor", cwd=tmp_path)
    assert "Runtimes that take the result" in run(
        cptq, "inspect", tiny_model("llama"), cwd=tmp_path
    )
    assert "knapsack" in run(cptq, "methods", "allocator", cwd=tmp_path)
