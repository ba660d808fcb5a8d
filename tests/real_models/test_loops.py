"""A step of a plain loop on real models: the term is there, and the weights stay finite."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.real import GEMMA, LONG
from tests.support.real_steps import Start, loop

pytestmark = pytest.mark.real


def test_a_plain_loop_takes_a_step(tmp_path: Path) -> None:
    """SmolLM's are compared with those of every integration, in bfloat16 too."""
    start = Start(GEMMA, "float32", LONG)
    after = start.stepped(loop, tmp_path)
    assert after.isfinite().all()
    changed = (after != start.before).float().mean()
    assert changed > 1e-3  # tokens that do not occur stay
