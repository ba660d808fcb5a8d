"""Engines that train one model on several devices: a table that the tests walk, row by row.

An engine is supported where the term, its gradients and the weights were shown to be those of one
process; others are refused by name, before anything runs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from softtrace.model.sharding import is_part, is_unit


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
_UNTESTED = "it was never tested"

ENGINES: tuple[Engine, ...] = (
    Engine("one process"),
    Engine("DDP"),
    Engine(
        "FSDP2",
        note="fully_shard on layers, then on the model itself; all processes take the same steps",
    ),
    Engine("offloading by Accelerate", note="device_map, cpu_offload, disk_offload"),
    Engine("device_map", note="layers on several devices, each layer whole on one"),
    Engine(
        "FSDP1",
        "it gathers weights for the model's own forward alone, and exits and masked predictions "
        "read the head outside of it; FSDP2 is supported",
    ),
    Engine("DeepSpeed ZeRO 1 and 2", note="in transformers' Trainer; weights are whole there"),
    Engine("DeepSpeed ZeRO 3", f"it shards weights, and {_UNTESTED}; FSDP2 is supported"),
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


def engine_around(model: nn.Module) -> Engine | None:
    """The engine that is refused and was put around a model, or into it; None without one."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            return engine("FSDP1")
        if isinstance(module, nn.DataParallel):
            return engine("DataParallel")
    parameters = list(model.parameters())
    if any(hasattr(each, "ds_id") for each in parameters):  # ZeRO 3 keeps parts of weights alone
        return engine("DeepSpeed ZeRO 3")
    in_parts = any(map(is_part, parameters)) and not any(map(is_unit, model.modules()))
    return engine("TP") if in_parts else None
