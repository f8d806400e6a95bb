"""What the processes of a run share out, and when they may not run together."""

from __future__ import annotations

import pytest
import torch

from cptq.checkpoint.ranks import ALONE, Ranks, join
from cptq.compression.streams import take_share
from cptq.errors import UsageError


def test_a_process_on_its_own_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join("auto") as ranks:
        assert ranks is ALONE
    value, ones = object(), torch.ones(2, 2)
    assert ALONE.share(value) is value
    assert ALONE.add_up(ones) is ones
    assert ALONE.add_counts(3, 4) == [3, 4]
    assert ALONE.assign([1.0, 2.0]) == [0, 0]
    assert not torch.distributed.is_initialized()


def test_tasks_go_to_whoever_has_least() -> None:
    ranks = Ranks(0, 2)
    assert ranks.assign([1, 1, 5, 3]) == [1, 1, 0, 1]
    assert ranks.assign([]) == []


@pytest.mark.parametrize("total", [0, 1, 3, 8, 21])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_every_batch_is_taken_once(total: int, count: int) -> None:
    text = [{"input_ids": torch.tensor([[index]])} for index in range(total)]
    seen = []
    for index in range(count):
        share = take_share(text, Ranks(index, count))
        assert [own for part in share.parts for own in part] == list(range(len(share.batches)))
        assert len(share.parts) == 8 // count
        assert share.total == total
        assert [int(batch["input_ids"]) for batch in share.batches] == share.indices
        seen += share.indices
    assert sorted(seen) == list(range(total))


@pytest.mark.parametrize("count", ["3", "5", "16"])
def test_a_number_that_does_not_divide_the_parts_is_refused(
    monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(UsageError, match="cannot share a run") as caught, join("cpu"):
        pass
    assert caught.value.allowed == "1, 2, 4, 8 processes"


def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="more processes than GPUs"), join("auto"):
        pass
    with pytest.raises(UsageError, match="one device for 2 processes"), join("cuda:0"):
        pass
