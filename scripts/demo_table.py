#!/usr/bin/env python3
"""What the demo prints: before and after, from the JSON of `cptq eval --baseline` and `cptq bench`.

Sizes are read from the files themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cptq.data import load_text
from cptq.report.formatting import format_number

Row = tuple[str, str, str, str]

#: figures of `cptq bench` that the table has, and what it calls them
SPEED = {
    "prefill": "reading a prompt",
    "decode": "writing",
    "first_token": "first token",
    "used_memory": "memory in use",
}


def choose_task() -> str:
    """`wikitext` where its test part is to be had, else `pydoc`, with the reason on stderr."""
    text = load_text("auto", "evaluation")
    for note in text.notes:
        print(f"note: {note}", file=sys.stderr)
    return text.source


def weight_bytes(directory: Path) -> int:
    """Bytes of the weight files of a checkpoint."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def row(label: str, before: float, after: float) -> Row:
    """One line of the table, with the ratio of after to before."""
    ratio = f"{after / before:.3f}x" if before else "-"
    return label, format_number(before), format_number(after), ratio


def rows(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The results that both models have, in the order of the compressed one's."""
    known = {(item["task"], item["metric"]): item for item in before}
    found = []
    for item in after:
        dense = known.get((item["task"], item["metric"]))
        if dense is not None:
            label = f"{item['task']} {item['metric']} ({item['unit']})"
            found.append(row(label, float(dense["value"]), float(item["value"])))
    return found


def speed_rows(models: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The figures of speed and memory that both models have."""
    before, after = (
        {(item["name"], item["batch_size"]): item for item in model["figures"]}
        for model in models[:2]
    )
    found = []
    for key, item in before.items():
        if key in after and key[0] in SPEED:
            label = f"{SPEED[key[0]]} ({item['unit']})"
            found.append(row(label, float(item["median"]), float(after[key]["median"])))
    return found


def show(table: Sequence[Row]) -> None:
    """Print columns as wide as they need to be, numbers to the right."""
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    for line in table:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="what `cptq eval -o` wrote")
    parser.add_argument("--speed", type=Path, help="what `cptq bench -o` wrote, before first")
    parser.add_argument("--before", type=Path, help="directory of the dense model")
    parser.add_argument("--after", type=Path, help="directory of the compressed model")
    parser.add_argument("--choose-task", action="store_true", help="print the task to measure by")
    options = parser.parse_args()
    if options.choose_task:
        print(choose_task())
        return
    if not (options.results and options.before and options.after):
        parser.error("RESULTS, --before and --after belong together")
    data = json.loads(options.results.read_text(encoding="utf-8"))
    sizes = weight_bytes(options.before), weight_bytes(options.after)
    table = [("", "before", "after", "after/before"), row("weight files (bytes)", *sizes)]
    print()
    table += rows(data["baseline"], data["evaluation"])
    if options.speed:
        table += speed_rows(json.loads(options.speed.read_text(encoding="utf-8"))["models"])
    show(table)


if __name__ == "__main__":
    main()
