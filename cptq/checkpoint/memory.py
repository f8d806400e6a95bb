"""How much memory a run may take, and what it is shared out to.

What is left beside the libraries themselves (`BASE`) goes to three uses:

    a third      matrices of the model (`cptq.checkpoint.resident`)
    a quarter    activations that wait (`cptq.checkpoint.spill`); what exceeds it goes to disk
    the rest     work under way: the sums and factors of one layer, logits, gradients; where these
                 sums and factors need more, activations get less

A model that fits into the first third is in memory as a whole. Of another one a single block is, as
passes take block after block and no other would still be there when it is needed again; what that
leaves of the third is for activations. Numbers do not depend on any of it.

Limits: the rest is not watched. It must hold the second moment of the widest layer and its factors
(`count_least`), else the run is refused before it begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from cptq.checkpoint.spill import Spill
from cptq.errors import UsageError
from cptq.types import LayerSpec

#: bytes of Python, torch and transformers before a model is loaded
BASE = 600_000_000
#: share of the memory that is free of which a run makes use where nothing is asked for
FREE_SHARE = 0.8
#: matrices of the size of the largest second moment, float32: that moment, the cross moment, that
#: of held-out text, and a factor, or one more sum of a part
MOMENTS = 4
#: share of what is free on a GPU for the matrices of a model: in a compression, and where the model
#: is only run
GPU_SHARE, GPU_SHARE_TO_RUN = 0.6, 0.9
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A limit in bytes, and where activations go that do not fit; `asked`: by --max-memory.

    `of_gpu`: share of what is free on a GPU that the matrices of a model may take there.
    """

    total: int
    asked: bool = False
    folder: Path | None = None
    of_gpu: float = GPU_SHARE

    @property
    def weights(self) -> int:
        """Bytes that the matrices of a model may take."""
        return max(0, self.total - BASE) // 3

    def count_loadable_blocks(self, layers: tuple[LayerSpec, ...]) -> int | None:
        """Return how many blocks another process can load beside this one; None: all of them.

        It holds them packed and multiplied out, and the vocabulary. One block is always tried.
        """
        blocks = max((spec.block for spec in layers if spec.block is not None), default=-1) + 1
        inner = sum(spec.numel for spec in layers if spec.block is not None)
        outer = sum(4 * spec.numel for spec in layers if spec.block is None and not spec.tied_to)
        room = self.total - 2 * BASE - self.weights - outer
        fits = max(1, int(room * blocks / max(1, 6 * inner)))
        return None if fits >= blocks else fits

    def make_spill(self, held: int | None, layers: tuple[LayerSpec, ...]) -> Spill:
        """Return what keeps the activations of a run; `held`: bytes of the matrices, if limited.

        Of a model with wide layers the work on one of them may take more than the rest; then less
        is left for activations.
        """
        room = max(0, self.total - BASE)
        if held is None:
            return Spill(room // 4, self.folder)
        asked = room // 4 + self.weights - held
        return Spill(max(0, min(asked, room - held - _count_work(layers))), self.folder)

    def check(self, layers: tuple[LayerSpec, ...]) -> None:
        """Refuse a limit that was asked for and does not hold a single layer.

        Raises:
            UsageError: it is too small; says what is needed.
        """
        need = count_least(layers)
        if self.asked and self.total < need:
            raise UsageError(
                f"--max-memory {self.total:,} bytes does not hold one block of this model",
                allowed=f"at least {-(-need // 10**6):,}MB",
            )


def choose_memory(asked: int | None, folder: Path | None = None, processes: int = 1) -> Memory:
    """Return the limit that was asked for, or one that the machine can keep now.

    `processes`: of this run on the machine, each of which takes as much.
    """
    if asked is not None:
        return Memory(total=asked, asked=True, folder=folder)
    return Memory(total=int(FREE_SHARE * measure_free_bytes() / processes), folder=folder)


def measure_free_bytes() -> int:
    """Return the memory that is free: the machine's, or that of a container if it is less."""
    free = int(psutil.virtual_memory().available)
    try:
        most = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such limit ("max"), or another system
        return free
    return min(free, max(0, most - used))


def count_least(layers: tuple[LayerSpec, ...]) -> int:
    """Return about the least bytes that a run takes: one block, and the moments of one layer."""
    blocks: dict[int, int] = {}
    for spec in layers:
        if spec.block is not None:
            blocks[spec.block] = blocks.get(spec.block, 0) + 4 * spec.numel
    outer = max((4 * spec.numel for spec in layers if spec.block is None), default=0)
    return BASE + max(max(blocks.values(), default=0) + _count_work(layers), outer)


def _count_work(layers: tuple[LayerSpec, ...]) -> int:
    """Return about the bytes of compressing the widest and the largest layer of the blocks."""
    widest = max((spec.shape[1] for spec in layers if spec.block is not None), default=0)
    largest = max((spec.numel for spec in layers if spec.block is not None), default=0)
    return MOMENTS * 4 * widest**2 + 3 * 4 * largest
