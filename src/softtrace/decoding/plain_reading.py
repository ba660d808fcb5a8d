"""A text read on over one cache, as ``model.generate`` reads it when nothing is drafted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from softtrace.decoding.exit_checks import moving_rotations
from softtrace.errors import UnsupportedModelError
from softtrace.model.wrappers import forward_parameters, one_logit, unwrapped, with_cache

#: What layers may keep of a text. Others hold a state, which the model's own loop makes and hands
#: on, or keys of a second kind.
_KEPT = (DynamicLayer, DynamicSlidingWindowLayer)


class PlainReader:
    """Reads one text, some tokens after others.

    Args:
        model: a causal language model of transformers, in eval mode.

    Raises:
        UnsupportedModelError: it keeps more of a text than keys and values of its tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self._inner = model, unwrapped(model)
        self._parameters = forward_parameters(model)
        _refuse_states(self._inner, self._parameters)
        self._cache = DynamicCache()
        config = getattr(self._inner, "config", None)
        # Those of "dynamic" move as well, and generate keeps what it has read.
        self._limits = [limit for kind, limit in moving_rotations(config) if kind == "longrope"]
        self._text: Tensor | None = None  # kept where it may have to be read anew

    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens ``[1, N]``; logits ``[V]`` of what follows them."""
        if self._limits:
            before = 0 if self._text is None else self._text.shape[1]
            self._text = tokens if self._text is None else torch.cat((self._text, tokens), dim=1)
            crossed = any(before <= limit < self._text.shape[1] for limit in self._limits)
            if before and crossed and self._is_read_anew(self._text):
                self._cache, tokens = DynamicCache(), self._text
        into = with_cache(self._parameters, self._cache)
        output = self.model(input_ids=tokens, **into, **one_logit(self._parameters))
        logits: Tensor = output.logits[0, -1]
        return logits

    def _is_read_anew(self, text: Tensor) -> bool:
        """Whether the model drops its cache here, the keys in it being turned by other frequencies.

        Phi-3 and Phi-MoE do, Llama does not; it is they who say so, where ``generate`` asks them.
        """
        inner: Any = self._inner
        ask = getattr(inner, "prepare_inputs_for_generation", None)
        if ask is None:
            return False
        into = with_cache(self._parameters, self._cache)
        prepared = ask(text, attention_mask=torch.ones_like(text), **into)
        return all(value is not self._cache for value in prepared.values())


def _refuse_states(model: nn.Module, parameters: tuple[str, ...]) -> None:
    name, instead = type(model).__name__, "decode it with model.generate"
    if not {"cache", "past_key_values"} & {*parameters}:
        raise UnsupportedModelError(
            f"{name}: found a forward that takes no cache of keys and values, allowed are those "
            f"with cache or past_key_values; {instead}"
        )
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    layers = DynamicCache(config=config).layers
    found = {type(layer).__name__ for layer in layers if type(layer) not in _KEPT}
    if found:
        raise UnsupportedModelError(
            f"{name}: found layers that keep a state or more than keys and values of a text "
            f"({', '.join(sorted(found))}), as those of hybrid and state-space models do; allowed "
            f"are layers of attention, full or within a window; {instead}"
        )
