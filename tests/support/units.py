"""Ways to make units of a model's modules, by FSDP2 and by FSDP1 (those that are called flat)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def by_layer(model: Any, **policy: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, **policy)
    fully_shard(model, **policy)


def with_head_unit(model: Any) -> None:
    """As accelerate and torchtitan do it: the final norm and the head are one unit."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.model.embed_tokens)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    by_layer(model)


def with_output_dtype(model: Any, computes: torch.dtype, gives: torch.dtype) -> None:
    """Units compute in one dtype, and that of the final norm and the head gives another."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed = {"param_dtype": computes, "reduce_dtype": torch.float64}
    gives_other: Any = MixedPrecisionPolicy(**mixed, output_dtype=gives)
    fully_shard([model.model.norm, model.lm_head], mp_policy=gives_other)
    by_layer(model, mp_policy=MixedPrecisionPolicy(**mixed))


def with_resharded_head_unit(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard([model.model.norm, model.lm_head])
    by_layer(model)


def as_one(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def by_half_layer(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer.self_attn)
        fully_shard(layer.mlp)
    fully_shard(model.lm_head)
    fully_shard(model.model.norm)
    by_layer(model)


def with_base_unit(model: Any) -> None:
    """The final norm is in a unit that lets go, and the head in the root, which keeps it."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.model)
    fully_shard(model)


def with_head_alone(model: Any) -> None:
    """The other way round: the norm is in the root, and the head lets go."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.lm_head)
    by_layer(model)


def checkpointed(model: Any) -> None:
    """Layers that run again in the backward pass; the root is let go after its forward too."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    by_layer(model, reshard_after_forward=True)


def offloaded(model: Any) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    by_layer(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def flat(model: Any, *kinds: type[nn.Module], **options: Any) -> Any:
    """FSDP1 as Lightning has it: wrappers around the model and what is of these kinds."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    kinds = kinds or (type(model.model.layers[0]),)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy(kinds), use_orig_params=True,
        device_id=torch.device("cpu"), **options,
    )  # fmt: skip


def flat_as_one(model: Any) -> Any:
    return flat(model, nn.Conv3d)  # it has none


def flat_parts(model: Any) -> Any:
    """Units inside of layers, and the embedding."""
    layer = model.model.layers[0]
    return flat(model, *map(type, (layer, layer.self_attn, layer.mlp)), nn.Embedding)


def flat_checkpointed(model: Any) -> Any:
    """In the order that Lightning has: layers are wrapped, and what is inside checkpointed."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapping

    kind = type(model.model.layers[0])
    model = flat(model)
    wrapping.apply_activation_checkpointing(model, check_fn=lambda each: isinstance(each, kind))
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "by layer": by_layer,
    "norm and head": with_head_unit,
    "norm and head, let go": with_resharded_head_unit,
    "base model": with_base_unit,
    "head alone": with_head_alone,
    "as one": as_one,
    "by half layer": by_half_layer,
    "checkpointed": checkpointed,
    "offloaded": offloaded,
    "flat": flat,
    "flat, as one": flat_as_one,
    "flat, parts of layers": flat_parts,
    "flat, checkpointed": flat_checkpointed,
}
