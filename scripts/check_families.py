#!/usr/bin/env python3
"""Walk every text family that transformers can build (tests/families.py), and write a table.

Rows are kept in a JSON lines file; families that have one are not walked again, so that a walk can
go in pieces (--seconds). With every family walked, the table is written to docs/families.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from tests.families import list_families
from tests.family_table import render_table
from tests.family_walk import DEPTHS, read_rows, walk

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "families.md"


def main() -> int:
    """Walk, and write the table; return 1 where a family is wrong or an internal error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="the JSON lines file")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin none after so many")
    parser.add_argument("--metrics", action="store_true", help="cca, pruning and taylor as well")
    parser.add_argument("--depth", choices=DEPTHS, default="all", help="how far to go")
    parser.add_argument("--families", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    families = asked.families or list(list_families())
    for row in walk(
        families, asked.rows, metrics=asked.metrics, depth=asked.depth, until=asked.seconds
    ):
        line = f"{row.family:24} {row.verdict:9} {row.step:16} {row.seconds:5} {row.text}"
        print(line, flush=True)
    rows = read_rows(asked.rows)
    if {row.family for row in rows} >= set(list_families()):
        asked.out.write_text(render_table(rows), encoding="utf-8")
    return int(any(row.verdict in ("wrong", "error") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
