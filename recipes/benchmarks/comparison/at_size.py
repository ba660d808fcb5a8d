"""A comparison at a size that fine-tuners use, from nothing: pretrain, fine-tune, decode.

    python -m recipes.benchmarks.comparison.at_size --out runs/at-size --mps    # on GPUs

Trains a model on the source of installed packages (``pretrain.py``), fine-tunes it on sympy's and
measures what came out (``peers.py``), the methods that shall decode first. Those decode on the CPU
as soon as they are there (``decoding.py``), beside the other fine-tunings, and on the GPUs last,
one a card and nothing else at work. Writes ``model/``, ``models/``, ``peers.json``, ``peers.png``,
``decoding.json`` and a log of every part to OUT, each race as it ends; a call that was interrupted
continues with what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sympy
import torch

from recipes.benchmarks.comparison.paired_runs import KEPT, folder_of
from softtrace.files import write_json

PACKAGES, SYMPY = Path(sympy.__file__).parents[1], Path(sympy.__file__).parent
#: of the model, for pretrain.py
SIZES = {"layers": 24, "hidden_size": 768, "heads": 12, "kv_heads": 4, "vocabulary": 8192}
#: what decodes: name, method, strength
RACING = (
    "plain=plain,0",
    "first=softtrace, exits first,0.15",
    "fifth=drafting after 0.21, exits 2,0.15",
)
OTHERS = (
    "softtrace=0.35",
    "softtrace, whole batch=0.35",
    "10th=0.35",
    "layerskip=1",
    "exit distillation=0.3,1",
)


def run(part: str, words: list[Any], args: argparse.Namespace, **environment: str) -> None:
    """Another of the benchmarks, its output in a log; raises if it fails."""
    name, *rest = map(str, words)
    words = [sys.executable, "-m", f"recipes.benchmarks.{name}", *rest]
    with (args.out / f"{part}.log").open("a", encoding="utf-8") as log:
        print(f"{part}: begins, see {log.name}", flush=True)
        subprocess.run(words, stdout=log, stderr=log, check=True, env={**os.environ, **environment})
    print(f"{part}: done", flush=True)


def pretrain(args: argparse.Namespace) -> None:
    """The start of all fine-tunings."""
    if (args.out / "model" / "pretrain.json").exists():
        return
    sizes = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in SIZES]
    run(
        "pretrain",
        [
            "comparison.pretrain", "--data", args.text, "--exclude", "sympy", "test", "tests",
            "--output", args.out / "model", "--overwrite", *sizes, "--lr=1e-3",
            "--weight-decay=0.1", f"--max-seconds={args.pretrain_seconds}", "--steps=100000",
            "--eval-every=2000", "--eval-blocks=512", f"--device={args.devices[0]}",
            *(["--compile"] if args.devices[0] != "cpu" else []),
        ],
        args,
    )  # fmt: skip


def peers(args: argparse.Namespace) -> None:
    """Fine-tune with all methods, several on a card, and keep the models."""
    several = {}
    if args.mps:
        pipes = str(args.out.resolve() / "mps")
        Path(pipes).mkdir(exist_ok=True)
        several = {"CUDA_MPS_PIPE_DIRECTORY": pipes, "CUDA_MPS_LOG_DIRECTORY": pipes}
        # Where one is running already, it says so and ends.
        starting = ["nvidia-cuda-mps-control", "-d"]
        subprocess.run(starting, env={**os.environ, **several}, check=False)
    racing = [f"{method}={strength}" for _, method, strength in map(parts_of, args.racing)]
    words = [
        "comparison.peers", "--model", args.out / "model", "--data", SYMPY / args.inside, "--bf16",
        "--lr=3e-4", f"--steps={args.steps}", f"--batch-size={args.batch_size}",
        "--block-size=256", f"--seeds={args.seeds}", "--by-method", "--keep", args.out / "models",
        "--out", args.out / "peers.json", f"--jobs={args.per_card * len(args.devices)}",
        "--devices", *args.devices,
        "--methods", *racing, *args.others,
    ]  # fmt: skip
    run("peers", words, args, **several)


class Races:
    """Models decode on devices of one kind, one a device, in the order that is given."""

    def __init__(self, kind: str, devices: list[str], args: argparse.Namespace) -> None:
        self.kind, self.args = kind, args
        self.free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for device in devices:
            self.free.put(device)
        self.no_more, self.gathering = threading.Event(), threading.Lock()
        self.pool = ThreadPoolExecutor(max(1, len(devices)))
        self.running = [
            self.pool.submit(self.race, way, seed)
            for way in (args.racing if devices else ())
            for seed in range(args.seeds)
        ]

    def end(self, cancel: bool = False) -> None:
        """Wait for those that decode, no longer for models that are not there.

        Args:
            cancel: let nobody begin any more, and say nothing of what failed. Else the others still
                decode where one fails, and then its error is raised.
        """
        self.no_more.set()
        self.pool.shutdown(cancel_futures=cancel)
        for each in self.running if not cancel else ():
            each.result()

    def race(self, way: str, seed: int) -> None:
        """Let one model decode, once it is there, on a device that is free."""
        args = self.args
        name, method, strength = parts_of(way)
        out = args.out / "races" / f"{self.kind}-{name}-{seed}.json"
        if out.exists():
            return
        model = folder_of(args.out / "models", method, float(strength), seed)
        while not (model / KEPT).exists():
            if self.no_more.wait(0.1) and not (model / KEPT).exists():
                raise FileNotFoundError(f"{model} has no {KEPT}: no model that was trained")
        device = self.free.get()
        try:
            words = [
                "speed.decoding", "--plain=", "--penalty", f"{name}={model}",
                "--data", SYMPY / args.inside, "--salt=effect", "--held-out-share=0.1",
                f"--prompts={args.prompts}", "--rounds=1", f"--device={device}", "--out", out,
            ]  # fmt: skip
            part = f"race-{self.kind}-{name}-{seed}"
            run(part, words, args, OMP_NUM_THREADS=str(args.threads))
            with self.gathering:
                gather(args)
        finally:
            self.free.put(device)


def same_arguments(args: argparse.Namespace) -> None:
    """Stop if OUT holds something that was made with other arguments."""
    names = ("text", "inside", *SIZES, "pretrain_seconds", "steps", "batch_size", "prompts")
    now = {name: str(getattr(args, name)) for name in names}
    path = args.out / "arguments.json"
    if path.exists() and (then := json.loads(path.read_text(encoding="utf-8"))) != now:
        sys.exit(f"{args.out} is of other arguments: {then}; give another --out")
    write_json(path, now)


def parts_of(way: str) -> tuple[str, str, str]:
    """Name, method and strength of NAME=METHOD,STRENGTH; a method's own name may hold commas."""
    name, _, rest = way.partition("=")
    method, _, strength = rest.rpartition(",")
    return name, method, strength


def gather(args: argparse.Namespace) -> None:
    """All races so far in one file."""
    found = []
    for path in sorted((args.out / "races").glob("*.json")):
        kind, _, rest = path.stem.partition("-")
        name, _, seed = rest.rpartition("-")
        result = json.loads(path.read_text(encoding="utf-8"))
        found.append({"kind": kind, "name": name, "seed": int(seed), **result})
    last = max(found, key=lambda each: each["created"])
    write_json(
        args.out / "decoding.json",
        {
            "races": found,
            "created": last["created"],
            "command": "decoding.py, once for each race, as each says",
            "versions": last["versions"],
            "hardware": "; ".join(sorted({each["hardware"] for each in found})),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=PACKAGES, help="to pretrain on")
    parser.add_argument("--inside", default="", help="a part of sympy, to fine-tune on")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--pretrain-seconds", type=float, default=330)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--racing", nargs="+", default=RACING, help="NAME=METHOD,STRENGTH")
    parser.add_argument("--others", nargs="*", default=OTHERS, help="METHOD=STRENGTH,...")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=4, help="that decode on the CPU")
    parser.add_argument("--threads", type=int, help="of each of these (default: a fair share)")
    parser.add_argument("--per-card", type=int, default=6, help="fine-tunings")
    parser.add_argument("--mps", action="store_true", help="let them share a card's kernels")
    cards = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    parser.add_argument("--devices", nargs="+", default=cards or ["cpu"])
    args = parser.parse_args()
    args.threads = args.threads or max(1, min(16, (os.cpu_count() or 1) // args.at_once))
    (args.out / "races").mkdir(parents=True, exist_ok=True)
    same_arguments(args)
    pretrain(args)
    on_cpu = Races("cpu", ["cpu"] * args.at_once, args)
    try:
        peers(args)
    except BaseException:
        on_cpu.end(cancel=True)
        raise
    on_cpu.end()
    Races("gpu", [device for device in args.devices if device != "cpu"], args).end()
    gather(args)


if __name__ == "__main__":
    main()
