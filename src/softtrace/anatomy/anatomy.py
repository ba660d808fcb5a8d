"""A causal language model taken apart: which module computes which edge, and what reads a node."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from transformers.pytorch_utils import Conv1D

from softtrace.anatomy.norms import LinearNorm
from softtrace.anatomy.readout import Readout
from softtrace.model.devices import device_of_module, weight_of, whole
from softtrace.model.sharding import is_in_zero, run_alone

Route = Literal["interface", "interception"]
"""How attention is reached: transformers' interface, or the softmax of the model's own code."""


@dataclass(frozen=True)
class LayerModules:
    """The modules of one decoder layer that a run listens to.

    Attributes:
        layer: reads the node that enters it, returns the node that leaves it.
        attention: asks for the attention function, or takes the softmax itself.
        projection: reads the mixed heads; ``W_O``.
        width: of what it reads, heads times head dimension.
        dtype: of what it reads.
        attention_out: its output, times ``attention_scale``, is what attention adds.
        attention_norm: a norm between the projection and the sum; None where there is none.
        attention_scale: residual multiplier of the attention sub-block.
        middle: read the after-attention node; none in a parallel layer, which has no such node.
        mlp_out: their outputs, summed and times ``mlp_scale``, are what the MLP adds.
        mlp_scale: residual multiplier of the MLP sub-block.
        token_wise: the MLP's modules that can run on a few tokens alone; may be empty.
        score_projections: what makes queries and keys and nothing else; may be empty.
    """

    layer: nn.Module
    attention: nn.Module
    projection: nn.Module
    width: int
    dtype: torch.dtype
    attention_out: nn.Module
    attention_norm: LinearNorm | None
    attention_scale: float
    middle: tuple[nn.Module, ...]
    mlp_out: tuple[nn.Module, ...]
    mlp_scale: float
    token_wise: tuple[nn.Module, ...] = ()
    score_projections: tuple[nn.Module, ...] = ()

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same node and add into the same node."""
        return not self.middle


@dataclass(frozen=True)
class Anatomy:
    """A model taken apart: the layers in order, what follows them, the sizes.

    Attributes:
        pattern: name of the residual layout (several, where layers differ).
        route: how attention is reached.
        layers: one entry a decoder layer.
        readout: from the last node to the logits.
        heads: query heads of every layer.
        vocabulary: rows of the embedding.
        positions: length of the longest sequence with learned positions; None where computed.
        looks_at_padding: whether real tokens see padding before them, whatever the mask says.
    """

    pattern: str
    route: Route
    layers: tuple[LayerModules, ...]
    readout: Readout
    heads: int
    vocabulary: int
    positions: int | None = None
    looks_at_padding: bool = False

    def output_weight(self, layer: int) -> Tensor:
        """Effective ``W_O`` of a layer, ``[H, d_head, d_model]``, before any norm or multiplier.

        With adapters it is the projection that the model applies: base weight and delta.
        """
        modules = self.layers[layer]
        matrix, _ = effective_projection(modules.projection, modules.width, modules.dtype)
        return matrix.reshape(self.heads, -1, matrix.shape[-1])

    def output_bias(self, layer: int) -> Tensor | None:
        """Bias of a layer's output projection, ``[d_model]``: a constant of the node, no edge."""
        modules = self.layers[layer]
        return effective_projection(modules.projection, modules.width, modules.dtype)[1]

    def carried_weight(self, layer: int) -> Tensor:
        """``[H, d_head, d_model]``: what a head's value becomes in the node, but for scalars.

        The norm after the projection is folded in, and in a last layer that is parallel the final
        norm too; the scales of both stay outside.
        """
        modules, weight = self.layers[layer], self.output_weight(layer)
        if modules.attention_norm is not None:
            weight = modules.attention_norm.linear(weight)
        if modules.parallel and layer == len(self.layers) - 1:
            weight = self.readout.norm.linear(weight)
        return weight


def effective_projection(
    projection: nn.Module, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Weight ``[width, d_out]`` and bias ``[d_out]`` of an affine module, as it applies them.

    Plain ``Linear`` and ``Conv1D`` store both. Anything else (adapters, parametrisations, quantised
    weights) is run on the identity matrix: whatever it multiplies with comes out, differentiable.

    Args:
        projection: the module.
        width: of what it reads.
        dtype: of what it reads, where its weight is packed and does not tell.
    """
    _remake(projection)
    bias, weight = weight_of(projection, "bias"), weight_of(projection, "weight")
    plain = type(weight) in (Tensor, nn.Parameter) and type(projection) in (nn.Linear, Conv1D)
    if isinstance(weight, Tensor) and plain:
        matrix = weight if type(projection) is Conv1D else weight.T
        return matrix, bias
    if isinstance(weight, Tensor) and weight.is_floating_point():
        dtype = weight.dtype
    device = device_of_module(projection)
    # A bias beside small weights would round them away; a power of two costs nothing.
    times = 64.0 if bias is not None else 1.0
    probe = _probe(width, dtype, device, times)
    # forward, not __call__: hooks of ours and of others listen to the model's own calls alone.
    if is_in_zero(projection):
        rows = run_alone(projection, probe)
    else:
        with whole(projection):
            rows = projection.forward(probe)
    return (rows[1:] - rows[0]) / times, rows[0]


def _remake(module: nn.Module) -> None:
    """Make the weights of a module anew that torch's pruning makes before each of its forwards.

    Until then the module holds those of the forward before, of other weights and another graph.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            hook(module, ())


@functools.cache
def _probe(width: int, dtype: torch.dtype, device: torch.device, times: float) -> Tensor:
    """A row of zeros, then ``times`` the identity: one tensor for all layers that need it.

    A backward pass keeps what every layer was run on; without sharing that would be a matrix each.
    It is kept for good, for CUDA graphs read it where it lies and hold nothing.
    """
    with torch.inference_mode(False):  # or no later backward could keep it
        eye = torch.eye(width, dtype=dtype, device=device) * times
        return torch.cat((eye.new_zeros(1, width), eye))
