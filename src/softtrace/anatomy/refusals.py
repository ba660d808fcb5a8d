"""What can be said of a model before anything runs: the reasons to refuse it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from softtrace.errors import SofttraceError, UnsupportedModelError
from softtrace.libraries import first_line
from softtrace.model.devices import unplaced
from softtrace.model.engines import engine_around, supported
from softtrace.model.flat_units import is_flat_unit, is_flattened, is_outermost
from softtrace.model.sharding import is_in_parts, is_in_zero, is_part, unit_of
from softtrace.model.zero_units import is_zero_weight

#: what a forward that wants other inputs raises; other errors pass through
NOT_MADE_FOR_IT = (
    TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, StopIteration,
)  # fmt: skip


@contextmanager
def running(what: str) -> Iterator[None]:
    """Turn what a forward raises when it is not made for a batch of token ids into a refusal.

    Args:
        what: the sentence that the error completes.
    """
    try:
        yield
    except (SofttraceError, torch.OutOfMemoryError):
        raise
    except NOT_MADE_FOR_IT as error:
        if isinstance(error, torch.AcceleratorError) or "DefaultCPUAllocator" in str(error):
            raise  # the machine's failure, not the model's
        raise UnsupportedModelError(
            f"{what}: {type(error).__name__}: {first_line(error)}"
        ) from error


def refuse_units(layers: Sequence[nn.Module], readout: Sequence[nn.Module]) -> None:
    """Refuse units that no backward pass of ours can gather; after a forward.

    Args:
        layers: of the decoder.
        readout: the final norm and the head.

    Raises:
        UnsupportedModelError: layers lie in one unit with them, and it lets go of them by then; or
            FSDP1 wrapped them apart.
    """
    units = [unit_of(each) for each in layers]
    for module in readout:
        unit, name = unit_of(module), type(module).__name__
        if is_in_zero(module):
            continue
        if not is_flat_unit(unit):
            if is_in_parts(module) and any(unit is each for each in units):
                raise UnsupportedModelError(
                    f"one unit of fully_shard holds layers and the {name} behind them, and lets go "
                    "of them after its forward. Call fully_shard on every layer first, or leave "
                    "reshard_after_forward of the outermost unit as it is"
                )
        elif not is_outermost(unit):
            raise UnsupportedModelError(
                f"FSDP1: the {name} behind the layers is in a wrapper of its own, and maps of "
                "exits are learned by a backward pass of their own, which FSDP1 allows inside the "
                "outermost wrapper alone. Let auto_wrap_policy wrap layers only, or use FSDP2"
            )


def refuse_engine(model: nn.Module) -> None:
    """Refuse a model in the hands of an engine that is not supported.

    Raises:
        UnsupportedModelError: which it is, why, and which are supported.
    """
    around = engine_around(model)
    if around is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: found {around.name} ({around.refused}); allowed are "
            f"{supported()}"
        )


def refuse_early(model: nn.Module) -> None:
    """Refuse what no run is needed for.

    Raises:
        UnsupportedModelError: with the reason.
    """
    name = type(model).__name__
    parameters = list(model.parameters())
    if not parameters or not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"{name} is not a transformers causal language model; pass the model that "
            "AutoModelForCausalLM returns"
        )
    refuse_engine(model)
    lost = unplaced(model)
    if lost:
        raise UnsupportedModelError(
            f"{name}: weights of {lost[0]} and {len(lost) - 1} other modules are on the meta "
            "device, and Accelerate does not bring them when that module runs by itself; load them "
            "(from_pretrained without device_map='meta'), or offload every module by itself "
            "(without preload_module_classes)"
        )
    parts = [each for each, weight in model.named_parameters() if is_part(weight)]
    if any(map(is_flattened, model.parameters())) and unit_of(model) is None:
        raise UnsupportedModelError(
            f"{name}: {parts[0]} and {len(parts) - 1} other weights were flattened by FSDP1, whose "
            "outermost wrapper is not known here; pass what FullyShardedDataParallel(model) "
            "returned, not the model inside"
        )
    if parts and unit_of(model) is None and any(map(is_zero_weight, model.parameters())):
        raise UnsupportedModelError(
            f"{name}: DeepSpeed's ZeRO 3 keeps {parts[0]} and {len(parts) - 1} other weights in "
            "parts, and this is not the model that deepspeed.initialize was given, so what it has "
            "on its way is not known here. Call deepspeed.initialize first, on the model itself or "
            "PEFT's around it, and pass that, not the engine"
        )
    if parts and unit_of(model) is None:
        raise UnsupportedModelError(
            f"{name}: {parts[0]} and {len(parts) - 1} other weights are in parts on several "
            "processes, and fully_shard was not called on the model itself, or PEFT's around it, "
            "but elsewhere, so a run of ours would find them in parts. Allowed is fully_shard on "
            "layers and then on the model"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model: its decoder reads a second sequence through "
            "cross-attention, which the graph of one sequence does not have"
        )
