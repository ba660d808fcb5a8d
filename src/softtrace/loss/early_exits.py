"""Early exits read in the training forward itself, where all layers run anyway.

The distillation of exits (Zhang et al., arXiv 1905.08094, the deepest classifier as teacher), on
some tokens, each read after a random number of layers: KL(full ‖ exit), the full prediction held
constant. It costs the vocabulary of those tokens and nothing else, so it can look at tokens of the
whole batch, easy or not, which a second pass cannot afford. A forward with a fused loss (Liger,
TRL) gives no logits; there the full prediction of those tokens is read from the last stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.anatomy.anatomy import Anatomy
from softtrace.anatomy.readout import Readout
from softtrace.density.chunks import distances
from softtrace.density.distortion import divergence
from softtrace.density.easiness import Easiness, easiness
from softtrace.errors import InvalidInputError
from softtrace.loss.draws import ExitDraw
from softtrace.loss.transfers import EarlyCopies
from softtrace.model.hooks import Hook, on_input, registered
from softtrace.model.wrappers import cache_of

CHUNK = 256
"""Tokens whose easiness is computed at a time, as it takes copies of their logits."""
FUSED_CHUNK = 1024
"""The same where it is fused, which takes no copies and is fast with many tokens."""

MIXED = (
    "packed rows: in the forward that was watched tokens saw other documents, so that exits and "
    "the task's loss are of rows as one document; run it with use_cache=False and no attention "
    "mask, for only then transformers goes by position ids"
)


@dataclass
class Seen:
    """What one forward of the model let be seen.

    Attributes:
        streams: residual streams ``[B, T, d_model]`` of exits, by the number of layers before.
        last: the one that the final norm read, ``[B, T, d_model]``.
        logits: ``[B, T, V]``; None where the forward gave none, or not those of every token
            (``logits_to_keep``, a fused loss).
        mixes: whether tokens of packed rows saw other documents.
        ended: whether the forward did.
    """

    streams: dict[int, Tensor] = field(default_factory=dict)
    last: Tensor | None = None
    logits: Tensor | None = None
    mixes: bool = False
    ended: bool = False


@dataclass
class Watched:
    """The forwards that ran inside one block of :func:`watching`, in order.

    Attributes:
        forwards: those with gradients; the last one may not have ended.
        copies: of the batch that they were given, on the CPU.
        model: whose forwards they are; None before the first block.
        without_gradients: whether there was a forward that was left out for having none.
    """

    forwards: list[Seen] = field(default_factory=list)
    copies: EarlyCopies = field(default_factory=EarlyCopies)
    model: nn.Module | None = field(default=None, repr=False)
    without_gradients: bool = False

    def check(self, model: nn.Module) -> None:
        """Raise :class:`softtrace.InvalidInputError` where this watched another model."""
        if self.model is not None and self.model is not model:
            raise InvalidInputError(
                "watched: found what a DensityLoss of another model watched; give the handle that "
                "this one's watching() gave, or none for that of its newest block"
            )

    def last_of(self, shape: torch.Size, depths: Iterable[int]) -> Seen | None:
        """The last forward of a batch ``(B, T)`` with a stream at every depth; None without one."""
        fitting = [
            each for each in self.forwards
            if each.ended
            and all(at in each.streams and each.streams[at].shape[:2] == shape for at in depths)
        ]  # fmt: skip
        return fitting[-1] if fitting else None

    def why_none(self, shape: torch.Size) -> tuple[str, str]:
        """Why :meth:`last_of` found none for a batch ``(B, T)``: the kind of reason, a message."""
        rest = ", or set exits=0, exit_map=False"
        shapes = [each.last.shape[:2] for each in self.forwards if each.last is not None]
        if shapes and shapes[-1] != shape:
            (rows, length), (all_rows, most) = shapes[-1], shape
            return "shape", (
                f"exits: the forward that was watched had {rows} rows of {length} tokens, and this "
                f"batch has {all_rows} of {most}, so none is read early; give the call the rows "
                f"that one forward ran{rest}"
            )
        if self.forwards:
            return "unfinished", (
                "exits: the forward that was watched did not end, or left layers out, so none is "
                f"read early; run it whole before the call{rest}"
            )
        if self.without_gradients:
            return "gradients", (
                "exits: the forward that was watched ran without gradients, so none is read early; "
                f"run it with gradients{rest}"
            )
        return "none", (
            "exits: no forward was watched, so none is read early; run it inside "
            f"'with density_loss.watching():'{rest}"
        )

    def forget(self) -> None:
        """Let go of the streams and logits that are held."""
        self.forwards.clear()
        self.without_gradients = False
        self.copies = EarlyCopies()


@contextmanager
def watching(
    model: nn.Module, anatomy: Anatomy, watched: Watched, depths: Iterable[int]
) -> Iterator[None]:
    """Collect what every forward of ``model`` inside gives, for nothing but looking.

    A forward without gradients is left out. ``depths`` are those of exits, numbers of layers. The
    decoder inside counts where it is called by itself: by a loop that applies the head on its own,
    or by ``model.forward``, which passes the model's hooks by (PEFT's AdaLoRA calls it).
    """
    seen = watched.forwards
    decoder = getattr(model, "base_model", model)
    within: list[nn.Module] = []  # of the model and its decoder, what is running

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is model:
            within.clear()  # of a forward that failed
        if not within:
            seen.append(Seen())
        within.append(module)

    def enter(depth: int, hidden: Tensor) -> None:
        if seen and not seen[-1].ended:  # not a layer that somebody calls on its own
            seen[-1].streams[depth] = hidden

    def leave(hidden: Tensor) -> None:
        if seen and not seen[-1].ended:
            seen[-1].last = hidden

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if within:
            within.pop()
        if within or not seen:
            return
        logits, found = getattr(output, "logits", None), seen.pop()
        last = found.last
        if isinstance(logits, Tensor) and last is not None and logits.shape[:2] == last.shape[:2]:
            found = replace(found, logits=logits)
        found.mixes = _mixes(model, kwargs.get("attention_mask"), output)
        result = found.last if found.logits is None else found.logits
        if result is not None and result.requires_grad:
            seen.append(replace(found, ended=True))
        else:
            watched.without_gradients = True

    hooks: list[Hook] = []
    for module in dict.fromkeys((model, decoder)):
        hooks += [Hook(module, begin, before=True), Hook(module, end, before=False)]
    hooks.append(Hook(anatomy.readout.norm.module, on_input(leave), before=True))
    hooks += [
        Hook(anatomy.layers[depth].layer, on_input(partial(enter, depth)), before=True)
        for depth in depths
    ]
    with registered(hooks):
        yield


def _mixes(model: Any, mask: Any, output: Any) -> bool:
    """Whether transformers read packed rows as one document, in spite of their position ids."""
    if "flash" in str(model.config._attn_implementation):  # kernels that always go by these
        return False
    if mask is not None:  # of more dimensions it may keep documents apart itself
        return isinstance(mask, Tensor) and mask.dim() == 2
    return cache_of(output) is not None


def exit_distance(
    seen: Seen,
    readout: Readout,
    drawn: ExitDraw,
    read: Callable[[Tensor, int], Tensor],
    at_once: int | None = None,
) -> Tensor:
    """KL of the full prediction from exits, one number a chosen token, nats.

    Args:
        seen: a forward that ended.
        readout: the model's final norm and head.
        drawn: ``n`` tokens, and after how many layers each is read.
        read: makes of the stream ``[m, d_model]`` after so many layers what the final norm reads.
        at_once: how many distances; None for as many as memory allows.

    Returns:
        ``[n]``.
    """
    by_depth = torch.split(drawn.places, drawn.depths.bincount().tolist())
    streams = [
        read(rows(seen.streams[depth], chosen), depth)
        for depth, chosen in enumerate(by_depth)
        if len(chosen)
    ]
    full = _full(seen, readout, drawn.places)
    return distances(divergence, full, readout.early(torch.cat(streams)), at_once)


@torch.no_grad()
def easiest(
    seen: Seen,
    readout: Readout,
    drawn: ExitDraw,
    targets: Tensor,
    score: str | Easiness,
    share: float,
    chunk: int = CHUNK,
) -> ExitDraw:
    """The easiest of the tokens that were drawn, as many of every depth as their share.

    Nothing is read from the device: how many there are follows from the draw's depths, and where
    fewer tokens are used the rest is not used here either.

    Args:
        seen: a forward that ended.
        readout: the model's final norm and head.
        drawn: ``n`` tokens.
        targets: ``[B, T]``, what follows each token.
        score: of the full prediction, low where easy.
        share: of the tokens, in (0, 1].
        chunk: tokens whose logits are there at a time.
    """
    ranked = []
    for places in torch.split(drawn.places, chunk):
        full = _full(seen, readout, places)[None]
        ranked.append(easiness(score)(full, targets.flatten()[places][None])[0].float())
    scores = torch.cat(ranked)
    usable = drawn.used & (scores < torch.inf)  # of a callable: infinite where never easy
    scores, first = torch.where(usable, scores, torch.inf), 0
    kept, used = [], []
    depths: list[int] = []
    for depth, count in enumerate(drawn.depths.bincount().tolist()):
        if count:
            group, most = slice(first, first + count), math.ceil(share * count)
            found = scores[group].topk(most, largest=False)
            wanted = share * usable[group].sum()  # no more than there are, so that all are usable
            kept.append(first + found.indices)
            depths += [depth] * most
            used.append(torch.arange(most, device=scores.device) < wanted)
            first += count
    places = drawn.places.index_select(0, torch.cat(kept))
    return ExitDraw(places, torch.tensor(depths, device="cpu"), torch.cat(used))


def _full(seen: Seen, readout: Readout, places: Tensor) -> Tensor:
    """The full prediction of chosen tokens, ``[n, V]``, held constant."""
    assert seen.last is not None
    with torch.no_grad():
        if seen.logits is None:
            return readout.early(rows(seen.last, places))
        return rows(seen.logits.detach(), places)


def rows(values: Tensor, places: Tensor) -> Tensor:
    """``[n, X]`` of ``[B, T, X]``, on the device of the places: layers may be on others."""
    # index_select: the backward pass of indexing with a tensor sorts, this one adds
    return values.flatten(0, 1).index_select(0, places.to(values.device)).to(places.device)
