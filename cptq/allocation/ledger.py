"""The ledger: a budget, and what every option of every unit costs of it, as a sum.

`CostModel.file_bytes` is exact, but it is not a sum over units. The header of a safetensors file
lists the offset of every tensor, and an offset has more digits the more bytes lie before it; the
header is also padded to a multiple of 8. A search over millions of plans needs a sum, since only a
sum can be updated by one addition when one unit changes. So the ledger holds upper bounds:

* `bytes_of[unit][candidate]` is the most that an option can add: its tensors, and their header
  entries with as many offset digits as they can have in any plan.
* `base` is the most that all the rest takes: the other tensors, their entries, and the frames. A
  frame is what a file holds beside tensors and entries: 8 bytes of header length, the brackets and
  metadata of the JSON, and the padding. A model above `CostModel.shard_bytes` has one file, and so
  one frame, per shard.
* `slack` is the most by which the sum can exceed the exact bytes: all digits that entries can lose
  because a tensor starts at a smaller offset, the padding, and the frames of shards that a smaller
  plan does not need.

Together they enclose the exact size of every plan:

    sum_bytes(plan) - slack <= file_bytes(plan) <= sum_bytes(plan)

A plan whose sum is within the limit fits; one whose sum exceeds the limit by more than the slack
does not; only between the two the exact bytes are counted. With fewer candidates per unit the
offsets vary less, and the slack is smaller.

A budget on the compressible weights alone ("weights", a target in bpw) has no header in it, and in
a GGUF file an entry of the header takes the same bytes in every plan. There the sum is exact:
`slack` is 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cptq.allocation.cost import Choices, CostModel
from cptq.layouts.safetensors_header import ALIGNMENT, FRAME, Entry
from cptq.types import Budget, Candidate

#: the candidates of every unit: one list for all units, or {unit: its list}
Candidates = Sequence[Candidate] | Mapping[str, Sequence[Candidate]]
#: {unit: the candidates that it can have}
Options = Mapping[str, Collection[Candidate]]

#: most bytes of one file beside its tensors and their header entries
_FRAME = 8 + FRAME + ALIGNMENT - 1


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A budget and the additive bytes of a model's options; see the head of this module.

    `base` is what every plan takes, `bytes_of[unit][candidate]` what an option adds at most.
    """

    cost: CostModel
    budget: Budget
    base: int
    slack: int
    bytes_of: Mapping[str, Mapping[Candidate, int]]

    @property
    def limit(self) -> int:
        """The bytes that a plan may take, counted as `count_bytes` does."""
        return self.budget.limit_bytes

    def sum_bytes(self, choices: Choices) -> int:
        """Return the upper bound of the bytes of a plan that names every unit."""
        return self.base + sum(self.bytes_of[unit][choices[unit]] for unit in self.bytes_of)

    def count_bytes(self, choices: Choices) -> int:
        """Return the exact bytes that the budget limits."""
        if self.budget.scope == "weights":
            return self.cost.weight_bytes(choices)
        return self.cost.file_bytes(choices)

    def fits(self, choices: Choices, upper_bound: int) -> bool:
        """Return whether a plan keeps the limit exactly; `upper_bound` is its `sum_bytes`."""
        if upper_bound <= self.limit:
            return True
        return upper_bound - self.slack <= self.limit and self.count_bytes(choices) <= self.limit

    def find_smallest(self) -> dict[str, Candidate]:
        """Return the plan of fewest bytes: every unit at its smallest option."""
        return {
            unit: min(options, key=lambda c: (options[c], c))
            for unit, options in self.bytes_of.items()
        }

    def bound_file_bytes(self) -> int:
        """Return the most bytes that the file of a plan within the limit can take."""
        if self.budget.scope == "file":
            return self.limit
        if self.cost.gguf is not None:
            return self.limit + self.cost.other_bytes
        file = _build_file_ledger(self.budget, self.cost, self.bytes_of)
        # what the file can hold beside the compressible weights: other tensors and headers
        headers = sum(
            max(most - self.bytes_of[unit][candidate] for candidate, most in options.items())
            for unit, options in file.bytes_of.items()
        )
        return self.limit + file.base + headers

    def restrict(self, options: Options) -> Ledger:
        """Return the ledger of the same budget with fewer candidates per unit; its slack is less.

        Args:
            options: for every unit, some of the candidates in `bytes_of`.
        """
        return _build(self.budget, self.cost, options)


def build_ledger(budget: Budget, cost: CostModel, candidates: Candidates) -> Ledger:
    """Build the ledger of a budget.

    Args:
        budget: the limit.
        cost: the bytes of the model.
        candidates: the candidates of all units, or {unit: its candidates}. Those that the format
            or the runtime refuses for a unit are left out; a unit left with none stays dense.
    """
    names = [unit.name for unit in cost.units]
    rows = candidates if isinstance(candidates, Mapping) else dict.fromkeys(names, candidates)
    return _build(budget, cost, {name: cost.options(name, rows[name]) for name in names})


def _build(budget: Budget, cost: CostModel, options: Options) -> Ledger:
    if budget.scope == "file" and cost.gguf is None:
        return _build_file_ledger(budget, cost, options)
    return _build_plain_ledger(budget, cost, options)


def _build_plain_ledger(budget: Budget, cost: CostModel, options: Options) -> Ledger:
    """Build the ledger of an exact sum: the compressible weights' tensors, or a GGUF file."""
    bytes_of = {
        unit: {c: cost.count_unit_bytes(unit, c) for c in row} for unit, row in options.items()
    }
    base = cost.other_bytes if budget.scope == "file" else 0
    return Ledger(cost=cost, budget=budget, base=base, slack=0, bytes_of=bytes_of)


def _build_file_ledger(budget: Budget, cost: CostModel, options: Options) -> Ledger:
    """Build the ledger of a limit on the whole file."""
    units = {
        unit: {c: cost.list_unit_entries(unit, c) for c in row} for unit, row in options.items()
    }
    own = {layer.weight_name for unit in cost.units for layer in unit.layers}
    rest = cost.list_other_entries(own)
    offsets = _bound_offsets(rest, list(units.values()), cost.shard_bytes)
    bytes_of = {
        unit: {
            candidate: sum(_bound_bytes(entry, offsets) for entry in entries)
            for candidate, entries in rows.items()
        }
        for unit, rows in units.items()
    }
    frames, frame_slack = _bound_frames(rest, units, cost.shard_bytes)
    return Ledger(
        cost=cost,
        budget=budget,
        base=frames + sum(_bound_bytes(entry, offsets) for entry in rest),
        slack=frame_slack
        + sum(_count_spare_digits(entry, offsets) for entry in rest)
        # a plan holds one option of a unit, so only the option of most spare digits counts
        + sum(
            max(
                sum(_count_spare_digits(entry, offsets) for entry in entries)
                for entries in rows.values()
            )
            for rows in units.values()
        ),
        bytes_of=bytes_of,
    )


#: (rank of the dtype, name), which is where a tensor lies in the file. The name alone is not
#: enough: a format may keep the name of a dense weight for its packed codes, of another dtype.
_Place = tuple[int, str]
#: smallest and largest offset at which a tensor can start
_Offsets = Mapping[_Place, tuple[int, int]]


def _place(entry: Entry) -> _Place:
    return entry.rank, entry.name


def _bound_offsets(
    rest: Sequence[Entry], units: Sequence[Mapping[Candidate, Sequence[Entry]]], most: int
) -> _Offsets:
    """Return the smallest and largest offset of every tensor that any plan can have.

    Tensors lie in a fixed order. So a tensor starts latest where all before it are as large as any
    option makes them, and earliest where they are as small (0 bytes where an option lacks them).
    In a sharded model every tensor may be the first of its shard and start at 0, and starts at
    most where it still fits into a shard of `most` bytes.
    """
    smallest: dict[_Place, int] = {}
    largest: dict[_Place, Entry] = {}
    for entry in rest:
        smallest[_place(entry)], largest[_place(entry)] = entry.nbytes, entry
    for options in units:
        _add_tensor_sizes(options, smallest, largest)
    sharded = sum(entry.nbytes for entry in largest.values()) > most
    offsets, low, high = {}, 0, 0
    for entry in sorted(largest.values()):
        place = _place(entry)
        latest = max(0, most - smallest[place])  # one above `most` is alone in its shard
        offsets[place] = (0, min(high, latest)) if sharded else (low, high)
        low, high = low + smallest[place], high + entry.nbytes
    return offsets


def _add_tensor_sizes(
    options: Mapping[Candidate, Sequence[Entry]],
    smallest: dict[_Place, int],
    largest: dict[_Place, Entry],
) -> None:
    """Add a unit's tensors: their bytes in the option where they are smallest, and largest."""
    counts: dict[_Place, int] = {}
    for entries in options.values():
        for entry in entries:
            place = _place(entry)
            counts[place] = counts.get(place, 0) + 1
            smallest[place] = min(entry.nbytes, smallest.get(place, entry.nbytes))
            if place not in largest or largest[place].nbytes < entry.nbytes:
                largest[place] = entry
    for place, count in counts.items():
        if count < len(options):  # some option does not have this tensor
            smallest[place] = 0


def _bound_bytes(entry: Entry, offsets: _Offsets) -> int:
    """Return the bytes of a tensor and of its header entry at the largest offset."""
    return entry.nbytes + entry.length(offsets[_place(entry)][1])


def _count_spare_digits(entry: Entry, offsets: _Offsets) -> int:
    """Return how many digits a header entry loses where its tensor starts at the least offset."""
    low, high = offsets[_place(entry)]
    return entry.length(high) - entry.length(low)


def _bound_frames(
    rest: Sequence[Entry], units: Mapping[str, Mapping[Candidate, Sequence[Entry]]], most: int
) -> tuple[int, int]:
    """Return the most bytes of the frames, and how many of those a plan may not need.

    There is one frame per shard. The most shards are needed where every unit has its largest
    option; any plan has at least one frame, and of that frame only the padding varies.
    """
    data = sum(entry.nbytes for entry in rest) + sum(
        max(sum(entry.nbytes for entry in entries) for entries in options.values())
        for options in units.values()
    )
    # A shard is closed when the next tensor would exceed `most`, so any two neighbours hold more
    # than that together: n shards hold more than (n - 1) / 2 times `most`. None is without tensor.
    tensors = len(rest) + sum(max(map(len, options.values())) for options in units.values())
    shards = 1 if data <= most else min(2 * data // most + 1, tensors)
    return shards * _FRAME, (shards - 1) * _FRAME + ALIGNMENT - 1
