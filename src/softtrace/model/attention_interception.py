"""Attention of models that do not follow transformers' interface, seen at its softmax.

GPT-J, CodeGen, Bloom, MPT, Falcon and code from elsewhere compute attention in place:
``softmax(scores)``, then a product with the values. A ``TorchFunctionMode`` sees both calls, while
one of our runs is under way: the probabilities are followed from the softmax through casts, dropout
and reshapes to the product, and a listener reads or replaces them there. No model code is copied or
patched; that the right tensors were caught is for the attach-time proof to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from softtrace.graph.attention_maps import HeldMap
from softtrace.graph.importance import working_dtype
from softtrace.model.attention_interface import (
    AttentionListener,
    SoftmaxMap,
    configured,
    mixed_values,
)

Asking = Callable[[], nn.Module | None]

_SOFTMAXES = (functional.softmax, torch.softmax, Tensor.softmax)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_HIDDEN = 5e3
"""Scores this far under zero and under the largest of their row are masked: they have no edge.
Masks are the least number of a type, or -1e4."""


class _Followed(NamedTuple):
    """Probabilities on their way from the softmax to the product, and where scores were masked."""

    tensor: Tensor  # held, so that its id cannot come back as another tensor's
    visible: Tensor


class Interception(TorchFunctionMode):
    """Catches the attention of the module that is asking.

    Args:
        listener: reads and replaces probabilities.
        asking: the attention module that is running; None outside of any.
        batch: ``(B, T)`` of the run.
    """

    def __init__(self, listener: AttentionListener, asking: Asking, batch: torch.Size) -> None:
        super().__init__()
        self.listener, self.asking = listener, asking
        self.rows, self.length = batch
        self._followed: dict[int, _Followed] = {}
        self.softmaxes = 0

    @override
    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.asking() is None:
            return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func in _SOFTMAXES and args and self._is_square(args[0]):
            found = func(*args, **kwargs)
            self._follow(found, _seen(args[0].detach()))
            self.softmaxes += 1
            return found
        followed = self._followed.get(id(args[0])) if args else None
        if followed is None:
            return func(*args, **kwargs)
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            return func(self._caught(followed, args[0], args[1]), *args[1:], **kwargs)
        found = func(*args, **kwargs)
        if isinstance(found, Tensor) and found.numel() == followed.tensor.numel():
            self._follow(found, followed.visible)
        return found

    def _is_square(self, scores: Any) -> bool:
        return (
            isinstance(scores, Tensor)
            and scores.dim() in (3, 4)
            and scores.shape[-2:] == (self.length, self.length)
            and scores.numel() % (self.rows * self.length**2) == 0
        )

    def _follow(self, tensor: Tensor, visible: Tensor) -> None:
        self._followed[id(tensor)] = _Followed(tensor, visible)

    def _caught(self, followed: _Followed, probabilities: Tensor, value: Tensor) -> Tensor:
        """Probabilities for the product, in the shape and type that the model's code had."""
        module = self.asking()
        assert module is not None
        square = (self.rows, -1, self.length, self.length)
        visible = followed.visible.reshape(square).any(1)
        heads = value.reshape(self.rows, -1, self.length, value.shape[-1])
        given = probabilities.reshape(square)
        given = given.to(working_dtype(given.dtype))
        found = self._heard(module, given, heads, visible)
        self._followed.clear()
        return found.to(probabilities.dtype).reshape(probabilities.shape)

    def _heard(self, module: nn.Module, given: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        given = given.masked_fill(~visible[:, None], 0.0)
        return self.listener.on_attention(module, HeldMap(given), value, visible).whole()

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``scaled_dot_product_attention`` with its probabilities in the open."""
        module = self.asking()
        assert module is not None
        bias: Tensor | None = None
        visible = torch.ones(
            self.rows, self.length, key.shape[2], dtype=torch.bool, device=query.device
        )
        if is_causal:
            visible = visible.tril()
        if attn_mask is not None:
            mask = attn_mask[(None,) * (4 - attn_mask.dim())]
            if mask.dtype != torch.bool:
                bias, mask = mask, _seen(mask.detach())
            visible = visible & mask.expand(self.rows, -1, self.length, -1).any(1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        own = SoftmaxMap(query, key, visible, scale, bias=bias)
        return mixed_values(self.listener.on_attention(module, own, value, visible), value)


def _seen(scores: Tensor) -> Tensor:
    return (scores > -_HIDDEN) | (scores > scores.amax(-1, keepdim=True) - _HIDDEN)


@contextmanager
def interception_active(
    configs: Sequence[Any],
    listener: AttentionListener,
    asking: Asking,
    batch: torch.Size,
) -> Iterator[Interception]:
    """Let models with these configs run their own code, under an :class:`Interception`.

    Fused kernels other than PyTorch's have no softmax to be seen: those give way to eager code.
    """
    fused = [each for each in configs if each._attn_implementation not in ("sdpa", "eager")]
    with configured(fused, "eager"), Interception(listener, asking, batch) as mode:
        yield mode
