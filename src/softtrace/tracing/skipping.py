"""Masked runs leave out what nobody reads: hooks narrow a module's input and widen its output.

Two kinds of work are thrown away by every masked run: the MLP of tokens whose MLP edge is masked
to zero, and the query and key projections of a run that uses recorded attention probabilities.
Modules that run here were proven at attach to treat every token by itself (``proof.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from softtrace.model.hooks import Hook, replace_first


class _Narrowed:
    """One module that shall run on some of its rows; between its two hooks it knows which."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._shape: torch.Size | None = None

    def hooks(self) -> list[Hook]:
        """The two hooks; all others on the module see its full input and output."""
        return [
            Hook(self.module, self._before, before=True),
            Hook(self.module, self._after, before=False, first=True),
        ]

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._shape = None
        narrowed: tuple[tuple[Any, ...], dict[str, Any]]
        narrowed, _ = replace_first((args, kwargs), self._narrowed)
        return narrowed

    def _narrowed(self, hidden: Tensor) -> Tensor | None:
        narrow = self.narrow(hidden)
        if narrow is not None:
            self._shape = hidden.shape[:-1]
        return narrow

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._shape is None:
            return output
        shape = self._shape
        return replace_first(output, lambda value: self.widen(value, shape))[0]

    def narrow(self, hidden: Tensor) -> Tensor | None:
        """``[B, T, d]`` to ``[1, N, d]``, or None to leave the input as it is."""
        raise NotImplementedError

    def widen(self, output: Tensor, shape: torch.Size) -> Tensor:
        """``[1, N, d']`` to ``[B, T, d']``."""
        raise NotImplementedError


def kept_rows(masks: Sequence[Tensor]) -> list[Tensor]:
    """Which tokens each layer's mask ``[B, T]`` keeps, as numbers of rows of ``[B·T, ...]``."""
    kept = (torch.stack([mask.detach() for mask in masks]) != 0).flatten(1)
    # An empty batch is more than some modules (expert routing) can take: one row always runs.
    kept[:, 0] |= ~kept.any(1)
    # Once for all layers: both wait for the device.
    return list(torch.split(kept.nonzero()[:, 1], kept.sum(1).tolist()))


class KeptRows(_Narrowed):
    """Runs a token-wise module where its edge is kept; elsewhere its output is zero."""

    def __init__(self, module: nn.Module, rows: Tensor) -> None:
        super().__init__(module)
        self._rows = rows

    @override
    def narrow(self, hidden: Tensor) -> Tensor | None:
        if len(self._rows) == hidden.shape[:-1].numel():
            return None
        self._rows = self._rows.to(hidden.device)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._rows)[None]

    @override
    def widen(self, output: Tensor, shape: torch.Size) -> Tensor:
        blank = output.new_zeros(shape.numel(), output.shape[-1])
        return blank.index_copy(0, self._rows, output.reshape(-1, output.shape[-1])).reshape(
            *shape, -1
        )


class Unread(_Narrowed):
    """Runs a module whose output nobody reads on a single row, repeated to the right shape."""

    @override
    def narrow(self, hidden: Tensor) -> Tensor | None:
        return hidden[:1, :1]

    @override
    def widen(self, output: Tensor, shape: torch.Size) -> Tensor:
        return output.expand(*shape, -1).contiguous()  # some models clip it in place (OLMo)
