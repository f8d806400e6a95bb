"""A text on its way through the blocks: as the dense model has it, and as the compressed one does.

The compressed stream gives the inputs x^ that a unit will really see, with the errors of all units
before it; the dense stream gives x, what it would see without any. Both are hidden states, one per
batch. For a block:

    enter_block  the dense stream runs it while it is dense, and what its units read is kept;
                 half of the batches are enough (`DENSE_SHARE`)
    walk         the compressed stream runs it, stage by stage: H = E[x^ x^^T], C = E[(x - x^) x^^T]
                 of the units of a stage, which the caller then compresses

After the last block `collect_head` gives H of the output head. A block that an earlier run has
compressed is passed: `enter_block` without units while it is dense, `pass_block` once it has its
weights.

A walk is one pass where it can be: each batch runs in a greenlet, stops where a unit is about to
read its input, waits until that unit is compressed, and goes on with the new weight. So nothing is
run twice. The input of the unit goes to disk meanwhile, where memory is short. Where the units of a
block are not called once each in the order of the stages (experts, a linear used twice), or a stage
is all there is, or memory does not hold the rest of what waits, every stage has a pass of its own,
and another follows that hands on what the compressed block gives. Both give the same numbers.

Several processes (`checkpoint.ranks`) take a share of the batches each, and add up what they have
summed. That is done in parts of the text, which are the same for any number of them
(`numerics.pairwise`), so that the bits are, too.

Memory: two hidden states per token and, of one block, the dense inputs of its units, which go to
disk beyond a limit (`checkpoint.spill`), and what waiting batches hold (in an MLP its widest
activation). Limits: no C for an expert, to which the
router may send other tokens, nor for a unit whose inputs in the two streams have different shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from cptq.calibration.batches import Batch
from cptq.calibration.objective import select_real_rows
from cptq.calibration.replay import BlockReplay, forward
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.ranks import ALONE, PARTS, Ranks
from cptq.checkpoint.spill import Kept, Parked, States
from cptq.errors import CalibrationError
from cptq.numerics.asymmetric_target import CrossMoment
from cptq.numerics.finite import is_finite
from cptq.numerics.hessian import SecondMoment
from cptq.numerics.pairwise import PairwiseSum, order_parts
from cptq.types import Unit

#: batches that the dense stream takes, which give C. KL of smollm2-135m at 3 bits: all 0.0243, half
#: 0.0244, a quarter 0.0253, for 605, 485 and 398 processor seconds; perplexity at 4 bits: half
#: 28.53, a quarter 28.92
DENSE_SHARE = 0.5
#: bytes per token and feature of the hidden state that a batch holds while it waits in a block: at
#: most the state, its norm, queries, keys and values, beside the input of the unit, which can go to
#: disk
WAITING = 4 * 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """H_II of the inputs of a unit, None where none are read, and C_II where it can be measured."""

    H_II: Tensor | None
    C_II: Tensor | None = None


def can_wait(model: LoadedModel, batches: Sequence[Batch]) -> bool:
    """Whether what all batches hold while they wait in a block fits into memory."""
    limit = model.spill.limit
    return limit is None or count_waiting_bytes(model, batches) <= limit


def count_waiting_bytes(model: LoadedModel, batches: Sequence[Batch]) -> int:
    """Return about the bytes that all batches hold in memory while they wait in a block."""
    positions = sum(batch["input_ids"].numel() for batch in batches)
    return WAITING * positions * model.hidden_size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """The batches of a text that one process takes, part after part.

    `indices` are their places in the text, of `total` batches; `parts` are runs of `batches`.
    """

    batches: list[Batch]
    indices: list[int]
    parts: list[range]
    total: int


def take_share(batches: Sequence[Batch], ranks: Ranks = ALONE) -> Share:
    """Return what this process takes of a text: all of it, if it is alone.

    Batch b belongs to part b modulo `PARTS`: so everybody gets some of the first half of a text,
    which costs more (`DENSE_SHARE`).
    """
    indices: list[int] = []
    parts = []
    for part in order_parts(PARTS, ranks.index, ranks.count):
        own = range(part, len(batches), PARTS)
        parts.append(range(len(indices), len(indices) + len(own)))
        indices += own
    taken = [batches[index] for index in indices]
    return Share(batches=taken, indices=indices, parts=parts, total=len(batches))


def embed_batches(model: LoadedModel, batches: Sequence[Batch], ranks: Ranks = ALONE) -> States:
    """Return the input of the first block for every batch of this process's share."""
    replay = BlockReplay(model, take_share(batches, ranks).batches)
    return States(model.spill, (replay.embed(index) for index in range(len(replay.batches))))


@torch.no_grad()
def measure_head_moment(
    model: LoadedModel,
    batches: Sequence[Batch],
    run: Callable[[int], object] | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return the second moment of the inputs of the output head over the real tokens.

    Args:
        model: with an output head.
        batches: the text.
        run: runs the model as far as the head on a batch of this process's share, by its index
            there; a whole pass without.
        ranks: the processes that share the text.
    """
    share = take_share(batches, ranks)
    head: nn.Linear = model.module.get_output_embeddings()  # type: ignore[operator]
    gathered = _Gathered("the output head", head.weight.shape[1], model, ranks)

    def add(_name: str, x: Tensor) -> None:
        gathered.add(select_real_rows(x, batch.get("attention_mask")), None)
        raise _SeenAll

    with _watch_inputs({"head": head}, add):
        for part in share.parts:
            for index in part:
                batch = share.batches[index]
                with suppress(_SeenAll):
                    forward(model, batch) if run is None else run(index)
            gathered.end_part()
    H_II = gathered.join().H_II
    assert H_II is not None
    return H_II


class Stream:
    """Hidden states of a text.

    Args:
        model: its blocks are still dense.
        batches: the text.
        dense: let a dense stream run along; without it there is no C.
        embedded: what `embed_batches` gave before the embeddings were compressed, to begin the
            dense stream with; without it the embeddings are dense still.
        ranks: the processes that share the text.
    """

    def __init__(
        self,
        model: LoadedModel,
        batches: Sequence[Batch],
        *,
        dense: bool = False,
        embedded: States | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model, self._text, self._ranks = model, batches, ranks
        share = take_share(batches, ranks)
        self._parts = share.parts
        self._replay = BlockReplay(model, share.batches)
        self._masks = [batch.get("attention_mask") for batch in share.batches]
        self._hidden = embed_batches(model, batches, ranks)
        kept = math.ceil(share.total * DENSE_SHARE)
        #: of the own batches, those that the dense stream takes
        self._taken = [own for own, index in enumerate(share.indices) if index < kept]
        begin = self._hidden if embedded is None else embedded
        self._dense = States(model.spill, (begin[i] for i in self._taken)) if dense else None
        #: what the dense stream hands to a unit: {unit: {batch: rows of each call}}
        self._read: dict[str, dict[int, list[Kept]]] = {}

    def enter_block(self, block: int, units: Sequence[Unit]) -> bool:
        """Run the dense stream through a block that is still dense.

        Returns:
            Whether every batch of it called each unit once, in this order; False without one.
        """
        if self._dense is None:
            return False
        kept = [unit for unit in units if not unit.layers[0].expert]
        self._read = {unit.name: {index: [] for index in self._taken} for unit in kept}

        orders: list[list[str]] = []

        def keep(unit_name: str, x: Tensor) -> None:
            orders[-1].append(unit_name)
            rows = select_real_rows(x, self._masks[index])
            self._read[unit_name][index].append(self._model.spill.keep(rows))

        with _watch_inputs(self._find_first_linears(kept), keep):
            for place, index in enumerate(self._taken):
                orders.append([])
                self._dense[place] = self._replay.run(block, self._dense[place], index)
        wrong = sum(order != [unit.name for unit in units] for order in orders)
        return self._ranks.add_counts(wrong) == [0]

    def walk(
        self, block: int, stages: Sequence[Sequence[Unit]], *, in_order: bool
    ) -> Iterator[dict[str, Moments]]:
        """Run a block; yield the moments of stage after stage, {unit: moments}.

        The caller compresses the units of a stage before it asks for the next, with gradients
        disabled all the while (a pass that waits shares the switch with those that run).

        Args:
            block: its index.
            stages: its units in the order in which they are compressed.
            in_order: stages are single units, which every batch calls once each and in this order.

        Raises:
            CalibrationError: an input is NaN or infinite.
        """
        if in_order and len(stages) > 1 and can_wait(self._model, self._replay.batches):
            yield from self._walk_in_one_pass(block, [unit for (unit,) in stages])
            return
        for stage in stages:
            yield self.collect(block, stage)
        self.pass_block(block)

    def pass_block(self, block: int) -> None:
        """Run the compressed stream through a block as it is now."""
        for index, state in enumerate(self._hidden):
            self._hidden[index] = self._replay.run(block, state, index)

    def _walk_in_one_pass(self, block: int, units: Sequence[Unit]) -> Iterator[dict[str, Moments]]:
        passes = [
            greenlet(partial(self._run_block, block, index)) for index in range(len(self._hidden))
        ]
        own = set(passes)
        parked: dict[int, Parked | None] = {}

        def go_on(index: int) -> Any:
            if (inputs := parked.pop(index, None)) is not None:
                inputs.restore()
            return passes[index].switch()

        def wait(unit_name: str, x: Tensor) -> None:
            if getcurrent() in own:  # else it is another stream's pass
                getcurrent().parent.switch(unit_name, x)

        held = count_waiting_bytes(self._model, self._replay.batches)
        with (
            self._model.spill.reserve(held),
            _watch_inputs(self._find_first_linears(units), wait),
        ):
            for unit in units:
                gathered = self._gather(unit)
                for part in self._parts:
                    for index in part:
                        name, x = go_on(index)
                        assert name == unit.name, f"{name} was called before {unit.name}"
                        dense = self._find_dense_rows(unit.name, index, 0)
                        gathered.add(select_real_rows(x, self._masks[index]), dense)
                        parked[index] = self._park(x, index)
                    gathered.end_part()
                self._read.pop(unit.name, None)
                yield {unit.name: gathered.join()}
            for index in range(len(passes)):
                self._hidden[index] = go_on(index)

    def _park(self, x: Tensor, index: int) -> Parked | None:
        """Move the input of a unit to disk, where memory is short, until its batch goes on.

        Not the hidden state itself, as others may hold it.
        """
        state = self._hidden[index]
        if x.untyped_storage().data_ptr() == state.untyped_storage().data_ptr():
            return None
        return self._model.spill.park(x)

    def _run_block(self, block: int, index: int) -> Tensor:
        arguments = self._replay.take_arguments(block, self._hidden[index], index)
        return self._replay.call(block, arguments)

    def collect(self, block: int, units: Sequence[Unit]) -> dict[str, Moments]:
        """Return the moments of the inputs of some units of a block, {unit: moments}.

        Raises:
            CalibrationError: an input is NaN or infinite.
        """
        gathered = {unit.name: self._gather(unit) for unit in units}
        firsts = self._find_first_linears(units)
        calls: list[list[str]] = []

        def add(unit_name: str, x: Tensor) -> None:
            index, call = len(calls) - 1, calls[-1].count(unit_name)
            dense = self._find_dense_rows(unit_name, index, call)
            gathered[unit_name].add(select_real_rows(x, self._masks[index]), dense)
            calls[-1].append(unit_name)
            if len(calls) > 1 and len(calls[0]) == len(firsts) == len(calls[-1]):
                raise _SeenAll

        with _watch_inputs(firsts, add):
            for part in self._parts:
                for index in part:
                    calls.append([])
                    with suppress(_SeenAll):
                        self._replay.run(block, self._hidden[index], index)
                for found in gathered.values():
                    found.end_part()
        for name in gathered:
            self._read.pop(name, None)
        return {name: found.join() for name, found in gathered.items()}

    def collect_head(self) -> Moments:
        """Return the moment of what the output head is given by the compressed blocks."""

        def finish(index: int) -> object:
            return self._replay.finish(self._hidden[index], index)

        return Moments(H_II=measure_head_moment(self._model, self._text, finish, self._ranks))

    def _gather(self, unit: Unit) -> _Gathered:
        return _Gathered(unit.name, unit.layers[0].shape[1], self._model, self._ranks)

    def _find_first_linears(self, units: Sequence[Unit]) -> dict[str, nn.Module]:
        """Return {unit: its first linear}; those of a fused unit read the same input."""
        return {unit.name: self._model.linear(unit.layers[0].name) for unit in units}

    def _find_dense_rows(self, unit_name: str, index: int, call: int) -> Tensor | None:
        """Return what the dense stream handed to a unit in one call of one batch, if it ran it."""
        calls = self._read.get(unit_name, {}).get(index, [])
        return calls[call].get() if call < len(calls) else None


class _Gathered:
    """The sums of one unit while a text runs; no C once the streams do not match."""

    def __init__(self, name: str, features: int, model: LoadedModel, ranks: Ranks) -> None:
        self._name, self._ranks = name, ranks
        self._second = SecondMoment(features, device=model.device)
        self._cross = CrossMoment(features, device=model.device)
        self._sums = [(m, PairwiseSum(model.spill.keep)) for m in (self._second, self._cross)]
        self._differ = False

    def add(self, seen_TI: Tensor, dense_TI: Tensor | None) -> None:
        self._second.add(seen_TI)
        if dense_TI is None:
            return
        if dense_TI.shape != seen_TI.shape:
            self._differ = True
        elif not self._differ:
            self._cross.add(dense_TI, seen_TI)

    def end_part(self) -> None:
        """Say that a part of the text has gone in."""
        for moment, total in self._sums:
            total.push(moment.take())

    def join(self) -> Moments:
        """Return the moments over all processes; nothing can be added any more."""
        tokens, both, differ = self._ranks.add_counts(
            self._second.tokens, self._cross.tokens, self._differ
        )
        for (moment, total), rows in zip(self._sums, (tokens, 0 if differ else both), strict=True):
            moment.put(total.take(), rows)
            if rows:
                self._ranks.add_up(moment.open())
        H_II = self._second.finish()
        C_II = self._cross.finish() if self._cross.tokens else None
        for X_II in (H_II, C_II):
            if X_II is not None and not is_finite(X_II):
                raise CalibrationError(
                    f"the inputs of {self._name} are NaN or infinite on the calibration text",
                    hint="try --dtype float32, or another --calibration text",
                )
        return Moments(H_II=H_II, C_II=C_II)


class _SeenAll(Exception):
    """Every linear that is watched has its input: what would follow is run for nothing.

    Of linears in a block raised only where the first batch called each of them exactly once.
    """


@contextmanager
def _watch_inputs(
    modules: Mapping[str, nn.Module], add: Callable[[str, Tensor], None]
) -> Iterator[None]:
    def watcher(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: add(name, args[0].detach())

    handles = [m.register_forward_pre_hook(watcher(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
