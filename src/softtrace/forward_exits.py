"""Early exits read in the training forward itself, where all layers run anyway.

The distillation of exits (Zhang et al., arXiv 1905.08094, the deepest classifier as teacher), on
some tokens, each read after a random number of layers: KL(full ‖ exit), the full prediction held
constant. It costs the vocabulary of those tokens and nothing else, so it can look at tokens of the
whole batch, easy or not, which a second pass cannot afford.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softtrace.distortion import divergence
from softtrace.families.anatomy import Anatomy
from softtrace.families.readout import Readout
from softtrace.hooks import Hook, on_input, register


@dataclass
class Seen:
    """What one forward of the model let be seen.

    Attributes:
        streams: residual streams ``[B, T, d_model]`` that entered each layer.
        logits: ``[B, T, V]``; None until the forward ended.
    """

    streams: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None


@contextmanager
def watching(model: nn.Module, anatomy: Anatomy, seen: list[Seen]) -> Iterator[None]:
    """Collect into ``seen`` what every forward of ``model`` inside gives, for nothing but looking.

    A forward without gradients is left out.
    """

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(Seen())

    def enter(hidden: Tensor) -> None:
        if seen and seen[-1].logits is None:  # not a layer that somebody calls on its own
            seen[-1].streams.append(hidden)

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if seen and isinstance(logits, Tensor) and logits.requires_grad:
            seen[-1].logits = logits
        elif seen:
            seen.pop()

    hooks = [Hook(model, begin, before=True), Hook(model, end, before=False)]
    hooks += [Hook(modules.layer, on_input(enter), before=True) for modules in anatomy.layers]
    handles: list[RemovableHandle] = []
    try:
        register(hooks, handles)
        yield
    finally:
        for handle in handles:
            handle.remove()


def exit_distance(seen: Seen, readout: Readout, places: Tensor, depths: Tensor) -> Tensor:
    """KL of the full prediction from exits, one number a chosen token, nats.

    Args:
        seen: a forward that ended.
        readout: the model's final norm and head.
        places: ``[n]`` int64, tokens as numbers into ``[B·T]``, on the CPU.
        depths: ``[n]`` int64, layers after which each is read, 1 to L - 1, ascending, on the CPU.

    Returns:
        ``[n]``.
    """
    if seen.logits is None:
        raise ValueError("a forward that has not ended")
    places = places.to(seen.logits.device)  # once: every transfer waits for the device
    by_depth = torch.split(places, depths.bincount().tolist())
    read = [
        seen.streams[depth].flatten(0, 1)[chosen]
        for depth, chosen in enumerate(by_depth)
        if len(chosen)
    ]
    full = seen.logits.detach().flatten(0, 1)[places]
    return divergence(full, readout.early(torch.cat(read)))
