"""``softtrace fit`` on models in parts: how its module is sharded, and made whole again."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn

from softtrace.errors import InvalidInputError, TrainerSetupError
from softtrace.model.flat_units import is_flat_unit
from softtrace.model.sharding import is_sharded
from softtrace.model.wrappers import unwrapped
from softtrace.model.zero_units import is_zero_weight, whole_state

#: option of a strategy, and the value with which each process writes its part
_IN_FOLDERS = {
    "save_distributed_checkpoint": (True, "false"),
    "state_dict_type": ("sharded", "full"),
}


#: names of strategies that Lightning registers for DeepSpeed and ``softtrace fit`` runs
_ZERO = ("deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")

#: options of DeepSpeedStrategy that ``softtrace fit`` does not take, and why
_NOT_OF_ZERO = {
    "offload_optimizer": "it brings an optimiser of its own, and was run on no GPU, without which "
    "nothing is offloaded",
    "offload_parameters": "it was run on no GPU, without which nothing is offloaded",
    "load_full_weights": "it resumes without the optimiser's state",
    "exclude_frozen_parameters": "a checkpoint without frozen weights was not run",
}

#: values of ``device`` with which DeepSpeed offloads nothing
_NONE = (None, "none")

_FLAT_LORA = (
    "FSDPStrategy flattens a layer's frozen weights and its adapters into one tensor, with "
    "gradients for all of it; allowed with LoRA is ModelParallelStrategy"
)
_TP = "weights split inside of a matrix have no edge of their own"


def check_sharding(strategy: Any, *, lora: bool = False) -> None:
    """Refuse a strategy that there is not, that splits matrices, or keeps no model or checkpoint.

    Args:
        strategy: as the command line has it, a name or a class with its arguments.
        lora: whether adapters are trained.

    Raises:
        InvalidInputError: nobody knows it, its engine is not installed, it is tensor parallelism
            or FSDP1 in a way that cannot be right, it gives no model back, or an option of it makes
            each process write its part over the last checkpoint's.
    """
    name = str(getattr(strategy, "class_path", strategy))
    options = {**getattr(strategy, "init_args", {}), **getattr(strategy, "dict_kwargs", {})}
    known = ("auto", *StrategyRegistry.available_strategies())
    if "." not in name and not hasattr(strategy, "class_path") and name not in known:
        raise InvalidInputError(
            f"trainer.strategy: found {name}, invalid strategy name; allowed are "
            f"{', '.join(known)}, and the path of a class"
        )
    usual = StrategyRegistry[name]["init_params"] if name in StrategyRegistry else {}
    if (start := {**usual, **options}.get("start_method", "popen")) != "popen":
        raise InvalidInputError(
            f"trainer.strategy: found {name}, whose processes start by {start} and end with the "
            "training, and with them what was learned; allowed is ddp"
        )
    if "deepspeed" in name.lower():
        _check_zero(name, options)
    if name.startswith("fsdp") or name.rpartition(".")[2] == "FSDPStrategy":
        _check_flat(name, options, lora)
    if name.rpartition(".")[2] == "ModelParallelStrategy":
        _check_tensor_parallel(options.get("tensor_parallel_size", "auto"))
    for option, (found, instead) in _IN_FOLDERS.items():
        if options.get(option) == found:
            said = str(found).lower()
            raise InvalidInputError(
                f"trainer.strategy.{option}: found {said}, which writes over the last checkpoint "
                "in place, so that a run that is killed meanwhile has none; set it to "
                f"{instead}: then a checkpoint is one file, whole or not there"
            )


def _check_flat(name: str, options: Any, lora: bool) -> None:
    if lora:
        raise InvalidInputError(f"trainer.strategy: found {name} with lora: {_FLAT_LORA}")
    if options.get("use_orig_params") is False:
        raise InvalidInputError(
            "trainer.strategy.use_orig_params: found false, allowed is true (Lightning's own): "
            "without it weights have no names to be read by"
        )
    if name == "fsdp_cpu_offload" or options.get("cpu_offload"):
        raise InvalidInputError(
            f"trainer.strategy: found {name} with offloading, which was run on no GPU; allowed is "
            "fsdp, or ModelParallelStrategy (FSDP2)"
        )


def _check_tensor_parallel(found: object) -> None:
    if found == 1:
        return
    many = " (Lightning's own, which is all devices of a host)" if found == "auto" else ""
    raise InvalidInputError(
        f"trainer.strategy.tensor_parallel_size: found {found}{many}, allowed is 1, with "
        f"data_parallel_size the number of processes: {_TP}"
    )


def _check_zero(name: str, options: Any) -> None:
    instead = (
        "use lightning.pytorch.strategies.ModelParallelStrategy (FSDP2), which needs nothing more"
    )
    if "." not in name and name not in _ZERO:
        raise InvalidInputError(
            f"trainer.strategy: found {name}, which offloads, which was run on no GPU; allowed of "
            f"DeepSpeed are {', '.join(_ZERO)}"
        )
    for option, why in _NOT_OF_ZERO.items():
        if options.get(option):
            raise InvalidInputError(
                f"trainer.strategy.{option}: found {options.get(option)}, allowed is false: {why}"
            )
    config = options.get("config")
    if config is None:  # Lightning takes it from there
        config = os.environ.get(DeepSpeedStrategy.DEEPSPEED_ENV_VAR)
    if offloaded := _offloaded(config):
        raise InvalidInputError(
            f"trainer.strategy.config.zero_optimization: found {offloaded}, allowed is none: "
            f"{_NOT_OF_ZERO['offload_parameters']}"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise InvalidInputError(
            f"trainer.strategy: found {name}, and DeepSpeed is not installed here; run pip install "
            f"deepspeed, or {instead}"
        )


def _offloaded(config: Any) -> str:
    """What DeepSpeed's own configuration, or a file of it, offloads."""
    if isinstance(config, (str, os.PathLike)):
        config = _read_config(Path(config))
    zero = _table(_table(config).get("zero_optimization"))
    asked = ("offload_optimizer", "offload_param")
    return ", ".join(name for name in asked if _table(zero.get(name)).get("device") not in _NONE)


def _read_config(path: Path) -> dict[str, Any]:
    """A configuration file of DeepSpeed, which Lightning would read once a model is loaded."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # not there, a folder, no text, no JSON
        found = error
    if not isinstance(found, dict):
        seen = found if isinstance(found, Exception) else f"a {type(found).__name__}"
        raise InvalidInputError(
            f"trainer.strategy.config: found {path}, which cannot be read as a configuration of "
            f"DeepSpeed ({seen}); allowed is a file with one JSON object; correct the path or the "
            "file, or give the options of lightning's DeepSpeedStrategy instead"
        )
    return found


def _table(found: Any) -> dict[str, Any]:
    """What DeepSpeed reads as a table; other values are its own to refuse."""
    return found if isinstance(found, dict) else {}


def say_batch_size(strategy: object, batch_size: int) -> None:
    """Tell DeepSpeed how many rows a process has in a batch; Lightning looks for a sampler."""
    if isinstance(strategy, DeepSpeedStrategy) and isinstance(strategy.config, dict):
        strategy.config.setdefault("train_micro_batch_size_per_gpu", batch_size)


def shard(model: Any, strategy: Any, precision: str) -> None:
    """Shard a model for Lightning's ModelParallelStrategy, in place, or say how for FSDPStrategy.

    Every layer is a unit, and what is left (embedding, final norm, head) is one. Of other
    strategies nothing happens.

    Args:
        model: a causal language model of transformers, or PEFT's around one.
        strategy: of the Trainer, before it is set up.
        precision: of the Trainer; under bf16-mixed units gather and compute in bfloat16.

    Raises:
        TrainerSetupError: tensor parallelism, LoRA under FSDPStrategy, or a model that does not
            name its layers.
    """
    if isinstance(strategy, FSDPStrategy) and "auto_wrap_policy" not in strategy.kwargs:
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        if not all(weight.requires_grad for weight in model.parameters()):
            raise TrainerSetupError(f"strategy: {_FLAT_LORA}")
        kinds = {type(each) for each in _layers(model, "FSDPStrategy")}
        strategy.kwargs["auto_wrap_policy"] = ModuleWrapPolicy(kinds)
    elif isinstance(strategy, ModelParallelStrategy) and not is_sharded(model):
        _shard(model, strategy.device_mesh, precision)


def _layers(model: Any, strategy: str) -> list[nn.Module]:
    kinds = set(getattr(unwrapped(model), "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        name = type(model).__name__
        raise TrainerSetupError(f"strategy: {strategy}: {name} does not say what its layers are")
    return layers


def _shard(model: Any, mesh: Any, precision: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    name = "strategy: ModelParallelStrategy"
    if mesh["tensor_parallel"].size() > 1:
        raise TrainerSetupError(
            f"{name} has tensor_parallel_size {mesh['tensor_parallel'].size()}; allowed is 1, with "
            f"data_parallel_size the number of processes: {_TP}"
        )
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = mixed if precision == "bf16-mixed" else MixedPrecisionPolicy()
    for layer in _layers(model, "ModelParallelStrategy"):
        fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=policy)
    fully_shard(model, mesh=mesh["data_parallel"], mp_policy=policy)


def whole_weights(model: Any, strategy: Strategy) -> dict[str, Tensor] | None:
    """All weights of a model that is sharded, on the first process's CPU; all have to call this.

    Args:
        model: that was trained.
        strategy: of its trainer. What it made of the module that holds the model is what FSDP1
            gathers.

    Returns:
        None where the model is not sharded; nothing on the other processes.
    """
    found = _gathered(model, strategy.model)
    # NCCL has only queued the part of this process; where it ends now, what is left never comes.
    strategy.barrier()
    return found


def _gathered(model: Any, around: Any) -> dict[str, Tensor] | None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if any(map(is_zero_weight, model.parameters())):
        return whole_state(model, around.module)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if is_flat_unit(around):
        inside = next(name for name, each in around.named_modules() if each is model)
        prefix = inside.replace("_fsdp_wrapped_module.", "") + "."
        flat: Any = around
        whole.cpu_offload = flat.compute_device.type != "cpu"  # from CPU to CPU it crashes
        weights: Any = get_model_state_dict(around, options=whole)
        return {name.removeprefix(prefix): each for name, each in weights.items()}
    if not is_sharded(model):
        return None
    found: Any = get_model_state_dict(model, options=whole)
    return dict(found)
