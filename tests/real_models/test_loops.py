"""A step of a plain loop on real models: the term is there, and the weights stay finite."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.real import GEMMA, LONG
from tests.support.real_steps import Start, loop

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("dtype", "length"),  # SmolLM's are compared with those of every integration
    [("float32", LONG), ("bfloat16", 8)],  # a CPU may multiply bfloat16 at an eighth of the speed
)
def test_a_plain_loop_takes_a_step(dtype: str, length: int, tmp_path: Path) -> None:
    start = Start(GEMMA, dtype, length)
    after = start.stepped(loop, tmp_path)
    assert after.isfinite().all()
    changed = (after != start.before).float().mean()
    assert changed > 1e-3  # tokens that do not occur stay, and bfloat16
