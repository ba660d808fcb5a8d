"""Fits that are cut and resumed, against fits that are not: parts of ``exactness.py``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.support.cut_fits import FAULTS, PARTS, cut_and_resumed
from tests.support.jobs import STEPS, Jobs, saved

SAID = {"raise": "an error", "kill": "SIGKILL", "kill in save": "SIGKILL during a save"}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference."""
    return float((one - other).abs().max())


def is_there(way: str) -> bool:
    """Whether an engine is installed; rows of one that is not stay as the file has them."""
    return not way.startswith("ZeRO") or importlib.util.find_spec("deepspeed") is not None


def kills(args: argparse.Namespace) -> dict[str, Any]:
    """``softtrace fit`` killed at random moments until it has been killed often enough."""
    draws, codes = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(Path(folder))
        if jobs.run(Path(folder) / "straight").code:
            raise SystemExit("the straight run failed")
        straight = saved(Path(folder) / "straight")
        worst, runs, resumed, number = 0.0, 0, 0, 0
        bar = tqdm(total=args.kills, desc="kills")
        while len(codes) < args.kills:
            out, number = Path(folder) / f"cut{number}", number + 1
            for _ in range(5):
                again = ("--resume", "true") if out.exists() else ()
                process = jobs.start(out, "none", 0, 0, *again)
                began, last = time.monotonic(), out / "checkpoints" / "last.ckpt"
                while process.poll() is None and not last.exists():
                    time.sleep(0.005)
                time.sleep(draws.uniform(0, 1.0 if not again else time.monotonic() - began + 6))
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                if process.returncode == -signal.SIGKILL:
                    codes.append(process.returncode)
                    bar.update()
                else:
                    break
            end, runs = jobs.run(out, "none", 0, 0, "--resume", "true"), runs + 1
            if end.code:
                print(f"did not resume: {end.said[-2000:]}")
                continue
            final, resumed = saved(out), resumed + 1
            worst = max(worst, *(difference(final[name], straight[name]) for name in final))
    return {"kills": len(codes), "runs": runs, "resumed": resumed, "largest": worst}


def cuts(args: argparse.Namespace) -> dict[str, Any]:
    """``softtrace fit`` in two processes that share one model, cut in each way and resumed."""
    found = dict(args.known.get("cuts", {}))
    for way in tqdm(PARTS, desc="cuts"):
        if way in (args.fits or [way]) and is_there(way):
            found[way] = cut(way)
    return found


def cut(way: str) -> dict[str, Any]:
    """One engine: largest differences of what was saved, from a straight run and from the start."""
    with tempfile.TemporaryDirectory() as folder:
        jobs, parts = Jobs(Path(folder)), (*PARTS[way], "--trainer.devices", 2)
        straight = jobs.run(Path(folder) / "straight", "none", 0, 0, *parts)
        if straight.code:
            raise SystemExit(f"{way}: the straight run failed:\n{straight.said[-3000:]}")
        cut_and_resumed(jobs, Path(folder) / "cut", parts)
        before, wanted, final = map(
            saved, (jobs.model, Path(folder) / "straight", Path(folder) / "cut")
        )
    if not before.keys() == wanted.keys() == final.keys():
        raise SystemExit(f"{way}: not the same weights were saved")
    return {
        "steps": STEPS,
        "cuts": [f"{SAID[fault]} in process {rank}" for fault, _, rank, _ in FAULTS],
        "largest": max(difference(final[name], wanted[name]) for name in wanted),
        "trained": max(difference(wanted[name], before[name]) for name in wanted),
    }
