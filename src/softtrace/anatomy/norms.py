"""Norms as linear maps: ``N(v) = scale(v) · linear(v) + bias``, with one scale a token.

Norms of a sub-block's output (OLMo 2, Gemma 2) and the final norm stand between an edge and its
node. The scale is computed from the full vector and multiplies every part alike; what is linear is
an elementwise weight, after centring for a LayerNorm. Which of the few known forms a module has is
found by running it, not by its class. Source: arXiv 2605.27033, section 3.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from softtrace.anatomy.refusals import NOT_MADE_FOR_IT
from softtrace.errors import UnsupportedModelError
from softtrace.graph.importance import working_dtype
from softtrace.model.devices import unhooked, weight_of, whole
from softtrace.model.sharding import own_weights

#: what is added to the stored weight before it multiplies; None: the norm has no weight
OFFSETS: tuple[float | None, ...] = (0.0, 1.0, None)


@dataclass(frozen=True)
class LinearNorm:
    """A norm that was found to be a scale a token times a fixed linear map.

    Attributes:
        module: the norm, or PEFT's wrapper around it; its weight is read anew at every use.
        centred: whether the mean over the last dimension is taken off (LayerNorm).
        weight: name of its weight parameter; None where there is none.
        offset: added to that weight (1 for Gemma's and Nemotron's norms).
    """

    module: nn.Module
    centred: bool
    weight: str | None
    offset: float

    def linear(self, part: Tensor) -> Tensor:
        """The norm without scale and bias, of a part of its input ``[..., d_model]``."""
        weight = None if self.weight is None else weight_of(applied(self.module), self.weight)
        return _linear(part, weight, self.centred, self.offset)

    def bias(self) -> Tensor | None:
        """What is added after the weight; None where the norm has none."""
        return weight_of(applied(self.module), "bias")

    def scale(self, full: Tensor, normed: Tensor) -> Tensor:
        """The scale of every token, ``[..., 1]``, from the norm's full input and output."""
        dtype = working_dtype(full.dtype)
        direction = self.linear(full.to(dtype))
        bias = self.bias()
        normed = normed.to(dtype)
        if bias is not None:
            normed = normed - bias.to(normed)
        return _fitted_scale(direction, normed)


def applied(module: nn.Module) -> nn.Module:
    """What PEFT's wrapper around a norm (``modules_to_save``, LN tuning) runs as it is set now.

    Of any other module itself. Which of its norms a wrapper runs is switched without a change of
    modules, so that the wrapper stands for the norm and is asked at every use.
    """
    inside, active = module._modules, vars(module).get("_active_adapter")
    base = inside.get("original_module", inside.get("base_layer"))
    if active is None or base is None:
        return module
    wrapper: Any = module
    if wrapper._disable_adapters or wrapper.merged_adapters:
        return base
    for name in [active] if isinstance(active, str) else active:
        for norms in inside.values():
            if isinstance(norms, nn.ModuleDict) and name in norms:
                return norms[name]
    return base


def _linear(part: Tensor, weight: Tensor | None, centred: bool, offset: float) -> Tensor:
    if centred:
        part = part - part.mean(-1, keepdim=True)
    return part if weight is None else part * (weight.to(part) + offset)


def _fitted_scale(direction: Tensor, normed: Tensor) -> Tensor:
    """Least squares; parts in the range of the norms seen here neither overflow nor vanish."""
    tiny = torch.finfo(direction.dtype).tiny
    unit = direction.abs().amax(-1, keepdim=True).detach().clamp_min(tiny)
    direction = direction / unit
    along = (normed * direction).sum(-1, keepdim=True)
    return along / direction.square().sum(-1, keepdim=True).clamp_min(tiny) / unit


def linear_norm(module: nn.Module, sample: Tensor, allowed: float) -> LinearNorm:
    """Find the form of a norm by running it on ``sample`` under a random weight.

    A random weight, because many forms agree where the weight is all ones or zeros, as it is in a
    model that was not trained.

    Args:
        module: a module of one tensor to another of the same shape.
        sample: ``[n, d_model]`` inputs.
        allowed: largest relative mismatch.

    Raises:
        UnsupportedModelError: no form fits.
    """
    width, inner = sample.shape[-1], applied(module)
    with whole(inner):
        vectors = {
            name: parameter.dtype
            for name, parameter in own_weights(inner).items()
            if parameter.shape == (width,)
        }
    weights = [name for name in vectors if name != "bias"]
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: (torch.rand(width, generator=generator, device="cpu") + 0.5).to(sample.device, dtype)
        for name, dtype in vectors.items()
    }
    try:
        # Some insist on [B, T, d].
        normed = functional_call(unhooked(inner), drawn, (sample[None],))
    except NOT_MADE_FOR_IT as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not run on single vectors, so it is no norm: {error}"
        ) from error
    if not isinstance(normed, Tensor) or normed.shape != (1, *sample.shape):
        raise UnsupportedModelError(f"{type(module).__name__} is no norm of its input's shape")
    normed = normed[0]
    dtype = working_dtype(sample.dtype)
    full, normed = sample.to(dtype), normed.to(dtype)
    if "bias" in drawn:
        normed = normed - drawn["bias"].to(dtype)
    errors: list[float] = []
    fits: list[tuple[float, LinearNorm]] = []
    for centred, offset in itertools.product((False, True), OFFSETS):
        name = None if offset is None else (weights[0] if len(weights) == 1 else None)
        if (offset is None) != (name is None) or (offset is None and weights):
            continue
        direction = _linear(full, None if name is None else drawn[name], centred, offset or 0.0)
        off = (_fitted_scale(direction, normed) * direction - normed).abs()
        errors.append(float(off.max()) / max(float(normed.abs().max()), 1e-30))
        if errors[-1] <= allowed:
            # Beside an activation that is a hundred times larger than all others every form fits in
            # bfloat16; what decides is how far a usual element is off, of its own magnitude.
            usual = float((off / normed.abs().clamp_min(1e-30)).median())
            fits.append((usual, LinearNorm(module, centred, name, offset or 0.0)))
    if fits:
        return min(fits, key=lambda fit: fit[0])[1]
    found = f"mismatch {min(errors):.2g}, allowed {allowed:.0e}" if errors else "several weights"
    raise UnsupportedModelError(
        f"{type(module).__name__} is not a scale a token times weight · input ({found})"
    )
