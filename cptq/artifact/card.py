"""README.md of an artifact: the model card."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cptq.artifact.companions import MODULES
from cptq.artifact.content import Content
from cptq.artifact.formats.interface import Format
from cptq.types import CalibrationRecord, CompressedLayer, Plan

CARD = "README.md"
_LICENCE_LINES = re.compile(r"^(?:license|license_name|license_link):.*$", re.MULTILINE)


def model_card(
    model: Content,
    form: Format,
    plan: Plan,
    calibration: CalibrationRecord,
    weight_bytes: int,
) -> str:
    """Base model, how to load it, what was done to it; Markdown with a Hub's front matter."""
    layers = list(model.compressed.values())
    return "\n".join(
        [
            *_front_matter(model, form),
            f"# {model.base_name}, compressed by cptq",
            "",
            f"Made from `{model.base_name}` ({model.parameters:,} weights, sha256 "
            f"`{model.fingerprint[:16]}`).",
            "",
            *_how_to_load(model, form),
            "## What was done",
            "",
            *_what_was_done(layers, plan, calibration, weight_bytes),
            "",
            "Everything else (the plan, versions, errors per layer, a sha256 per tensor) is in "
            "`cptq.json`. The licence is that of the base model.",
            "",
        ]
    )


def _front_matter(model: Content, form: Format) -> list[str]:
    lines = ["---", "library_name: transformers"]
    if not Path(model.source).expanduser().is_dir():
        lines += [f"base_model: {model.source}", "base_model_relation: quantized"]
    lines += _licence_lines(model.path / CARD)
    lines += ["tags:", "- cptq", *(f"- {tag}" for tag in _tags(model, form)), "---", ""]
    return lines


def _licence_lines(card: Path) -> list[str]:
    """The licence as the base model's own card states it."""
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    parts = text.split("---", 2)
    return _LICENCE_LINES.findall(parts[1]) if text.startswith("---") and len(parts) == 3 else []


def _tags(model: Content, form: Format) -> Sequence[str]:
    return form.tags if model.compressed else ()


def _how_to_load(model: Content, form: Format) -> list[str]:
    lines = ["## How to load it", "", *form.how_to_load(model)]
    if (model.path / MODULES).exists():
        lines += ['With sentence-transformers: `SentenceTransformer("PATH")`.', ""]
    return lines


def _what_was_done(
    layers: Sequence[CompressedLayer],
    plan: Plan,
    calibration: CalibrationRecord,
    weight_bytes: int,
) -> list[str]:
    bits = Counter(layer.result.candidate.bits for layer in layers)
    spread = ", ".join(f"{bits[b]} at {b} bits" for b in sorted(bits)) or "none"
    scores = f" on the scores of `{plan.metric}`" if plan.metric else ""
    return [
        f"- Target `{plan.budget.asked}`: {plan.budget.limit_bytes:,} bytes; the weights take "
        f"{weight_bytes:,}.",
        f"- Linears compressed: {spread}; the rest is stored as in the base model.",
        f"- Bits were chosen by `{plan.allocator}`{scores}.",
        f"- Calibration: {calibration.source}, {calibration.samples} samples, "
        f"{calibration.tokens:,} tokens, seed {calibration.seed}.",
    ]
