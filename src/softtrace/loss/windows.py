"""What a step's masked runs look at: windows of a batch, each run as a sequence of its own.

A model that was trained with ``<bos>`` in front of every text predicts badly without it (Gemma 3
270M: 7.5 instead of 5.0 nats a token in windows of 64). So a window out of the middle of a text
that begins with it gets it too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from softtrace.graph.batch import Batch, documents_of
from softtrace.loss import draws
from softtrace.loss.draws import Draw, draw
from softtrace.loss.options import DensityOptions
from softtrace.loss.transfers import sent
from softtrace.tracing.instrument import Instrument


@dataclass(frozen=True)
class Windows:
    """What a step looks at.

    Attributes:
        batch: ``[n, W]`` windows; W is one more than was drawn where one of them was begun.
        thresholds: ``[n]``, τ of each.
        depths: ``[n, W]`` int64, E of each token.
    """

    batch: Batch
    thresholds: Tensor
    depths: Tensor

    @classmethod
    def of(cls, batch: Batch, drawn: Draw, window: int, first_token: int | None) -> Windows:
        """Cut the windows that were drawn out of a batch.

        Args:
            batch: ``[B, T]``.
            drawn: from its counted tokens.
            window: tokens of each.
            first_token: id of the token with which texts of the model begin; None for none.
        """
        part = batch.part(lambda values: drawn.of(values, window))
        windows = cls(part, drawn.thresholds, drawn.depths)
        if first_token is None:
            return windows
        inside = _continues(batch, first_token)[drawn.rows, drawn.starts]
        return windows._begun(first_token, inside) if bool(inside.any()) else windows

    def on(self, device: torch.device) -> Windows:
        """The same windows on a device."""
        batch = self.batch.part(lambda values: sent(values, device))
        return Windows(batch, sent(self.thresholds, device), sent(self.depths, device))

    def _begun(self, first_token: int, inside: Tensor) -> Windows:
        """The windows with one more token in front, which counts nowhere.

        Args:
            first_token: its id.
            inside: ``[n]`` bool, windows that get it; in others its place holds padding, or in a
                packed row, which can have none, a document of its own.
        """
        batch = self.batch
        column = inside[:, None]
        positions = batch.positions
        if positions is not None:
            ahead = torch.where(column, (positions[:, :1] - 1).clamp_min(0), positions[:, :1])
            positions = torch.cat((ahead, positions), 1)
        begun = replace(
            batch,
            input_ids=_ahead(torch.full_like(batch.input_ids[:, :1], first_token), batch.input_ids),
            valid=_ahead(column | batch.packed, batch.valid),
            targets=_ahead(torch.full_like(batch.targets[:, :1], -100), batch.targets),
            counted=_ahead(torch.zeros_like(column), batch.counted),
            positions=positions,
        )
        return replace(self, batch=begun, depths=_ahead(self.depths[:, :1], self.depths))


def draw_windows(
    instrument: Instrument, batch: Batch, step: tuple[int, int], options: DensityOptions
) -> Windows | None:
    """Draw what a step looks at.

    Args:
        instrument: of the model.
        batch: on the CPU, where nobody waits for what is drawn.
        step: the global step, and which of its accumulated batches.
        options: as they are on the model's device.

    Returns:
        None where no token of it has a target.
    """
    length = batch.valid.shape[1]
    window = length if options.crop is None else min(options.crop, length)
    drawn = draw(
        seed=options.seed,
        step=step,
        rank=draws.rank(),
        counted=batch.counted,
        share=options.window_share,
        window=window,
        thresholds=options.thresholds,
        depths=options.depth_bounds(len(instrument.anatomy.layers)),
    )
    if drawn is None:
        return None
    return Windows.of(batch, drawn, window, first_token_of(instrument.model))


def first_token_of(model: nn.Module) -> int | None:
    """The id with which a model's texts begin, as its config says; None where it says none."""
    config = getattr(model, "config", None)
    found = getattr(config.get_text_config(), "bos_token_id", None) if config else None
    return found if isinstance(found, int) else None


def _continues(batch: Batch, first_token: int) -> Tensor:
    """``[B, T]`` bool: tokens behind the first one of a document that begins with ``first_token``.

    A row that is not packed is one document, from its first real token on.
    """
    places = torch.arange(batch.valid.shape[1], device=batch.valid.device).expand_as(batch.valid)
    if batch.packed and batch.positions is not None:
        numbers = documents_of(batch.positions)
        new = numbers.diff(dim=-1, prepend=numbers[:, :1]) != 0
        starts = torch.where(new, places, 0).cummax(-1).values
    else:
        starts = batch.valid.int().argmax(-1, keepdim=True).expand_as(places)
    return (batch.input_ids.gather(1, starts) == first_token) & (places > starts)


def _ahead(column: Tensor, values: Tensor) -> Tensor:
    return torch.cat((column, values), 1)
