"""What a model writes after prompts: greedily, or drawn at temperature 1.

The model's predictions alone decide, not its generation config: nothing is penalised, no token is
ruled out, and the text continues behind an end-of-sequence token. transformers' ``generate`` would
fill in whatever the config says and a call does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softtrace.model.devices import device_of_module
from softtrace.model.wrappers import cache_of, forward_parameters, with_cache


@torch.no_grad()
def write_on(model: nn.Module, prompts: Tensor, count: int, draws: Tensor | None = None) -> Tensor:
    """Continue prompts of one length.

    Args:
        model: a causal language model.
        prompts: ``[B, T]`` ids without padding, T >= 1.
        count: new tokens of each, >= 1.
        draws: ``[B, count]`` in [0, 1), each the place of a token in the cumulative probabilities;
            None takes the most likely token.

    Returns:
        ``[B, count]`` int64 on the CPU.
    """
    network: Any = model
    parameters = forward_parameters(model)
    step, cache = prompts.to(device_of_module(model)), None
    text = step
    written = []
    for place in range(count):
        found = network(input_ids=step, **with_cache(parameters, cache))
        scores = found.logits[:, -1]
        token = scores.argmax(-1) if draws is None else _drawn(scores, draws[:, place])
        written.append(token.cpu())
        text = torch.cat((text, token[:, None]), dim=1)
        cache = cache_of(found)
        step = text if cache is None else token[:, None]
    return torch.stack(written, dim=1)


def draws_for(sequences: int, count: int, seed: int) -> Tensor:
    """``[sequences, count]`` float64 uniform in [0, 1), from a seed; no other state is touched."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sequences, count, dtype=torch.float64, generator=generator)


def _drawn(scores: Tensor, draws: Tensor) -> Tensor:
    """``[B]``: the token in whose share of the probabilities, laid end to end, each draw falls."""
    ends = scores.double().softmax(-1).cumsum(-1)
    places = draws.to(ends.device)[:, None] * ends[:, -1:]
    return torch.searchsorted(ends, places, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)
