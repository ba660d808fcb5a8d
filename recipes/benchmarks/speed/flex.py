"""Masked attention by FlexAttention beside this project's way, block by block of targets.

    python -m recipes.benchmarks.speed.flex                     # on a GPU, about three minutes
    python -m recipes.benchmarks.speed.flex --device cpu --lengths 64 --calls 1    # uncompiled

A kept attention edge is a score above a bound of its head and target. FlexAttention can leave out
the others; that it renormalises is undone by the logarithms of its softmax's sums. Both ways get
random queries, keys and values of one layer and keep the edges whose share of what reaches their
target is above the mean, as a masked run with recorded attention does.

Found are the largest difference of the heads' outputs, beside the largest output; the share of
edges that one way alone keeps, of those that ours keeps; and seconds, the median of ``--calls``.
Writes ``results/flex.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from recipes.benchmarks.places import RESULTS
from recipes.benchmarks.speed.timing import seconds
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.graph.attention_maps import MadeFrom, each_block
from softtrace.graph.importance import carried_map, head_value_norms
from softtrace.model.attention_interface import SoftmaxMap, mixed_values
from softtrace.tracing.masking import MaskedMap

#: name -> heads, heads of keys and values, width of a head
LAYERS = {"SmolLM2-135M": (9, 3, 64), "Llama-3.2-1B": (32, 8, 64)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BothWays:
    """One of :data:`LAYERS`, with masked attention in both ways."""

    def __init__(
        self, sizes: tuple[int, int, int], length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        heads, kv_heads, width = sizes
        made = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=made, device=device).to(dtype)

        self.query = random(1, heads, length, width)
        self.key, self.value = (
            random(1, kv_heads, length, width),
            random(1, kv_heads, length, width),
        )
        weight = random(heads, width, heads * width) / math.sqrt(heads * width)
        tau = 1 / (heads * length)
        visible = torch.ones(1, length, length, dtype=torch.bool, device=device).tril_()
        norms = head_value_norms(self.value, weight)
        own = SoftmaxMap(self.query, self.key, visible, width**-0.5)
        carried = carried_map(own, visible, norms)
        sums = each_block(carried, lambda values, _: values.sum((1, 3)))
        total = torch.cat([part for _, part in sums], dim=1)
        self.mask = MadeFrom(
            carried, lambda values, rows: values / rows.of(total)[:, None, :, None] >= tau
        )
        self.masked = MaskedMap(own, self.mask)
        self.log_norms = norms.log()
        self.blocks = create_block_mask(
            lambda b, h, target, source: source <= target, None, None, length, length, device
        )
        self.attend: Any = flex_attention
        if device.type == "cuda":
            self.attend = torch.compile(flex_attention, dynamic=False)
        self.sums = self._flex(None)[1]
        self.bound = self.sums + math.log(tau) + total.log()[:, None]

    def ours(self) -> Tensor:
        """``[1, H, T, d]``."""
        return mixed_values(self.masked, self.value)

    def theirs(self) -> Tensor:
        """``[1, H, T, d]``, the renormalisation undone."""

        def condition(score: Tensor, *at: Tensor) -> Tensor:
            return torch.where(self._keep(score, *at), score, -math.inf)

        found, sums = self._flex(condition)
        return (found * (sums - self.sums).exp()[..., None]).nan_to_num()  # of rows without edges

    def flips(self) -> tuple[int, int]:
        """Edges that one way alone keeps, and edges that ours keeps."""
        ours = self.mask.whole()

        def condition(score: Tensor, *at: Tensor) -> Tensor:
            return torch.where(self._keep(score, *at) != ours[at], 0.0, -math.inf)

        counted = self._flex(condition)[1]  # a softmax over equal scores: its sum is their number
        return round(float(counted.double().exp().sum())), int(ours.sum())

    def _keep(self, score: Tensor, b: Tensor, h: Tensor, target: Tensor, source: Tensor) -> Tensor:
        return score + self.log_norms[b, h, source] >= self.bound[b, h, target]

    def _flex(self, condition: Any) -> tuple[Tensor, Tensor]:
        """Outputs, and logarithms of the softmax's sums ``[1, H, T]``."""
        with warnings.catch_warnings():  # that it is slow where it is not compiled
            warnings.simplefilter("ignore")
            found, aux = self.attend(
                self.query, self.key, self.value, score_mod=condition, block_mask=self.blocks,
                enable_gqa=True, return_aux=AuxRequest(lse=True),
            )  # fmt: skip
        return found, aux.lse


def compared(both: BothWays, calls: int) -> dict[str, Any]:
    """What is found of both ways."""
    ours, theirs = both.ours().float(), both.theirs().float()
    flipped, kept = both.flips()
    found: dict[str, Any] = {
        "largest_difference": float((ours - theirs).abs().max()),
        "largest_output": float(ours.abs().max()),
        "kept": kept,
        "flipped": flipped,
        "flipped_share": flipped / kept,
    }
    for name, way in {"ours": both.ours, "flex": both.theirs}.items():
        found[f"seconds of {name}"] = statistics.median(seconds(way) for _ in range(calls))
    return found


def main() -> None:
    """Compare both ways, and write what is found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192], help="tokens")
    parser.add_argument("--calls", type=int, default=20, help="that are timed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "flex.json", help="result file")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    for length, name, dtype in itertools.product(options.lengths, LAYERS, DTYPES):
        torch._dynamo.reset()
        with torch.no_grad():
            found = compared(BothWays(LAYERS[name], length, DTYPES[dtype], device), options.calls)
        rows.append({"layer": name, "length": length, "dtype": dtype, **found})
        print(json.dumps(rows[-1]), flush=True)
        write_json(options.out, {"rows": rows, **provenance(device)})


if __name__ == "__main__":
    main()
