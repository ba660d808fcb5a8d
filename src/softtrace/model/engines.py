"""Engines that train one model on several devices: a table that the tests walk, row by row.

An engine is supported where the term, its gradients and the weights were shown to be those of one
process; others are refused by name, before anything runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from softtrace.model.flat_units import is_flat_unit, is_flattened
from softtrace.model.sharding import is_part, is_sharded, unit_of
from softtrace.model.zero_units import is_leaf, is_zero_weight


@dataclass(frozen=True)
class Engine:
    """One row.

    Attributes:
        name: of the engine.
        refused: why it is; None where it is supported.
        note: what has to be minded there.
    """

    name: str
    refused: str | None = None
    note: str | None = None


_SPLIT = "an edge's importance reads weights and tokens whole, which it splits"

ENGINES: tuple[Engine, ...] = (
    Engine("one process"),
    Engine("DDP"),
    Engine(
        "FSDP2",
        note="fully_shard on layers, then on the model itself; all processes take the same steps, "
        "and measure together, each what is its own",
    ),
    Engine("offloading by Accelerate", note="device_map, cpu_offload, disk_offload"),
    Engine("device_map", note="layers on several devices, each layer whole on one"),
    Engine(
        "FSDP1",
        note="FullyShardedDataParallel with use_orig_params=True around the model, its layers "
        "wrapped by auto_wrap_policy; all processes take the same steps, and measure together",
    ),
    Engine(
        "FSDP1 without use_orig_params",
        "weights are no tensors of their own there, so no projection can be read; pass "
        "use_orig_params=True, as Lightning does",
    ),
    Engine("DeepSpeed ZeRO 1 and 2", note="in both Trainers; weights are whole there"),
    Engine(
        "DeepSpeed ZeRO 3",
        note="in both Trainers; all processes take the same steps, and measure together, each what "
        "is its own",
    ),
    Engine(
        "DeepSpeed ZeRO 3 with leaf modules",
        "it reduces gradients of a leaf module after each of its backward passes and allows one a "
        "step, and the term runs modules several times; set zero_optimization.leaf_module.classes "
        "to [] in its configuration, where blocks of experts are leaves, and mark no others",
    ),
    Engine(
        "TP",
        f"tensor parallelism: {_SPLIT}. If it is fully_shard on a module around the model alone, "
        "call it on layers and then on the model",
    ),
    Engine("CP", f"context parallelism: {_SPLIT}"),
    Engine("SP", f"sequence parallelism: {_SPLIT}"),
    Engine("DataParallel", "several GPUs in one process; start one process a GPU by torchrun"),
)


def engine(name: str) -> Engine:
    """The row of that name."""
    return next(each for each in ENGINES if each.name == name)


def supported() -> str:
    """Names of the engines that are supported, for errors."""
    return ", ".join(each.name for each in ENGINES if each.refused is None)


def engine_around(model: nn.Module) -> Engine | None:
    """The engine that is refused and was put around a model, or into it; None without one."""
    around: Any = unit_of(model)
    for module in (*model.modules(), *([] if around is None else [around])):
        if is_flat_unit(module) and not module._use_orig_params:
            return engine("FSDP1 without use_orig_params")
        if isinstance(module, nn.DataParallel):
            return engine("DataParallel")
        if is_leaf(module):
            return engine("DeepSpeed ZeRO 3 with leaf modules")
    parameters = list(model.parameters())
    in_parts = any(map(is_part, parameters)) and not is_sharded(model)
    others = any(is_flattened(each) or is_zero_weight(each) for each in parameters)
    return engine("TP") if in_parts and not others else None
