"""Which exits a real model can have: at half depth, read directly or through a map of their own.

    P=recipes.benchmarks.comparison
    python -m $P.on_real_models tokens --models smollm2-135m --texts prose --prose DIR
    python -m $P.real_exits --folder runs/models       # wants a GPU: minutes for each way

Plain fine-tuning (16 x 512 tokens a step, AdamW, bfloat16) and a distance of the exit after half of
the layers from the full prediction, held constant, of an eighth of the tokens or of the easy third
of a quarter of them. What the exit is read through is learned at five times the rate. Writes
``results/log/real_exits.json`` after every way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.benchmarks.comparison.effect import held_out_loss
from recipes.benchmarks.comparison.on_real_models import RATE, ROWS, RUNS, WARMUP
from recipes.benchmarks.places import RESULTS, ROOT
from softtrace.density.distortion import divergence, entropy, total_variation
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.model.loading import load_model

#: way -> (weight, tokens, distance, what the exit is read through, whether the model learns too)
WAYS: dict[str, tuple[float, str, str, str, bool]] = {
    "plain": (0.0, "all", "kl", "nothing", True),
    "linear alone": (1.0, "all", "kl", "linear", False),
    "mlp alone": (1.0, "all", "kl", "mlp", False),
    "all 0.1": (0.1, "all", "kl", "nothing", True),
    "easy 0.1": (0.1, "easy", "kl", "nothing", True),
    "easy 1": (1.0, "easy", "kl", "nothing", True),
    "all 0.03 linear": (0.03, "all", "kl", "linear", True),
    "all 0.1 linear": (0.1, "all", "kl", "linear", True),
    "all 0.3 mlp": (0.3, "all", "kl", "mlp", True),
    "easy 0.1 linear": (0.1, "easy", "kl", "linear", True),
    "easy 0.3 linear": (0.3, "easy", "kl", "linear", True),
    "easy 0.3 mlp": (0.3, "easy", "kl", "mlp", True),
    "easy 1 linear": (1.0, "easy", "kl", "linear", True),
    "easy 0.5 linear, TV": (0.5, "easy", "tv", "linear", True),
}


class Linear(nn.Module):
    """The stream and a linear map of it, 0 at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.map.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.map(hidden)


class Gated(nn.Module):
    """The stream and a gated MLP of it of four times the width, 0 at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        read = self.norm(hidden)
        return hidden + self.down(F.silu(self.gate(read)) * self.up(read))


MAPS = {"nothing": lambda width: nn.Identity(), "linear": Linear, "mlp": Gated}


def chosen(full: Tensor, which: str, draws: torch.Generator) -> Tensor:
    """Numbers of the tokens whose exits are read."""
    share = 4 if which == "easy" else 8
    order = torch.randperm(len(full), generator=draws, device=full.device)[: len(full) // share]
    if which == "all":
        return order
    return order[entropy(full[order]).argsort()[: int(0.35 * len(order))]]


def measured(model: Any, way: str, tokens: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """Train one way; held-out loss, and how often the exit agrees in blocks of 256 tokens."""
    weight, which, distance, through, learns = WAYS[way]
    device, layers = model.device, model.model.layers
    torch.manual_seed(0)
    read = MAPS[through](model.config.hidden_size).to(device)
    seen: list[Tensor] = []
    layers[len(layers) // 2].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    groups = [{"params": list(model.parameters()), "lr": RATE}]
    if own := list(read.parameters()):
        groups.append({"params": own, "lr": 5 * RATE})
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    blocks, draws = tokens["train"], torch.Generator(device=device).manual_seed(0)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    warmup = torch.optim.lr_scheduler.LinearLR(optimiser, 1 / WARMUP, total_iters=WARMUP)
    for step in range(steps):
        places = order[torch.arange(step * ROWS, (step + 1) * ROWS) % len(order)]
        ids = blocks[places].long().to(device)
        with torch.autocast(device.type, torch.bfloat16):
            output = model(input_ids=ids, labels=ids)
            loss, hidden = output.loss, seen.pop().flatten(0, 1)
            if weight:
                full = output.logits.detach().flatten(0, 1)
                places = chosen(full, which, draws)
                stream = hidden[places] if learns else hidden[places].detach()
                early = model.lm_head(model.model.norm(read(stream)))
                measure = divergence if distance == "kl" else total_variation
                loss = loss + weight * measure(full[places], early).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        warmup.step()
    model.eval()
    entropies, agreed = [], []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        found = held_out_loss(model, tokens["held_out"].long(), str(device), 8)
        for ids in tokens["256"].long().split(8):
            seen.clear()
            logits = model(input_ids=ids.to(device)).logits[:, 128:]
            early = model.lm_head(model.model.norm(read(seen.pop())))[:, 128:]
            entropies.append(entropy(logits).flatten())
            agreed.append((early.argmax(-1) == logits.argmax(-1)).float().flatten())
    all_tokens, easy = torch.cat(agreed), torch.cat(entropies).argsort()
    quarter = all_tokens[easy[: len(easy) // 4]]
    return {"loss": found, "easy": float(quarter.mean()), "all": float(all_tokens.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "models", help="of models")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULTS / "log" / "real_exits.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = load_file(RUNS / "smollm2-135m prose.safetensors")
    found: dict[str, Any] = {}
    for way in args.ways:
        model = load_model(args.folder / "smollm2-135m").float().to(device).train()  # type: ignore[arg-type]
        found[way] = measured(model, way, tokens, args.steps)
        print(way, json.dumps(found[way]), flush=True)
        write_json(args.out, {"steps": args.steps, "ways": found, **provenance(device)})


if __name__ == "__main__":
    main()
