"""Why a unit of a plan has its bits; made by `allocation.explain`, shown by `report.plans`."""

from __future__ import annotations

from dataclasses import dataclass

from cptq.types.plan import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Another option of a unit: bytes and predicted loss against what the plan has."""

    candidate: Candidate
    nbytes: int
    loss: float

    @property
    def rate(self) -> float | None:
        """Predicted loss that a byte more takes off, or that a byte less costs."""
        return -self.loss / self.nbytes if self.nbytes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a unit has its candidate.

    `steps` are its options by size, the chosen one (0 bytes, 0 loss) among them. `left` are the
    bytes that the budget has left. Of the `count` units that could get one option more, the step of
    this one is the `rank`-th best per byte (None: it has the largest option), and `price` is that
    of the best. `least` is what the cheapest step down of another unit costs per byte (None: there
    is none). `fixed` says that the unit has no other option.
    """

    unit: str
    role: str
    weights: int
    target: str
    chosen: Candidate
    score: float
    steps: tuple[Step, ...]
    left: int
    count: int
    rank: int | None
    price: float | None
    least: float | None

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.steps) == 1

    @property
    def up(self) -> Step | None:
        """The next larger option that predicts less loss."""
        return next((s for s in self.steps if s.nbytes > 0 and s.loss < 0), None)

    @property
    def down(self) -> Step | None:
        """The next smaller option."""
        return next((s for s in reversed(self.steps) if s.nbytes < 0), None)

    def spell_reason(self) -> str:
        """Return the reason in one sentence."""
        label = self.chosen.label
        if self.fixed:
            return f"{label} is the only way to store it: options or runtime leave no other"
        if self.up is None:
            return f"{label} is its best option: none of the larger ones predicts less loss"
        step = self.up.candidate.label
        if self.up.nbytes > self.left:
            why = f"{self.up.nbytes:,} bytes more are not left ({self.left:,} are)"
            if self.rank is not None and self.rank > 1:
                why += f", and {self.rank - 1} of {self.count} units would use them better"
            return f"{label}, not {step}: {why}"
        return (
            f"{label}, not {step}, although {self.left:,} bytes are left: edits, --refine or the "
            "allocator left it"
        )
