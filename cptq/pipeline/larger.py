"""Refuse, before any work, a result that may be larger than the model that it is made from.

Codes of few bits with a 16-bit scale for every weight or two, or 8-bit codes with scales beside a
checkpoint of 8-bit floats, take more bytes than what they replace.
"""

from __future__ import annotations

from cptq.allocation.cost import CostModel
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.stored import find_weights
from cptq.config import CompressSettings
from cptq.errors import BudgetError
from cptq.types import Emit, Notice


def refuse_larger(
    settings: CompressSettings,
    model: LoadedModel,
    cost: CostModel,
    asked: str,
    need: int,
    emit: Emit,
) -> None:
    """Refuse a result that may be larger than the model is; warn where --allow-larger is given.

    Raises:
        BudgetError: names both sizes.
    """
    stored = sum(file.stat().st_size for file in find_weights(model.path, settings.model))
    if need <= max(stored, cost.dense_bytes):
        return
    what = f"--plan {settings.plan}" if settings.plan else f"the target {asked}"
    groups = f"in groups of {settings.group_size}" if settings.group_size else "per channel"
    problem = (
        f"{what} allows a file of {need:,} bytes, and {model.source} has {stored:,}: the result "
        f"may be larger than the model (with 16-bit scales {groups})"
    )
    if not settings.allow_larger:
        raise BudgetError(
            problem,
            allowed="a lower --target, a larger --group-size",
            hint="add --allow-larger to do it all the same",
        )
    emit(Notice(kind="warning", subject="--allow-larger", message=problem))
