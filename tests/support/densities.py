"""A made-up ``density.json`` with round numbers, so that tests can say what must come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES = [10 ** (-4 + 4 * step / 25) for step in range(26)]
LAYERS = 4


def synthetic_density(name: str = "plain", factor: float = 1.0, points: int = 60) -> dict[str, Any]:
    """Sizes and areas times ``factor``, as if training had made the traces smaller.

    Args:
        name: of the model's directory.
        factor: 1 for the plain model.
        points: in the scatter plot.
    """
    falling = [factor * (1 - step / 25) for step in range(26)]
    spread = {
        "mean": falling,
        "q25": [0.8 * value for value in falling],
        "q75": [min(1.0, 1.2 * value) for value in falling],
    }
    baseline = {"residual_kept": [0.9] * 25 + [0.0], "residual_not_kept": [0.7] * 25 + [0.0]}
    agreement = [0.25, 0.5, 0.75, 1.0]
    entropies = [6 * point / points for point in range(points)]
    return {
        "version": 1,
        "model": {
            "path": f"models/{name}",
            "type": "llama",
            "parameters": 3_500_000,
            "layers": LAYERS,
            "heads": 4,
        },
        "data": {
            "path": "text",
            "documents": 3,
            "sha256": "0123456789abcdef" * 4,
            "split": "held out, share 0.05",
            "block_size": 64,
            "blocks": 32,
        },
        "tokens": 992,
        "min_context": 32,
        "attention": "recorded",
        "dtype": "float32",
        "easy": {"rule": "lowest quarter by entropy", "entropy_bound": 1.5},
        "hard": {"rule": "highest quarter by entropy", "entropy_bound": 4.5},
        "loss_nats": {"all": 3.0, "easy": 1.0, "hard": 5.0},
        "area": {"all": 0.4 * factor, "easy": 0.3 * factor, "hard": 0.5 * factor},
        "size_at_tv_0.2": {"all": 0.02 * factor, "easy": 0.008 * factor, "hard": 0.04 * factor},
        "entropy_spearman": {"area": 0.6, "size_at_tv_0.2": 0.7},
        "curve": {
            "sizes": SIZES,
            "all": spread,
            "easy": spread,
            "hard": spread,
            "baselines": {"random_connected": baseline, "inverse": baseline},
            "baseline_tokens": 248,
        },
        "topology": {
            "sizes": SIZES,
            "kinds": ["attention", "attention_residual", "mlp", "mlp_residual"],
            "shares": [[[1 / 16] * 4] * 4] * 26,
        },
        "nucleus_recovery": None,
        "early_exit": {
            "layers": list(range(1, LAYERS + 1)),
            "agreement": {"all": agreement, "easy": [0.4, 0.8, 0.9, 1.0], "hard": agreement},
        },
        "scatter": {
            "entropy": entropies,
            "size_at_tv_0.2": [factor * 1e-3 * (1 + entropy) for entropy in entropies],
        },
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "command": "softtrace evaluate",
        "versions": {"torch": "2.13.0"},
        "hardware": "CPU",
    }


PIECES = ["</script>", "<b>", "&amp;", "\u2028", " 'x'", '"', "\n", " caf\u00e9", "${1}", "a"]


def synthetic_samples(texts: int = 2, tokens: int = 5) -> dict[str, Any]:
    """Made-up text of tokens that HTML or JavaScript could trip over.

    Args:
        texts: how many passages, of blocks 0, 2, 4, ...
        tokens: explained ones in each.
    """

    def likely(first: int) -> list[list[float]]:
        return [[(first + rank) % len(PIECES), 0.5 / (1 + rank)] for rank in range(5)]

    def token(number: int) -> dict[str, Any]:
        traces = [
            {"size": 1.01 * size, "tv": 1 - step / 9, "top": likely(number + 1 + step)}
            for step, size in enumerate(SIZES[::3])
        ]
        return {
            "token": number % len(PIECES),
            "entropy": 1.0 + number,
            "loss": 0.5 + number,
            "area": 0.25,
            "size": 0.0015 * (1 + number),
            "exit_layer": 1 + number % LAYERS,
            "edges": 12345,
            "full": likely(number),
            "traces": traces,
        }

    return {
        "sizes": SIZES[::3],
        "vocabulary": PIECES,
        "texts": [
            {"block": 2 * text, "context": [9, 0], "tokens": [token(at) for at in range(tokens)]}
            for text in range(texts)
        ],
    }


def write_run(folder: Path, density: dict[str, Any]) -> Path:
    """Write ``density`` as ``folder/density.json`` and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "density.json"
    path.write_text(json.dumps(density), encoding="utf-8")
    return path
