"""Bytes as sums over units, with a bound on what the sum overstates.

`CostModel.file_bytes` is exact and no sum: offsets in the header gain digits as the file grows, and
its padding rounds up. A search over millions of plans needs a sum. So each unit's option gets an
upper bound of all it adds (tensors and header entries with as many offset digits as they can ever
have), and the ledger knows `slack`, the most by which a sum can overstate:

    total(plan) - slack <= file_bytes(plan) <= total(plan)

Above the limit plus slack a plan cannot fit, below the limit it must, and between the two the exact
bytes decide. For a target of bits per weight the limit is on the units' tensors alone, which is a
sum: slack 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cptq.allocation.cost import Choices, CostModel
from cptq.layouts.safetensors_header import (
    ALIGNMENT,
    FRAME,
    SHARD_BYTES,
    Entry,
)
from cptq.types import Candidate

#: the most that a file takes beside its tensors and their entries
_FRAME = 8 + FRAME + ALIGNMENT - 1


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Additive bytes of a model's options; see the head of this module.

    `base` is what every plan takes, `bytes_of[unit][candidate]` what an option adds at most.
    """

    cost: CostModel
    limit: int
    weights_only: bool
    base: int
    slack: int
    bytes_of: Mapping[str, Mapping[Candidate, int]]

    def total(self, choices: Choices) -> int:
        """The sum for a plan that names every unit."""
        return self.base + sum(self.bytes_of[unit][choices[unit]] for unit in self.bytes_of)

    def exact(self, choices: Choices) -> int:
        """The bytes that the limit is about."""
        cost = self.cost
        return cost.weight_bytes(choices) if self.weights_only else cost.file_bytes(choices)

    def fits(self, choices: Choices, total: int) -> bool:
        """Whether a plan, whose sum is `total`, keeps the limit exactly."""
        if total <= self.limit:
            return True
        return total - self.slack <= self.limit and self.exact(choices) <= self.limit

    def restricted(self, candidates: Mapping[str, Sequence[Candidate]]) -> Ledger:
        """The same limit for fewer candidates per unit; its slack is smaller."""
        build = weights_ledger if self.weights_only else file_ledger
        return build(self.cost, candidates, self.limit)


def per_unit(
    cost: CostModel, candidates: Sequence[Candidate] | Mapping[str, Sequence[Candidate]]
) -> Mapping[str, Sequence[Candidate]]:
    """{unit: its candidates}, as far as format and runtime take them.

    A plain list of candidates is the same for every unit. One that can have none of its own stays
    dense.
    """
    names = [unit.name for unit in cost.units]
    rows = candidates if isinstance(candidates, Mapping) else dict.fromkeys(names, candidates)
    return {name: cost.options(name, rows[name]) for name in names}


def weights_ledger(
    cost: CostModel, candidates: Mapping[str, Sequence[Candidate]], limit: int
) -> Ledger:
    """A limit on the bytes of the compressible weights."""
    bytes_of = {
        unit: {c: cost.unit_bytes(unit, c) for c in row} for unit, row in candidates.items()
    }
    return Ledger(cost=cost, limit=limit, weights_only=True, base=0, slack=0, bytes_of=bytes_of)


def file_ledger(
    cost: CostModel, candidates: Mapping[str, Sequence[Candidate]], limit: int
) -> Ledger:
    """A limit on the bytes of the whole file."""
    units = {unit: {c: cost.unit_entries(unit, c) for c in row} for unit, row in candidates.items()}
    mine = {layer.weight_name for unit in cost.units for layer in unit.layers}
    rest = cost.entries_besides(mine)
    reach = _reach(rest, list(units.values()))
    most = {
        unit: {c: sum(_most(entry, reach) for entry in entries) for c, entries in options.items()}
        for unit, options in units.items()
    }
    frames, frame_slack = _frames(rest, units)
    return Ledger(
        cost=cost,
        limit=limit,
        weights_only=False,
        base=frames + sum(_most(entry, reach) for entry in rest),
        slack=frame_slack
        + sum(_spread(entry, reach) for entry in rest)
        + sum(max(_sum_spread(s, reach) for s in options.values()) for options in units.values()),
        bytes_of=most,
    )


#: a name can come with two types, which lie in two places: dense, and packed under the same name
_Place = tuple[int, str]
_Reach = Mapping[_Place, tuple[int, int]]


def _place(entry: Entry) -> _Place:
    return entry.rank, entry.name


def _reach(
    rest: Sequence[Entry],
    units: Sequence[Mapping[Candidate, Sequence[Entry]]],
) -> _Reach:
    """Smallest and largest offset at which each tensor can start, over all plans."""
    least: dict[_Place, int] = {}
    most: dict[_Place, Entry] = {}
    for entry in rest:
        least[_place(entry)], most[_place(entry)] = entry.nbytes, entry
    for options in units:
        _add_option_sizes(options, least, most)
    sharded = sum(entry.nbytes for entry in most.values()) > SHARD_BYTES
    reach, low, high = {}, 0, 0
    for entry in sorted(most.values()):
        reach[_place(entry)] = (0 if sharded else low, high)
        low, high = low + least[_place(entry)], high + entry.nbytes
    return reach


def _add_option_sizes(
    options: Mapping[Candidate, Sequence[Entry]],
    least: dict[_Place, int],
    most: dict[_Place, Entry],
) -> None:
    """A tensor that some option does not have can take 0 bytes."""
    counts: dict[_Place, int] = {}
    for entries in options.values():
        for entry in entries:
            place = _place(entry)
            counts[place] = counts.get(place, 0) + 1
            least[place] = min(entry.nbytes, least.get(place, entry.nbytes))
            if place not in most or most[place].nbytes < entry.nbytes:
                most[place] = entry
    for place, count in counts.items():
        if count < len(options):
            least[place] = 0


def _most(entry: Entry, reach: _Reach) -> int:
    """Bytes of a tensor and its header entry at the largest offset."""
    return entry.nbytes + entry.length(reach[_place(entry)][1])


def _spread(entry: Entry, reach: _Reach) -> int:
    """How many digits an entry can lose where the tensor starts earlier."""
    low, high = reach[_place(entry)]
    return entry.length(high) - entry.length(low)


def _sum_spread(entries: Sequence[Entry], reach: _Reach) -> int:
    return sum(_spread(entry, reach) for entry in entries)


def _frames(
    rest: Sequence[Entry], units: Mapping[str, Mapping[Candidate, Sequence[Entry]]]
) -> tuple[int, int]:
    """Most bytes of the headers' frames (one per shard), and how many of them may be missing."""
    data = sum(entry.nbytes for entry in rest) + sum(
        max(sum(entry.nbytes for entry in entries) for entries in options.values())
        for options in units.values()
    )
    # two neighbouring shards together hold more than one shard's bytes
    shards = 1 if data <= SHARD_BYTES else 2 * data // SHARD_BYTES + 1
    return shards * _FRAME, (shards - 1) * _FRAME + ALIGNMENT - 1
