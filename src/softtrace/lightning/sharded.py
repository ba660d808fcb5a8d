"""``softtrace fit`` on models in parts: how its module is sharded, and made whole again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softtrace.errors import InvalidInputError, TrainerSetupError
from softtrace.model.sharding import is_sharded
from softtrace.model.wrappers import unwrapped

_IN_FOLDERS = "save_distributed_checkpoint"


def check_checkpoints(strategy: Any) -> None:
    """Refuse checkpoints that ``softtrace fit`` could not resume from.

    Args:
        strategy: as the command line has it, a name or a class with its arguments.

    Raises:
        InvalidInputError: each process would write its part over the last one's.
    """
    if getattr(strategy, "init_args", {}).get(_IN_FOLDERS):
        raise InvalidInputError(
            f"trainer.strategy.{_IN_FOLDERS}: found true, which writes over the last checkpoint "
            "in place, so that a run that is killed meanwhile has none; set it to false: then a "
            "checkpoint is one file, whole or not there"
        )


def shard(model: Any, mesh: Any, precision: str) -> None:
    """Shard a model by ``fully_shard`` for Lightning's ModelParallelStrategy, in place.

    Every layer is a unit, and what is left (embedding, final norm, head) is one.

    Args:
        model: a causal language model of transformers, or PEFT's around one.
        mesh: of the strategy.
        precision: of the Trainer; under bf16-mixed units gather and compute in bfloat16.

    Raises:
        TrainerSetupError: tensor parallelism, or a model that does not name its layers.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    name = "strategy: ModelParallelStrategy"
    if mesh["tensor_parallel"].size() > 1:
        raise TrainerSetupError(
            f"{name} has tensor_parallel_size {mesh['tensor_parallel'].size()}; allowed is 1, with "
            "data_parallel_size the number of processes: weights split inside a matrix have no "
            "edge of their own"
        )
    kinds = set(getattr(unwrapped(model), "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise TrainerSetupError(f"{name}: {type(model).__name__} does not say what its layers are")
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = mixed if precision == "bf16-mixed" else MixedPrecisionPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=policy)
    fully_shard(model, mesh=mesh["data_parallel"], mp_policy=policy)


def whole_weights(model: Any) -> dict[str, Tensor] | None:
    """All weights of a model that is sharded, on the first process's CPU; all have to call this.

    Returns:
        None where the model is not sharded; nothing on the other processes.
    """
    if not is_sharded(model):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: Any = get_model_state_dict(model, options=whole)
    return dict(found)
