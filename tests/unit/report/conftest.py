"""What the tests of reports share."""

from __future__ import annotations

import pytest

from cptq.report import Summary
from tests.unit.report import synthetic


@pytest.fixture(scope="session")
def summary() -> Summary:
    """A compress run of five blocks."""
    return synthetic.make_summary(blocks=5)
