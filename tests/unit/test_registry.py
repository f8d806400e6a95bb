"""The registry: names without imports, and the nearest name in an error."""

from __future__ import annotations

import sys

import pytest

from cptq.errors import UnknownNameError, UsageError
from cptq.registry import Registry, find_closest

ENTRIES = {"zeta": "colorsys:rgb_to_hsv", "alpha": "no_such_module_anywhere:thing"}


@pytest.fixture
def registry() -> Registry[object]:
    return Registry("metric", ENTRIES)


def test_names_keep_their_order_and_import_nothing(registry: Registry[object]) -> None:
    sys.modules.pop("colorsys", None)
    assert registry.list_names() == list(registry) == ["zeta", "alpha"]
    assert "zeta" in registry
    assert "beta" not in registry
    assert registry.check("zeta") == "zeta"
    assert "colorsys" not in sys.modules


def test_get_imports_the_entry(registry: Registry[object]) -> None:
    import colorsys

    assert registry.get("zeta") is colorsys.rgb_to_hsv


def test_an_unknown_name_names_the_nearest(registry: Registry[object]) -> None:
    with pytest.raises(UnknownNameError) as raised:
        registry.get("Zetta")
    assert isinstance(raised.value, UsageError)
    assert str(raised.value) == (
        "unknown metric 'Zetta'; allowed: zeta, alpha; did you mean 'zeta'?"
    )


def test_a_far_name_gets_no_suggestion(registry: Registry[object]) -> None:
    with pytest.raises(UnknownNameError) as raised:
        registry.check("qqqqqqqq")
    assert raised.value.hint is None


def test_an_entry_that_cannot_be_imported_is_no_user_error(registry: Registry[object]) -> None:
    with pytest.raises(ModuleNotFoundError):
        registry.get("alpha")


def test_closest() -> None:
    assert find_closest("knapsak", ["greedy", "knapsack"]) == "knapsack"
    assert find_closest("x", ["greedy", "knapsack"]) is None
    assert find_closest("anything", []) is None
