"""Weights that DeepSpeed's ZeRO 3 keeps in parts: each module gathers its own for its own forward.

It lets go of them after that, and gathers them again for the backward pass of what the module gave,
by hooks on every module. A weight that is read elsewhere is gathered here and copied; the module
that ``deepspeed.initialize`` was given, the root, knows what is on its way. Nothing is imported of
DeepSpeed: what it made of a model is told by the attributes that it put there.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from softtrace.model.state import all_modules


def is_zero_root(module: nn.Module) -> bool:
    """Whether this module was given to ``deepspeed.initialize`` at stage 3."""
    return "ds_inflight_param_registry" in vars(module)


def gathers_itself(module: nn.Module) -> bool:
    """Whether hooks of ZeRO 3 gather the module's own weights, if it has any."""
    return "ds_id" in getattr(module, "__dict__", ())


def is_leaf(module: nn.Module) -> bool:
    """Whether ZeRO 3 was told to gather the module and all inside it as one."""
    return bool(vars(module).get("_z3_leaf", False))


def is_zero_weight(weight: object) -> bool:
    """Whether ZeRO 3 keeps this weight in parts, be it whole at this moment or not."""
    return hasattr(weight, "ds_id")


def is_let_go(weight: object) -> bool:
    """Whether it is one that is not whole at this moment."""
    return is_zero_weight(weight) and _status(weight) != "AVAILABLE"


def size_of(weight: Tensor) -> int:
    """How many numbers a weight has when it is whole."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def _status(weight: Any) -> str:
    name: str = weight.ds_status.name
    return name


def gather(module: nn.Module, root: Any) -> list[Any]:
    """Make weights of a module and of those in it whole; all processes have to come here.

    Args:
        module: whose weights.
        root: of the model.

    Returns:
        Weights that were not whole and not on their way: to be given to :func:`let_go_of`.
    """
    return _gather(module.parameters(), root)


def _gather(of: Iterable[Any], root: Any) -> list[Any]:
    weights = {id(each): each for each in of if is_let_go(each)}
    ahead = root.ds_inflight_param_registry
    for weight in weights.values():
        if weight in ahead:  # fetched early for the model's own forward, which lets go of it
            ahead.pop(weight).wait()
    missing: list[Any] = [each for each in weights.values() if is_let_go(each)]
    if missing:
        missing[0].all_gather(param_list=missing)
    return missing


def let_go_of(weights: Iterable[Any]) -> None:
    """Keep parts alone of weights that :func:`gather` gave, unless a forward of theirs has them."""
    whole = [each for each in weights if not is_let_go(each) and not each.ds_active_sub_modules]
    if whole:
        whole[0].partition(param_list=whole)


def whole_state(model: nn.Module, root: Any) -> dict[str, Tensor]:
    """All that a model's state holds, on the first process's CPU; all processes have to come here.

    One weight at a time is whole on the device.

    Args:
        model: in the root, or the root itself.
        root: that ``deepspeed.initialize`` was given.

    Returns:
        Nothing on the other processes. Weights that are tied are one tensor.
    """
    found: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    first = distributed.get_rank() == 0
    for name, weight in model.state_dict(keep_vars=True).items():
        gathered = _gather([weight], root)
        if first:
            if id(weight) not in copies:
                copies[id(weight)] = weight.detach().to("cpu", copy=True)
            found[name] = copies[id(weight)]
        let_go_of(gathered)
    return found


def copied(weight: Tensor) -> Tensor:
    """A copy of a weight that is whole, which stays when the weight is let go of."""
    if not weight.requires_grad or not torch.is_grad_enabled():
        return weight.detach().clone()
    found: Tensor = _Copied.apply(weight)  # type: ignore[no-untyped-call]
    return found


class _Copied(torch.autograd.Function):
    """A clone whose gradient finds a weight of the right shape, also after it was let go of."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        weight = ctx.weight
        if is_let_go(weight) and weight.shape != weight.ds_shape:
            # Autograd lays the gradient out as the weight. This takes the memory of one number.
            weight.data = weight.data.new_zeros(()).expand(weight.ds_shape)
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(_empty_again, weight))
        return gradient


def _empty_again(weight: Any) -> None:
    if is_let_go(weight) and weight.numel():
        weight.data = weight.data.new_empty(0)


def apart(module: nn.Module) -> nn.Module:
    """A copy of a module whose weights are whole now, that nothing gathers: for its forward alone.

    Where gradients are taken its weights are copies too, through which gradients reach the own.
    """
    bare = copy.copy(module)
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    weights: dict[str, Any] = {
        name: weight if weight is None or not torch.is_grad_enabled() else copied(weight)
        for name, weight in module._parameters.items()
    }
    bare._parameters = weights
    bare._modules = {
        name: None if inner is None else apart(inner) for name, inner in module._modules.items()
    }
    return bare


@contextmanager
def beside_other_forwards(model: nn.Module) -> Iterator[None]:
    """A forward between another one and its backward pass: each still lets go of its own weights.

    ZeRO 3 counts on a module how many gradients of its inputs are to come, and lets go of its
    weights at the last. A later forward counts anew. So before it the count is noted, and put back
    in the backward pass where it is through with the module, or at once where there will be none.
    Without this all weights are whole at the end of a backward pass through several forwards.
    """
    handles: list[RemovableHandle] = []
    counts: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        count = vars(module).get("ds_grads_remaining", 0)
        coming = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
        if not coming or not torch.is_grad_enabled():
            counts.setdefault(module, count)
            return None
        call = _Call(module, count, len(coming))
        wrapped = {id(each): _PutBack.apply(each, call) for each in coming}  # type: ignore[no-untyped-call]
        return tuple(wrapped.get(id(each), each) for each in args)

    try:
        for module in all_modules(model):
            if any(map(is_zero_weight, module._parameters.values())):
                handles += [module.register_forward_pre_hook(note, prepend=True)]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, count in counts.items():
            vars(module)["ds_grads_remaining"] = count


@dataclass
class _Call:
    """A module, what it had counted before this call of it, and what it counts in it."""

    module: nn.Module
    before: int
    coming: int

    def came(self) -> None:
        """One of the gradients came."""
        self.coming -= 1
        if not self.coming:
            vars(self.module)["ds_grads_remaining"] = self.before


class _PutBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.call.came()
        return gradient, None
