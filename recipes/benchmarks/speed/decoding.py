"""The payoff: self-speculation after plain fine-tuning and after the penalty's.

    make quickstart && python -m recipes.benchmarks.speed.decoding
    python -m recipes.benchmarks.speed.decoding --plain MODEL --penalty [NAME=]MODEL ... --data TEXT

Every speed-up is over plain greedy decoding of the same model by the same loop, prompt by prompt in
turns; the texts are compared token for token. Writes ``results/decoding.json``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import matplotlib
import torch

from recipes.benchmarks.places import QUICKSTART, RESULTS
from softtrace.cli.decode_bench import decode_bench
from softtrace.data.text_source import TextSource
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.run_options import RunOptions
from softtrace.files import write_json
from softtrace.model.devices import device_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plain", default=str(QUICKSTART / "plain" / "model"), help="'' for none")
    parser.add_argument("--penalty", nargs="+", default=[str(QUICKSTART / "penalty" / "model")])
    parser.add_argument("--data", default=str(Path(matplotlib.__file__).parent))
    parser.add_argument("--held-out-share", type=float, default=0.1)
    parser.add_argument("--salt", default="")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exit-layer", type=int, help="default: the best expected one of each")
    parser.add_argument("--draft-tokens", type=int, help="likewise")
    parser.add_argument("--confidence", type=float, help="likewise")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding.json")
    args = parser.parse_args()
    said_once = ("model", "data", *provenance(torch.device("cpu")))
    models = {"plain": args.plain} if args.plain else {}
    for given in args.penalty:
        name, _, model = given.rpartition("=")
        models[name or "penalty"] = model
    found = {}
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            run = decode_bench(
                model,
                TextSource(args.data, args.held_out_share, args.salt, (".py",)),
                folder,
                prompts=args.prompts,
                new_tokens=args.new_tokens,
                rounds=args.rounds,
                exit_layer=args.exit_layer,
                draft_tokens=args.draft_tokens,
                confidence=args.confidence,
                run=RunOptions(args.device, args.dtype),
            )
        found[name] = {key: value for key, value in run.items() if key not in said_once}
    write_json(
        args.out, {"data": Path(args.data).name, **found, **provenance(device_of(args.device))}
    )


if __name__ == "__main__":
    main()
