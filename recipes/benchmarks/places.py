"""Where benchmarks find what they start from, and where they leave what they found."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "recipes" / "benchmarks" / "results"
MODEL = ROOT / "recipes" / "models" / "pystdlib-4m"
QUICKSTART = ROOT / "runs" / "quickstart"  # after `make quickstart`
