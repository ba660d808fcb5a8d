"""Where benchmarks find what they start from, and where they leave what they found."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "recipes" / "benchmarks" / "results"
MODEL = ROOT / "recipes" / "models" / "pystdlib-4m"
TRAINED = "trained.json"  # beside a saved model: how it was trained, and its held-out loss
QUICKSTART = ROOT / "runs" / "quickstart"  # after `make quickstart`
