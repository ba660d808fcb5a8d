"""Profiles of a training step: what is summed up of a trace."""

from __future__ import annotations

from typing import Any

from recipes.benchmarks.speed.step_profile import summary


def event(cat: str, name: str, ts: float, dur: float, launch: int | None = None) -> dict[str, Any]:
    args = {} if launch is None else {"correlation": launch}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def test_work_is_counted_once_and_for_the_innermost_part_that_gave_it() -> None:
    found = summary(
        [
            event("user_annotation", "part: term", 0, 4000),
            event("user_annotation", "part: exits", 1000, 1000),
            event("user_annotation", "somebody else's", 0, 9000),
            event("cuda_runtime", "launch", 500, 1, 1),
            event("cuda_runtime", "launch", 1500, 1, 2),
            event("cuda_runtime", "launch", 2500, 1, 3),
            event("kernel", "a", 2000, 2000, 1),
            event("kernel", "b", 3000, 3000, 2),  # beside the first for a while
            event("gpu_memcpy", "c", 8000, 1000, 3),
            event("kernel", "of a graph that was compiled", 10_000, 2000, 4),
            {"ph": "i", "cat": "kernel", "name": "no span", "ts": 0},
        ],
        2,
    )
    assert found["GPU works"] == 3.5
    assert found["GPU, by part"] == {
        "term": 1.5, "exits": 1.5, "the forward and what was compiled": 1.0
    }  # fmt: skip
    assert found["processor, by part"] == {"term": 2.0, "exits": 0.5}
    assert found["kernels"] == 2
