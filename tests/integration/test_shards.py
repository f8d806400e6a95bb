"""`--max-shard-size`: weight files of a chosen size, whose bytes are those that were promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner, Result

from cptq.cli.app import app
from cptq.config.checks import parse_size
from cptq.config.inputs import DEFAULT_SHARD_SIZE
from cptq.inference.modules import find_packed_modules
from cptq.layouts.safetensors_header import SHARD_BYTES
from tests.conftest import TinyModel

pytestmark = pytest.mark.usefixtures("same_process", "short_manual")
SMALL = [*("--calibration", "pydoc", "--samples", "4", "--seqlen", "32"), "--no-check-uniform"]
SMALL += ["--group-size", "16", "--allocator", "even"]
MOST = 4_000


def call(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(word) for word in words])


def compress(model: Path, out: Path, *more: str) -> Path:
    found = call("compress", model, *SMALL, "-o", out, *more)
    assert found.exit_code == 0, found.output
    return out


def count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def count_tensor_bytes(file: Path) -> list[int]:
    with safe_open(file, "pt") as stored:
        return [stored.get_tensor(name).nbytes for name in stored.keys()]  # noqa: SIM118


def test_the_usual_size_is_the_one_that_is_counted_with() -> None:
    assert parse_size(DEFAULT_SHARD_SIZE, "--max-shard-size") == SHARD_BYTES


@pytest.mark.parametrize("runtime", ["transformers", "cptq"])
def test_all_files_together_are_as_large_as_promised(
    runtime: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model, target = tiny_model("llama"), "60%"
    words = ("--runtime", runtime, "--target", target, "--max-shard-size")
    one = compress(model, tmp_path / "one", *words, "5GB")
    out = compress(model, tmp_path / "out", *words, f"{MOST}B")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert len(list(one.glob("*.safetensors"))) == 1
    for file in files:
        sizes = count_tensor_bytes(file)
        assert sum(sizes) <= MOST or len(sizes) == 1
    manifest = json.loads((out / "cptq.json").read_text())
    plan = json.loads((out / "plan.json").read_text())
    assert list(manifest["weight_files"]) == [file.name for file in files]
    assert plan["predicted_bytes"] == sum(manifest["weight_files"].values()) == count_bytes(out)
    assert count_bytes(out) <= plan["budget"]["limit_bytes"]
    # a share of the checkpoint is the same number however the files are split
    assert plan["budget"] == json.loads((one / "plan.json").read_text())["budget"]
    assert call("verify", out).exit_code == 0


def test_a_budget_in_bytes_holds_the_headers_of_all_files(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    size = count_bytes(compress(model, tmp_path / "a", "--target", "4bit"))
    out = compress(model, tmp_path / "b", "--target", f"{size}B", "--max-shard-size", "4kB")
    assert count_bytes(out) <= size


def test_packed_shards_are_found_by_their_index(tiny_model: TinyModel, tmp_path: Path) -> None:
    import cptq

    words = ("--runtime", "cptq", "--target", "4bit", "--max-shard-size", "4kB")
    out = compress(tiny_model("llama"), tmp_path / "out", *words)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["weights"] == "cptq.safetensors.index.json"
    assert find_packed_modules(cptq.load(out))


@pytest.fixture(scope="module")
def plain(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in one file, of what every format holds."""
    words = ("--target", "4bit", "--scales", "16bit", "--embedding-bits", "16")
    return compress(tiny_model("llama"), tmp_path_factory.mktemp("plain") / "out", *words)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["compressed-tensors", "packed", "dense"])
def test_export_splits_weights_that_stay_the_same(form: str, plain: Path, tmp_path: Path) -> None:
    many, one = tmp_path / "many", tmp_path / "one"
    for out, size in ((many, "4kB"), (one, "1GB")):
        found = call("export", plain, "--format", form, "-o", out, "--max-shard-size", size)
        assert found.exit_code == 0, found.output
    assert len(list(many.glob("*.safetensors"))) > 3
    (file,) = one.glob("*.safetensors")
    manifests = [json.loads((place / "cptq.json").read_text()) for place in (many, one)]
    assert manifests[0]["tensors_sha256"] == manifests[1]["tensors_sha256"]
    assert count_bytes(many) > file.stat().st_size


@pytest.mark.slow
def test_shards_are_joined_again(plain: Path, tmp_path: Path) -> None:
    words = ("--format", "packed", "-o")
    many = call("export", plain, *words, tmp_path / "many", "--max-shard-size", "4kB")
    again = call("export", tmp_path / "many", *words, tmp_path / "one")
    assert (many.exit_code, again.exit_code) == (0, 0), again.output
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1


@pytest.mark.slow
def test_gguf_is_one_file(plain: Path, tmp_path: Path) -> None:
    found = call(
        "export", plain, "--format", "gguf", "-o", tmp_path / "g", "--max-shard-size", "1GB"
    )
    assert found.exit_code == 2
    assert "--max-shard-size has no effect with --format gguf" in " ".join(found.output.split())


@pytest.mark.parametrize("command", ["compress", "export"])
@pytest.mark.parametrize("size", ["0", "many", "-1GB", "3XB"])
def test_what_is_no_size_is_refused(command: str, size: str) -> None:
    more = ("--format", "dense") if command == "export" else ()
    found = call(command, "somewhere", *more, f"--max-shard-size={size}")
    assert found.exit_code == 2
    words = " ".join(found.output.split())
    assert f"--max-shard-size is '{size}'; allowed: a size such as 3GB" in words
