"""Areas by hand."""

from __future__ import annotations

import pytest

from cptq.sensitivity.pruning import integrate_curve


def test_area_is_the_trapezoids() -> None:
    assert integrate_curve((0.3, 0.5), (2.0, 6.0)) == pytest.approx(0.3 * 1.0 + 0.2 * 4.0)
