"""Every text family of transformers works, or is refused in a sentence: none raises, none is wrong.

Slow: half an hour for all. `scripts/check_families` does the same in pieces and writes the table.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import list_families
from tests.family_table import render_table
from tests.family_walk import Row, walk_family

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", list(list_families()))
def test_a_family_works_or_is_refused(family: str, tmp_path: Path) -> None:
    row = walk_family(family, tmp_path)
    assert row.verdict in ("works", "refused", "not built"), f"{row.step}: {row.text}"


def test_a_table_lists_every_verdict() -> None:
    rows = [Row("a", dense={"the head; kept dense": 2}), Row("b", verdict="refused", text="x | y")]
    text = render_table(rows)
    assert "2 families: 1 works, 1 refused.\nOf those that work 1 keep linears dense." in text
    assert "| a |  |  | 0 | 2: the head |" in text
    assert "x \\| y" in text
