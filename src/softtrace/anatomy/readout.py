"""From the last node to the logits: final norm, head, and what some families do around the head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import linear

from softtrace.anatomy.norms import LinearNorm, linear_norm
from softtrace.anatomy.tolerances import mismatch
from softtrace.anatomy.watch import Call
from softtrace.errors import UnsupportedModelError
from softtrace.model.flat_units import bare
from softtrace.model.hooks import watched
from softtrace.model.sharding import is_in_zero, is_unit, run_alone, unit_of, within_units


class LogitMap(NamedTuple):
    """What a family does to the head's output, by the config field that switches it on."""

    field: str
    apply: Callable[[Tensor, float], Tensor]


#: Cohere multiplies, Granite divides, Gemma 2 caps.
LOGIT_MAPS: tuple[LogitMap, ...] = (
    LogitMap("logit_scale", lambda logits, value: logits * value),
    LogitMap("lm_head_multiplier", lambda logits, value: logits * value),
    LogitMap("logits_scaling", lambda logits, value: logits / value),
    LogitMap("final_logit_softcapping", lambda logits, value: value * (logits / value).tanh()),
    LogitMap("logits_soft_cap", lambda logits, value: value * (logits / value).tanh()),
)

_PLAIN = LogitMap("", lambda logits, value: logits)


@dataclass(frozen=True)
class Readout:
    """How a last node becomes logits.

    Attributes:
        norm: the final norm.
        before: multiplies what the norm gives before the head reads it (MiniCPM 3).
        head: the language-model head.
        after: what is done to the head's output.
        value: of the config field that ``after`` names.
        predicted: V, how many tokens get a logit; the embedding may have other rows.
    """

    norm: LinearNorm
    before: float
    head: nn.Module
    after: LogitMap
    value: float
    predicted: int

    def logits(self, normed: Tensor) -> Tensor:
        """``[..., d_model]`` as the final norm gives it to ``[..., V]``."""
        return within_units([self.head], self._logits)(normed).to(normed.device)

    def early(self, hidden: Tensor) -> Tensor:
        """Logits of an exit: a residual stream ``[..., d_model]`` read as if it were the last."""
        read = within_units([self.norm.module, self.head], self._early)(hidden)
        return read.to(hidden.device)

    def early_of(self, hidden: Tensor, tokens: Tensor) -> Tensor | None:
        """Logits of an exit for some tokens ``[m]`` alone, ``[..., m]``, at a share of the cost.

        None where the head is not a matrix whose rows lie there, or somebody listens to it.
        """
        head, held = self.head, unit_of(self.head) is None and not watched(self.head)
        if not held or type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
            return None
        read = self._scaled(_run(self.norm.module, hidden))
        bias = None if head.bias is None else head.bias[tokens]
        return self.after.apply(linear(read, head.weight[tokens], bias), self.value)

    def _scaled(self, normed: Tensor) -> Tensor:
        return normed if self.before == 1 else normed * self.before

    def _logits(self, normed: Tensor) -> Tensor:
        logits: Tensor = _run(self.head, self._scaled(normed))
        return self.after.apply(logits, self.value)

    def _early(self, hidden: Tensor) -> Tensor:
        return self._logits(_run(self.norm.module, hidden))


def _run(module: nn.Module, value: Tensor) -> Tensor:
    """What a module gives; of one that is sharded by itself without the hooks that gather it."""
    if is_in_zero(module):
        apart: Tensor = run_alone(module, value)
        return apart
    found: Tensor = module.forward(value) if is_unit(module) else module(value)
    return found


def find_readout(
    model: nn.Module, calls: list[Call], last: Tensor, logits: Tensor, valid: Tensor, allowed: float
) -> Readout:
    """Find the final norm and what surrounds the head.

    Args:
        model: the causal language model.
        calls: of modules outside the layers, after the last layer.
        last: ``[B, T, d_model]``, what the last layer gave.
        logits: ``[B, T, V]``, the model's own.
        valid: ``[B, T]`` bool.
        allowed: largest relative mismatch.

    Raises:
        UnsupportedModelError: no head, no final norm, or logits that are not a known function.
    """
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head; load it with "
            "AutoModelForCausalLM, not AutoModel"
        )
    head = bare(head)
    at_head = [call for call in calls if call.module is head]
    if len(at_head) != 1 or at_head[0].read is None or at_head[0].gave is None:
        raise UnsupportedModelError(
            f"the language-model head ran {len(at_head)} times in one forward; it has to run once"
        )
    read, raw = at_head[0].read, at_head[0].gave
    norms = [
        call
        for call in sorted(calls, key=lambda each: each.begin)  # PEFT's wrapper before its norms
        if call.reads(last, valid) and call.gave is not None and call.module is not head
    ]
    if not norms:
        raise UnsupportedModelError(
            "no module outside the layers reads what the last layer gives, so there is no final "
            "norm to linearise"
        )
    for call in norms:
        for before in (1.0, *_scalars(model)):
            if call.gave is not None and call.gave.shape == read.shape:
                error = mismatch(call.gave[valid] * before, read[valid])
                if error <= allowed:
                    norm = _final(call.module, last[valid], allowed)
                    after, value = _map(model, raw, logits, valid, allowed)
                    return Readout(norm, before, head, after, value, logits.shape[-1])
    raise UnsupportedModelError(
        "what the language-model head reads is not the final norm's output (a projection or "
        "another block stands between)"
    )


def _final(module: nn.Module, sample: Tensor, allowed: float) -> LinearNorm:
    try:
        return linear_norm(module, sample, allowed)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"the final norm: {error}") from error


def _map(
    model: nn.Module, raw: Tensor, logits: Tensor, valid: Tensor, allowed: float
) -> tuple[LogitMap, float]:
    if raw.shape != logits.shape:
        raise UnsupportedModelError(
            f"the head gives {tuple(raw.shape)}, the logits are {tuple(logits.shape)}; a part of "
            "them is cut off or added"
        )
    raw, logits = raw[valid], logits[valid]
    found = [(mismatch(raw, logits), _PLAIN, 1.0)]
    for candidate in LOGIT_MAPS:
        for owner in (*_configs(model), model):
            value = getattr(owner, candidate.field, None)
            if isinstance(value, float | int) and value:
                given = candidate.apply(raw.float() if raw.itemsize < 4 else raw, float(value))
                found.append((mismatch(given, logits), candidate, float(value)))
    # In half precision a cap far above small logits is within what is allowed: the nearest counts.
    error, after, value = min(found, key=lambda each: each[0])
    if error <= allowed:
        return after, value
    raise UnsupportedModelError(
        "the logits are not the head's output, nor that scaled or capped as the config says "
        f"(known fields: {', '.join(each.field for each in LOGIT_MAPS)})"
    )


def _configs(model: nn.Module) -> Iterator[object]:
    config = getattr(model, "config", None)
    if config is not None:
        yield config
        text = config.get_text_config()
        if text is not config:
            yield text


def _scalars(model: nn.Module) -> list[float]:
    """Numbers that a family may multiply with before the head, and their inverses."""
    found = []
    for config in _configs(model):
        width, base = getattr(config, "hidden_size", 0), getattr(config, "dim_model_base", 0)
        if width and base:
            found.append(base / width)
        value = getattr(config, "output_multiplier", None)
        if isinstance(value, float | int) and value and math.isfinite(value):
            found += [float(value), 1 / value]
    return found
