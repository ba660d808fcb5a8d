"""The main job on real text: fine-tune twice, plain and with the penalty, and see the density fall.

    make quickstart

Both runs start from the shipped model's weights and see the same text (the source of the installed
matplotlib, which the model has never seen) in the same order. Both are then measured on files that
were held out. Everything goes to ``runs/quickstart``; each step is one ``softtrace`` command that
is printed before it runs.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

from softtrace import DensityOptions

ROOT = Path(__file__).resolve().parent.parent
MODEL = "recipes/models/pystdlib-4m"
STRENGTHS = {"plain": 0.0, "penalty": DensityOptions().strength}
KEPT = ("compare.json", "compare.txt", "tv_over_size.png", "early_exit_agreement.png")


def softtrace(*words: object) -> None:
    """Print a ``softtrace`` command and run it; stop everything where it fails."""
    command = [str(word) for word in words]
    print(f"\n$ softtrace {shlex.join(command)}\n", flush=True)
    subprocess.run([sys.executable, "-m", "softtrace.cli", *command], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--steps", type=int, default=120, help="optimiser steps of each fit")
    parser.add_argument("--blocks", type=int, default=48, help="held-out blocks to measure")
    parser.add_argument("--keep", type=Path, help="also copy the README's figures to this folder")
    args = parser.parse_args()
    began = time.perf_counter()
    data = Path(matplotlib.__file__).parent
    if data.is_relative_to(ROOT):
        data = data.relative_to(ROOT)
    # Results of an earlier quickstart; only what this script itself writes is removed.
    for name in (*STRENGTHS, "compare"):
        shutil.rmtree(ROOT / args.out / name, ignore_errors=True)
    for name, strength in STRENGTHS.items():
        softtrace(
            *(
                "fit",
                "--model.path",
                MODEL,
                "--data.path",
                data,
                "--out",
                args.out / name / "model",
            ),
            *("--model.learning_rate", 1e-3, "--trainer.max_steps", args.steps),
            *("--data.suffixes", "[.py]", "--data.batch_size", 16, "--data.held_out_share", 0.1),
            *("--trainer.limit_val_batches", 0, "--penalty.strength", strength),
            *("--card_blocks", 0),  # evaluate measures more of them
        )
    for name in STRENGTHS:
        softtrace(
            *("evaluate", "--model", args.out / name / "model", "--data", data),
            *(
                "--suffixes",
                "[.py]",
                "--held_out_share",
                0.1,
                "--blocks",
                args.blocks,
                "--extra_blocks",
                8,
            ),
            *("--out", args.out / name, "--overwrite", "true"),
        )
    runs = (args.out / name for name in STRENGTHS)
    softtrace("compare", *runs, "--out", args.out / "compare")
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copy(ROOT / args.out / "compare" / name, args.keep / name)
    minutes = (time.perf_counter() - began) / 60
    print(f"\nDone in {minutes:.1f} minutes. Open {args.out}/compare/report.html")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
