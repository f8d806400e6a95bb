"""The bytes of the weight file by part, and which option makes the largest part smaller.

A target such as 4bit is a size, and codes are only a part of a file: scales, what stays in 16 bits
and embeddings are the rest. Every part is a row: bytes, share, average bits per weight. What is
known of no layer (norms, biases, the header) is what is left of the file.

Limits: codes count as bits * weights / 8; the padding of a row, zero points and the masks of sparse
layers count with the scales. A GGUF file that is exported later has its own blocks; there codes and
scales are together in a block, and the split is that of its nominal width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cptq.report.formatting import Table, format_bytes, format_count, format_percent
from cptq.report.summary import Summary, map_layer_choices
from cptq.report.svg import Figure, escape_text, tag, wrap_svg
from cptq.types import DTYPE_BYTES, LayerSpec

ATTENTION, MLP, OTHER = "attention, codes", "MLP, codes", "other matrices, codes"
VOCABULARY, VOCABULARY_16 = "embeddings and head, codes", "embeddings and head, not packed"
SCALES, DENSE, REST = (
    "scales, zero points, masks",
    "matrices left in 16 bits or wider",
    "norms, biases, header",
)
PARTS = (ATTENTION, MLP, OTHER, VOCABULARY, VOCABULARY_16, SCALES, DENSE, REST)
_ATTENTION = ("q", "k", "v", "o", "qkv", "query", "key", "value", "attn", "attention")
_MLP = ("gate", "up", "down", "gate_up", "fc1", "fc2", "c_fc", "wi", "wo", "experts")
WIDTH, HEIGHT, LEFT, LINE = 960.0, 26.0, 250.0, 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the weight file; `weights` 0 where they are no weights of their own."""

    name: str
    nbytes: int
    weights: int
    share: float


def measure_parts(summary: Summary) -> list[Part]:
    """Return the parts that have bytes, in the order of `PARTS`; none without a written file."""
    if summary.size is None or not summary.results:
        return []
    found = dict.fromkeys(PARTS, 0)
    weights = dict.fromkeys(PARTS, 0)
    sizes = {row.name: row for row in summary.results}
    choices = map_layer_choices(summary)
    for layer in summary.layers:
        if layer.tied_to is not None:
            continue
        result, choice = sizes.get(layer.name), choices.get(layer.name)
        name = _name_part(layer, dense=result is None or result.candidate.dense)
        weights[name] += layer.numel
        if result is None or choice is None or choice.dense:
            found[name] += layer.numel * DTYPE_BYTES[layer.dtype]
            continue
        codes = min(result.nbytes, _count_code_bytes(layer.numel, choice.bits, choice.sparsity))
        found[name] += codes
        found[SCALES] += result.nbytes - codes
    found[REST] = max(0, summary.size.file_bytes - sum(found.values()))
    total = sum(found.values()) or 1
    return [
        Part(name=name, nbytes=nbytes, weights=weights[name], share=nbytes / total)
        for name, nbytes in found.items()
        if nbytes
    ]


def _count_code_bytes(weights: int, bits: int, sparsity: float) -> int:
    """Return the bytes of the codes of the weights that are not pruned."""
    return round(weights * (1 - sparsity)) * bits // 8


def _name_part(layer: LayerSpec, *, dense: bool) -> str:
    if layer.kind in ("embedding", "head"):
        return VOCABULARY_16 if dense else VOCABULARY
    if dense:
        return DENSE
    if layer.role in _ATTENTION:
        return ATTENTION
    return MLP if layer.role in _MLP or layer.expert else OTHER


def advise(summary: Summary) -> str:
    """Return what makes the file as large as it is, and the option that helps; empty: nothing."""
    parts = {part.name: part for part in measure_parts(summary)}
    if not parts or summary.size is None:
        return ""
    outer = [parts[name] for name in (VOCABULARY, VOCABULARY_16) if name in parts]
    share = sum(part.share for part in outer)
    weights = sum(part.weights for part in outer)
    words = []
    if weights:
        words.append(
            f"Embeddings and output head are {format_percent(weights / summary.model.parameters)} "
            f"of the weights and {format_percent(share)} of the file."
        )
    words += _explain_target(summary)
    return " ".join([*words, *_list_options(summary, parts, share)])


def _explain_target(summary: Summary) -> list[str]:
    """Return why the layers of a target in bits are wider than its name says."""
    plan, size = summary.plan, summary.size
    asked = re.fullmatch(r"([0-9.]+)bits?", plan.budget.asked.strip()) if plan else None
    if asked is None or size is None or size.effective_bits < float(asked[1]) + 1:
        return []
    return [
        f"The target {asked[0]} is the size of a file whose layers are all {asked[1]} bits wide, "
        f"with embeddings as the runtime stores them; the plan spent those bytes on "
        f"{size.effective_bits:.2f} bits per compressible weight."
    ]


def _list_options(summary: Summary, parts: dict[str, Part], vocabulary: float) -> list[str]:
    found = []
    runtime = str(summary.settings.get("runtime", ""))
    if vocabulary >= 0.1 and runtime in ("cptq", "llamacpp"):
        found.append("A smaller --embedding-bits makes that part smaller.")
    elif vocabulary >= 0.1:
        found.append(
            "--runtime cptq (3 to 8 bits) or llamacpp (3, 4, 5, 6 or 8) packs them in fewer "
            f"bits; the runtime {runtime or 'in use'} stores them in 8-bit floats or 16 bits."
        )
    if SCALES in parts and parts[SCALES].share >= 0.1:
        found.append("A larger --group-size makes fewer scales.")
    if DENSE in parts and parts[DENSE].share >= 0.1:
        chosen = summary.plan and any(c.dense for c in summary.plan.choices.values())
        found.append(
            "The target leaves room for layers of 16 bits; a smaller --target makes them narrower."
            if chosen
            else "What stays in 16 bits is listed with its reason under All layers."
        )
    return found


def build_parts_table(summary: Summary) -> Table | None:
    """Build the table of bytes by part; None without a written file."""
    rows = [
        (
            part.name,
            f"{part.nbytes:,}",
            format_percent(part.share),
            format_count(part.weights) if part.weights else "",
            f"{8 * part.nbytes / part.weights:.2f}" if part.weights else "",
        )
        for part in measure_parts(summary)
    ]
    if not rows:
        return None
    columns = ("part", "bytes", "of the file", "weights", "bits per weight")
    note = advise(summary)
    return Table(
        title="Bytes by part",
        columns=columns,
        rows=tuple(rows),
        right=columns[1:],
        note=note,
        leading=True,
    )


def draw_parts(summary: Summary, ident: str = "parts") -> Figure | None:
    """Draw a bar per part, with its share and bytes written beside it."""
    parts = measure_parts(summary)
    if not parts:
        return None
    most = max(part.share for part in parts)
    body = "".join(_draw_part(part, index, most) for index, part in enumerate(parts))
    title = "What the file is made of"
    words = "; ".join(f"{p.name}: {format_percent(p.share)}" for p in parts)
    size = (WIDTH, LINE * len(parts))
    return Figure(
        ident=ident,
        title=title,
        caption="Share of the bytes of the weight file; the table above says what helps",
        svg=wrap_svg(body, ident, title, words, size),
    )


def _draw_part(part: Part, index: int, most: float) -> str:
    y, room = index * LINE + 2, WIDTH - LEFT - 150
    wide = max(1.0, room * part.share / most)
    value = f"{format_percent(part.share)}, {format_bytes(part.nbytes)}"
    css = f"r{PARTS.index(part.name)}"
    return (
        tag(
            "text", escape_text(part.name), class_="label", x=LEFT - 10, y=y + 17, text_anchor="end"
        )
        + tag("rect", class_=f"bar {css}", x=LEFT, y=y, width=wide, height=HEIGHT - 2)
        + tag("text", escape_text(value), class_="label", x=LEFT + wide + 8, y=y + 17)
    )


def list_parts(summary: Summary) -> Sequence[dict[str, object]]:
    """Return the parts as plain data."""
    return [
        {"part": p.name, "bytes": p.nbytes, "weights": p.weights, "share": p.share}
        for p in measure_parts(summary)
    ]
