#!/usr/bin/env python3
"""Walk every text family that transformers can build (tests/families.py), and write a table.

Rows are kept in a JSON lines file; families that have one are walked again only if they are named
(--families, --again), so that a walk can go in pieces (--seconds, --shard). With every family
walked, the table is written to docs/families.md.
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
from tests.family_walk import read_rows, walk

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "families.md"


def main() -> int:
    """Walk, and write the table; return 1 where a family is wrong or an internal error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="the JSON lines file")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin none after so many")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th family from I on")
    parser.add_argument("--families", nargs="+", default=[], metavar="NAME")
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="VERDICT", help="walk these again"
    )
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for row in walk(choose_families(asked), asked.rows, until=asked.seconds):
        line = f"{row.family:24} {row.verdict:9} {row.step:16} {row.seconds:5} {row.text}"
        print(line, flush=True)
    rows = read_rows(asked.rows)
    if set(rows) >= set(list_families()):
        known = [rows[family] for family in list_families()]
        asked.out.write_text(render_table(known), encoding="utf-8")
    return int(any(row.verdict in ("wrong", "error") for row in rows.values()))


def choose_families(asked: argparse.Namespace) -> list[str]:
    """Return those that are named, or have no row yet, or one of a verdict to be walked again."""
    known = read_rows(asked.rows)
    index, number = map(int, asked.shard.split("/"))
    left = [f for f in list_families() if f not in known or known[f].verdict in asked.again]
    return asked.families or left[index::number]


if __name__ == "__main__":
    raise SystemExit(main())
