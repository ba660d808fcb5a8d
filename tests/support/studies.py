"""A made-up ``study.json`` with round numbers, so that tests can say what must come out."""

from __future__ import annotations

from typing import Any

import numpy as np

from softtrace.density.distortion import NUCLEUS_SHARES
from softtrace.evaluation.study.answers import ANSWERS
from softtrace.evaluation.study.readings import STUDY_SIZES
from softtrace.graph.edges import EDGE_KINDS

AXES: dict[str, list[Any]] = {
    "sizes": list(STUDY_SIZES),
    "depth_quartiles": [1, 2, 3, 4],
    "kinds": list(EDGE_KINDS),
    "nucleus_p": list(NUCLEUS_SHARES),
    "lengths": [16, 32],
    "positions": [63, 95, 126],
    "contexts": [16, 32, "all before"],
}


def synthetic_study(models: int = 1) -> dict[str, Any]:
    """Every number is 0.25, or 0.125 less for the second model; intervals are ± 0.05."""
    return {
        "version": 1,
        "models": [
            {"label": name, "path": f"models/{name}"} for name in ("plain", "penalty")[:models]
        ],
        "data": {"split": "held out, share 0.05", "block_size": 128, "blocks": 20},
        "unigrams": {
            "tokens": 1234567,
            "seen": 4000,
            "smoothing": "1 added to every count",
            "entropy_nats": 6.5,
            "uniform_kl_nats": 3.25,
        },
        "settings": {
            "min_context": 64,
            "total_variation": 0.2,
            "targets": 3,
            "resamples": 2000,
            "seed": 0,
            "confidence": 0.95,
            "attention": "recorded",
        },
        "tokens": 1260,
        "axes": AXES,
        "results": {
            answer.key: {
                "name": answer.name,
                "unit": answer.unit,
                "axes": list(answer.axes),
                "models": [_ends(answer.axes, value) for value in (0.25, 0.125)[:models]],
                "difference": _ends(answer.axes, -0.125) if models == 2 else None,
            }
            for answer in ANSWERS
        },
        "pairs": [],
    }


def _ends(axes: tuple[str, ...], value: float) -> dict[str, Any]:
    shape = tuple(len(AXES[axis]) for axis in axes)
    return {
        end: np.full(shape, value + by).tolist()
        for end, by in (("value", 0.0), ("low", -0.05), ("high", 0.05))
    }
