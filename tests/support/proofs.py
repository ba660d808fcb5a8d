"""Proofs that are made once: most of what it takes to attach to a tiny model is its proof.

For tests of what is done with an attached model (``tests/conftest.py``): those of attaching itself
prove every one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.graph.batch import Batch
from softtrace.tracing.runner import Runner
from softtrace.tracing.verification import Verification

Prove = Callable[[Runner, Batch, Tensor], Verification]

_FOUND: dict[str, Verification] = {}


def once(prove: Prove) -> Prove:
    """``prove``, but for models that are equal to one that it was called with: found is found.

    Equal are modules, configs, weights to the bit, how they were taken apart, and what they say. A
    model with hooks, or with a forward of its own, is none of those.
    """

    def proven(runner: Runner, batch: Batch, plain: Tensor) -> Verification:
        known = _fingerprint(runner, plain)
        if known is None:
            return prove(runner, batch, plain)
        if known not in _FOUND:
            _FOUND[known] = prove(runner, batch, plain)
        return _FOUND[known]

    return proven


def _fingerprint(runner: Runner, plain: Tensor) -> str | None:
    """Of everything that a proof depends on; None where that cannot be said."""
    digest = hashlib.sha256()
    for module in runner.model.modules():
        own = vars(module)
        if "forward" in own or module._forward_hooks or module._forward_pre_hooks:
            return None
        digest.update(repr((id(type(module)), sorted(_plain_values(own)))).encode())
    tensors = dict(runner.model.state_dict(keep_vars=True))
    if any(type(each) not in (nn.Parameter, Tensor) or each.is_meta for each in tensors.values()):
        return None
    for name, tensor in [*tensors.items(), ("", plain)]:
        digest.update(repr((name, tensor.dtype, tensor.shape, tensor.device)).encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    layers = [(each.parallel, len(each.score_projections)) for each in runner.anatomy.layers]
    configs = [repr(config) for config in runner.configs]
    digest.update(repr((runner.anatomy.pattern, layers, configs)).encode())
    return digest.hexdigest()


def _plain_values(own: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in own.items():
        if name != "training" and isinstance(value, (int, float, str, tuple, type(None))):
            yield name, repr(value)
