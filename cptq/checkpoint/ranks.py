"""The processes of a run that several do together, started by torchrun or `accelerate launch`.

    with join("auto", describe) as ranks:       # in every process
        ranks.share(value)                      # the first one's value, in all of them
        ranks.add_up(sum_II)                    # the sum over all of them, the same bits in each

Everything is called by all processes in the same order. A process on its own is `ALONE`, for which
all of this is the identity, and nothing is set up.

The group is a value, not torch's default one: a library that finds a default group takes itself to
run in all processes at once, and waits for the others (compressed-tensors when it loads a model),
while most of a run is done by the first process alone.

Sums are added in the tree of `numerics.pairwise`, so that a run gives the same bits with any number
of processes that divides `PARTS`. Values and small numbers travel through gloo, sums on a GPU
through nccl.

Whoever waits for the others looks meanwhile whether they live, by their process ids on this machine
and by what they left in the store where they met: that they are done, were interrupted, or failed,
and of what. So a process that dies ends all, and there is nothing to time out. A process of another
machine is only missed once its connection is closed.
"""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import psutil
import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from cptq.errors import ProcessError, UsageError, copy_kept
from cptq.numerics.pairwise import add_in_pairs
from cptq.types import Emit, Event

T = TypeVar("T")

#: parts of a text that are summed each on its own; a run may have as many processes as divide it
PARTS = 8
#: how long processes may take to meet, and for what is sent to arrive: somebody may compute a day
MEETING, SENDING = timedelta(minutes=5), timedelta(days=365)
#: seconds between two looks at whether the others live
LOOK = 1.0
#: seconds that the first process, which may hold the store, waits for the others to read it
FAREWELL = 10.0
#: seconds in which it turns out why a connection was lost, and whether a signal came for a death
EXPLANATION, AFTER_SIGNAL = 5.0, 0.5
#: numbers of a sum that travel at once
CHUNK = 1 << 22
#: how a process ended; `followed`: because of another one
_DONE, _INTERRUPTED, _FAILED, _FOLLOWED = "done", "interrupted", "failed", "followed"


class Ranks:
    """This process among those of a run, `index` of `count`; on its own it is 0 of 1.

    `neighbours`: how many of them are on this machine.
    """

    def __init__(self, index: int = 0, count: int = 1, neighbours: int = 1) -> None:
        self.index, self.count, self.neighbours = index, count, neighbours

    def share(self, value: T | None, owner: int = 0) -> T:
        """Return the value that one process has; the others' is not looked at."""
        return cast(T, value)

    def add_up(self, sum_II: Tensor) -> Tensor:
        """Return the sum over all processes, in the memory of the own one; same bits in each."""
        return sum_II

    def add_counts(self, *counts: int) -> list[int]:
        """Return the sums of whole numbers over all processes."""
        return list(counts)

    def pass_on(self, emit: Emit) -> Emit:
        """Return an `emit` that ends a pipeline when another process has died."""
        return emit

    def assign(self, costs: Sequence[float]) -> list[int]:
        """Return which process does each of some tasks: the dearest first, whoever has least."""
        spent, owners = [0.0] * self.count, [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            owners[task] = spent.index(min(spent))
            spent[owners[task]] += costs[task]
        return owners


#: a process on its own
ALONE = Ranks()


@dataclass(frozen=True, slots=True)
class _Peer:
    """Another process of the run, and where it runs."""

    index: int
    host: str
    pid: int
    began: float

    @property
    def lives(self) -> bool:
        """Whether it does, as far as can be seen from this machine."""
        if self.host != socket.gethostname():
            return True
        try:
            process = psutil.Process(self.pid)
            same: bool = process.create_time() == self.began
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


class _Group(Ranks):
    """Several processes."""

    def __init__(self, store: c10d.Store, index: int, count: int, *, nccl: bool) -> None:
        super().__init__(index, count)
        self._store = c10d.PrefixStore("cptq", store)
        of = index, count
        self._gloo: Any = c10d.ProcessGroupGloo(c10d.PrefixStore("gloo", store), *of, SENDING)
        self._sums: Any = self._gloo
        if nccl:
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = SENDING
            self._sums = c10d.ProcessGroupNCCL(c10d.PrefixStore("nccl", store), *of, options)
        self._looked = 0.0
        own = psutil.Process()
        card = json.dumps([socket.gethostname(), own.pid, own.create_time()])
        self._store.set(f"process/{index}", card)
        cards = {i: json.loads(self._store.get(f"process/{i}")) for i in range(count)}
        self._peers = [_Peer(i, *card) for i, card in cards.items() if i != index]
        self.neighbours = sum(card[0] == socket.gethostname() for card in cards.values())

    def share(self, value: T | None, owner: int = 0) -> T:
        """Send the value, with its tensors, from its owner to all others."""
        options = c10d.BroadcastOptions()
        options.rootRank = owner
        if self.index == owner:
            packed = io.BytesIO()
            torch.save(value, packed)
            sent = torch.frombuffer(packed.getbuffer(), dtype=torch.uint8)
            self._call(self._gloo.broadcast, [torch.tensor(len(sent))], options)
            self._call(self._gloo.broadcast, [sent], options)
            return cast(T, value)
        size = torch.tensor(0)
        self._call(self._gloo.broadcast, [size], options)
        got = torch.empty(int(size), dtype=torch.uint8)
        self._call(self._gloo.broadcast, [got], options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        packed = io.BytesIO(got.numpy().data)

        def place(storage: Any, location: str) -> Any:
            return storage.to(device=device) if location.startswith("cuda") else storage

        found: T = torch.load(packed, map_location=place, weights_only=False)
        return found

    def add_up(self, sum_II: Tensor) -> Tensor:
        """Add chunk by chunk: all processes get those of all, and add them in the same order."""
        for own_N in sum_II.view(-1).split(CHUNK):
            sums_RN = own_N.new_empty(self.count, len(own_N))
            self._call(self._sums.allgather, [list(sums_RN)], [own_N])
            own_N.copy_(add_in_pairs(sums_RN))
        return sum_II

    def add_counts(self, *counts: int) -> list[int]:
        """Add on the CPU."""
        total = torch.tensor(counts)
        self._call(self._gloo.allreduce, [total])
        found: list[int] = total.tolist()
        return found

    def pass_on(self, emit: Emit) -> Emit:
        """Look at the others whenever there is an event."""

        def look_and_emit(event: Event) -> None:
            self._look()
            emit(event)

        return look_and_emit

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call what all processes call, and wait; Python runs meanwhile, so that signals arrive."""
        pause = 0.0002
        try:
            work = function(*args)
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
                self._look()
            work.wait()
        except RuntimeError as error:  # gloo's, when a connection is closed
            raise self._explain(error) from error

    def _look(self) -> None:
        """Raise what ended another process, if something did; looks once in a while."""
        if time.monotonic() - self._looked >= LOOK:
            self._looked = time.monotonic()
            end = self.find_end()
            if end is not None:
                raise end

    def _explain(self, error: Exception) -> BaseException:
        """Return why a connection was lost: what the other one left may take a moment to come."""
        lost = ProcessError(f"the connection to another process was lost: {error}")
        return self.wait_for_end(EXPLANATION) or lost

    def wait_for_end(self, seconds: float) -> BaseException | None:
        """Return what `find_end` finds within some seconds: a process does not die at once."""
        until = time.monotonic() + seconds
        while (end := self.find_end()) is None and time.monotonic() < until:
            time.sleep(0.05)
        return end

    def find_end(self) -> BaseException | None:
        """Return what is to end this process, as something ended another one; else None."""
        lost = [peer for peer in self._peers if not peer.lives]  # before what they left is read
        left = {peer.index: self._read_farewell(peer) for peer in self._peers}
        for index, (how, sentence) in left.items():
            if how == _FAILED:
                return ProcessError(f"rank {index} of {self.count} processes failed: {sentence}")
        dead = [peer.index for peer in lost if left[peer.index][0] is None]
        if dead:
            living = [i for i in range(self.count) if i not in dead]
            names = f"rank {', '.join(map(str, dead))} of {self.count} processes"
            return ProcessError(
                f"{names} died and said nothing, as one that is killed or runs out of memory",
                speaker=min(living),
            )
        for index, (how, _) in left.items():
            if how == _INTERRUPTED:
                return KeyboardInterrupt(f"rank {index} of {self.count} processes was interrupted")
        return None

    def _read_farewell(self, peer: _Peer) -> tuple[str | None, str]:
        """Return how another process ended, and its sentence; None where it said nothing."""
        with suppress(RuntimeError):  # who held the store has died
            if self._store.check([f"end/{peer.index}"]):
                how, sentence = json.loads(self._store.get(f"end/{peer.index}"))
                return how, sentence
        return None, ""

    def leave(self, how: str = _DONE, sentence: str = "") -> None:
        """Say how this process ends; the first one waits until the others have heard it."""
        with suppress(RuntimeError):
            self._store.set(f"end/{self.index}", json.dumps([how, sentence]))
        until = time.monotonic() + FAREWELL
        while self.index == 0 and time.monotonic() < until:
            if not any(peer.lives and not self._read_farewell(peer)[0] for peer in self._peers):
                break
            time.sleep(0.02)


@contextmanager
def join(device: str, describe: Callable[[BaseException], str] = str) -> Iterator[Ranks]:
    """Meet the other processes that a launcher started; `ALONE` where it started none.

    Args:
        device: as `--device` names it; each process takes a GPU of its own but for `cpu`.
        describe: puts an error into the sentence that the other processes are to report.

    Raises:
        UsageError: so many processes cannot run together.
        ProcessError: another process has failed or died; raised out of whatever waits for it.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    nccl = _take_gpu(device, count)
    store, index, count = next(rendezvous("env://", timeout=MEETING))
    ranks = _Group(store, index, count, nccl=nccl)
    try:
        yield ranks
        ranks.leave()
    except BaseException as error:
        cause = error
        # a launcher sends a signal to all others when one has died: what counts is why
        end = ranks.wait_for_end(AFTER_SIGNAL) if isinstance(error, KeyboardInterrupt) else None
        if isinstance(end, ProcessError):
            copy_kept(error, end)
            cause = end
        ranks.leave(_name_end(cause), describe(cause))
        if cause is error:
            raise
        raise cause from error


def _name_end(error: BaseException) -> str:
    if isinstance(error, ProcessError):
        return _FOLLOWED
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _FAILED


def _take_gpu(device: str, count: int) -> bool:
    """Take the GPU of this process; return whether there is one to compute on.

    Raises:
        UsageError: too many processes, or of a number that does not divide `PARTS`.
    """
    if PARTS % count:
        allowed = ", ".join(str(n) for n in range(1, PARTS + 1) if not PARTS % n)
        raise UsageError(f"{count} processes cannot share a run", allowed=f"{allowed} processes")
    if device == "cpu" or not torch.cuda.is_available():
        return False
    if device not in ("auto", "cuda"):
        raise UsageError(
            f"--device {device} is one device for {count} processes",
            allowed="auto, cuda (each takes a GPU of its own), cpu",
        )
    own, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= gpus:
        raise UsageError(
            f"there are more processes than GPUs on this machine, {gpus}",
            hint="start one process for each GPU, or add --device cpu",
        )
    torch.cuda.set_device(own)
    return True
