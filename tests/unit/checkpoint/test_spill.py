"""Tensors that wait: exact from memory and from files, which go when nobody refers to them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from cptq.checkpoint.memory import BASE, Memory, choose_memory, count_least, measure_free_bytes
from cptq.checkpoint.pages import MappedFiles
from cptq.checkpoint.spill import Spill, States
from cptq.errors import UsageError
from cptq.types import LayerSpec


def list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_what_exceeds_the_limit_goes_to_a_file_and_comes_back_exactly(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    x = (torch.randn(7, 5) * 3).to(dtype)
    spill = Spill(x.nbytes, tmp_path)
    first, second = spill.keep(x), spill.keep(x.T)
    assert len(list_files(tmp_path)) == 1
    assert torch.equal(first.get(), x)
    assert first.get().dtype is dtype
    assert torch.equal(second.get(), x.T)
    assert second.get().dtype is dtype
    del second
    assert list_files(tmp_path) == []
    del first
    assert spill.in_memory == 0
    third = spill.keep(x)
    assert list_files(tmp_path) == []
    assert torch.equal(third.get(), x)


def test_an_empty_tensor_is_kept_too(tmp_path: Path) -> None:
    assert Spill(-1, tmp_path).keep(torch.empty(0, 3)).get().shape == (0, 3)


def test_what_is_parked_is_empty_until_it_is_restored(tmp_path: Path) -> None:
    x = torch.randn(5, 3)
    expected, held = x.clone(), x.T
    spill = Spill(0, tmp_path)
    parked = spill.park(x)
    assert parked is not None
    assert x.untyped_storage().nbytes() == 0
    assert len(list_files(tmp_path)) == 1
    parked.restore()
    assert torch.equal(x, expected)
    assert torch.equal(held, expected.T)
    del parked
    assert list_files(tmp_path) == []


def test_what_is_reserved_leaves_less_room(tmp_path: Path) -> None:
    x = torch.randn(5, 3)
    spill = Spill(3 * x.nbytes, tmp_path)
    first = spill.keep(x)
    with spill.reserve(2 * x.nbytes):
        second = spill.keep(x)
        assert len(list_files(tmp_path)) == 1
    third = spill.keep(x)
    assert len(list_files(tmp_path)) == 1
    assert all(torch.equal(kept.get(), x) for kept in (first, second, third))


def test_what_has_room_or_shares_its_memory_is_not_parked(tmp_path: Path) -> None:
    x = torch.randn(5, 3)
    for spill, tensor in (
        (Spill(None), x),
        (Spill(x.nbytes, tmp_path), x),
        (Spill(0, tmp_path), x[1:]),
        (Spill(0, tmp_path), x.T),
    ):
        assert spill.park(tensor) is None
    assert list_files(tmp_path) == []


def test_states_are_a_list(tmp_path: Path) -> None:
    states = States(Spill(0, tmp_path), [torch.zeros(2), torch.ones(2)])
    states[0] = torch.full((2,), 5.0)
    states.append(torch.full((2,), 7.0))
    assert [float(state[0]) for state in states] == [5, 1, 7]
    assert len(states) == 3
    assert len(list_files(tmp_path)) == 3  # the one that was replaced is gone


def test_pages_of_a_file_are_given_back_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    torch.arange(1 << 16, dtype=torch.float32).numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=False, size=1 << 16)
    own = torch.arange(1 << 16, dtype=torch.float32)
    for files in (MappedFiles([path]), MappedFiles()):
        for tensor in (mapped, own, mapped[::2]):
            files.drop_pages(tensor)
    assert torch.equal(mapped, own)
    assert torch.equal(own, torch.arange(1 << 16, dtype=torch.float32))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux")
def test_pages_that_were_read_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    torch.zeros(1 << 22).numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=False, size=1 << 22)
    before = count_file_pages()
    mapped.sum()
    assert count_file_pages() - before >= 15 << 20
    MappedFiles().drop_pages(mapped)
    assert count_file_pages() - before < 1 << 20


def count_file_pages() -> int:
    """Return the bytes of files that are in this process's memory."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))


def spec(shape: tuple[int, int], block: int | None = 0) -> LayerSpec:
    return LayerSpec(name="x", block=block, role="q", kind="linear", shape=shape, dtype="F32")


def test_a_limit_that_holds_no_block_is_refused_with_one_that_does() -> None:
    layers = (spec((4096, 4096)), spec((4096, 11008)), spec((32000, 4096), None))
    need = count_least(layers)
    assert need > BASE + 4 * (4096 * 4096 + 4096 * 11008)
    Memory(total=need, asked=True).check(layers)
    with pytest.raises(UsageError, match="--max-memory 1,000,000 bytes") as caught:
        Memory(total=1_000_000, asked=True).check(layers)
    assert f"{-(-need // 10**6):,}MB" in str(caught.value.allowed)
    Memory(total=1_000_000).check(layers)  # chosen by the machine: it is tried


def test_activations_get_what_the_widest_layer_leaves() -> None:
    layers = (spec((4096, 4096)), spec((4096, 11008)), spec((32000, 4096), None))
    held = 4 * (4096 * 4096 + 4096 * 11008)
    for total in (count_least(layers), 4 * 10**9, 8 * 10**9, 64 * 10**9):
        memory = Memory(total=total)
        limit = memory.make_spill(held, layers).limit
        assert limit is not None
        assert 0 <= limit <= total - count_least(layers)
        assert limit <= (total - BASE) // 4 + memory.weights - held
    assert limit == (total - BASE) // 4 + memory.weights - held
    assert memory.make_spill(None, layers).limit == (total - BASE) // 4


def test_a_limit_that_nobody_asked_for_is_less_than_what_is_free() -> None:
    chosen = choose_memory(None)
    assert 0 < chosen.total < measure_free_bytes()
    assert not chosen.asked
    assert choose_memory(5).total == 5
