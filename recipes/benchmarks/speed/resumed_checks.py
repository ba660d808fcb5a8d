"""What it is worth that a check continues from what the draft computed.

    make quickstart && python -m recipes.benchmarks.speed.resumed_checks

The loop of ``softtrace.decoding.speculate`` against one whose checks run all layers, with
prompts interleaved, on the models of the quickstart. The latter's checks also write the token after
a draft whose guesses are all right. Writes ``results/resumed_checks.json``.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from recipes.benchmarks.places import QUICKSTART, RESULTS
from softtrace.data import pack
from softtrace.data.blocks import evenly
from softtrace.data.text_source import TextSource
from softtrace.decoding import check_cache, check_early_exit, greedy, speculate
from softtrace.decoding.split_model import first_layers, forget
from softtrace.evaluation.decode_race import quartiles
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.model.loading import load_model, load_tokenizer
from softtrace.model.wrappers import forward_parameters, with_cache

NEVER = -1


@torch.inference_mode()
def all_layers(model: Any, ids: Tensor, args: argparse.Namespace) -> list[int]:
    """Self-speculation whose checks run all layers over the draft."""

    def run(tokens: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, **options).logits[0]
        return logits

    cache = DynamicCache()
    options = with_cache(forward_parameters(model), cache)
    tokens = [int(run(ids)[-1].argmax())]
    while len(tokens) < args.new_tokens:
        draft: list[int] = []
        room = min(args.draft_tokens, args.new_tokens - len(tokens) - 1)
        with first_layers(model, args.exit_layer):
            while len(draft) < room:
                last = draft[-1] if draft else tokens[-1]
                logits = run(ids.new_tensor([[last]]))[-1]
                draft.append(int(logits.argmax()))
                if not float(logits.softmax(-1)[draft[-1]]) >= args.confidence:
                    break
        forget(cache.layers[: args.exit_layer], len(draft))
        best = run(ids.new_tensor([[tokens[-1], *draft]])).argmax(-1).tolist()
        right = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
        forget(cache.layers, len(draft) - right)
        tokens += [*draft[:right], best[right]]
    return tokens


def prompts(path: Path, args: argparse.Namespace) -> Tensor:
    """Held-out prompts ``[N, T]``, the same for both models, which share a tokenizer."""
    source = TextSource(args.data, held_out_share=0.1, suffixes=(".py",))
    return evenly(pack(source.documents(), load_tokenizer(path), args.prompt_tokens), args.prompts)


def race(path: Path, rows: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Both loops over plain decoding, and one over the other."""
    model = load_model(path).eval()
    proven_exit = check_cache(check_early_exit(model), (args.exit_layer,))
    found: dict[str, list[float]] = {"all layers": [], "resumed": [], "ratio": []}
    same = 0
    for turn in range(args.rounds + 1):  # the first one warms up
        for row in tqdm(rows, desc=f"{path.parent.name}, round {turn}"):
            times, texts = [time.perf_counter()], []
            for write in (
                lambda ids: greedy(model, ids, args.new_tokens, NEVER).tokens.tolist(),
                lambda ids: all_layers(model, ids, args),
                lambda ids: speculate(
                    model, ids, exit_layer=args.exit_layer, max_new_tokens=args.new_tokens,
                    draft_tokens=args.draft_tokens, confidence=args.confidence,
                    eos_token_id=NEVER, proven_exit=proven_exit,
                ).tokens.tolist(),
            ):  # fmt: skip
                texts.append(write(row[None]))
                times.append(time.perf_counter())
            if not turn:
                continue
            plain, old, new = (b - a for a, b in itertools.pairwise(times))
            found["all layers"].append(plain / old)
            found["resumed"].append(plain / new)
            found["ratio"].append(old / new)
            same += texts[0] == texts[1] == texts[2]
    spreads = {name: quartiles(ratios) for name, ratios in found.items()}
    return {**spreads, "identical": same / len(found["ratio"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, default=QUICKSTART, help="folder of the quickstart")
    parser.add_argument("--data", default=str(Path(matplotlib.__file__).parent))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exit-layer", type=int, default=4)
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.add_argument("--confidence", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=RESULTS / "resumed_checks.json")
    args = parser.parse_args()
    folders = {name: args.models / name / "model" for name in ("plain", "penalty")}
    rows = prompts(folders["plain"], args)
    names = ("prompts", "new_tokens", "rounds", "exit_layer", "draft_tokens", "confidence")
    write_json(
        args.out,
        {
            "data": Path(args.data).name,
            **{name: getattr(args, name) for name in names},
            "models": {name: race(path, rows, args) for name, path in folders.items()},
            **provenance(torch.device("cpu")),
        },
    )


if __name__ == "__main__":
    main()
