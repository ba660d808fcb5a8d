"""The order of the tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow ones first: two run at a time, and nothing should be left to wait for in the end."""
    items.sort(key=lambda item: "slow" not in item.keywords)
