"""What can be said of a model before anything runs: the reasons to refuse it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from softtrace.errors import SofttraceError, UnsupportedModelError
from softtrace.model.devices import unplaced
from softtrace.model.engines import ENGINES, engine_around
from softtrace.model.sharding import is_in_parts, is_part, unit_of

#: what a forward that wants other inputs raises; other errors pass through
NOT_MADE_FOR_IT = (
    *(TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError),
    StopIteration,
)


def first_line(error: BaseException) -> str:
    """What an error says in one line."""
    return str(error).strip().partition("\n")[0]


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
    """Refuse units of ``fully_shard`` that no backward pass of ours can gather; after a forward.

    Args:
        layers: of the decoder.
        readout: the final norm and the head.

    Raises:
        UnsupportedModelError: layers lie in one unit with them, and it lets go of them by then.
    """
    units = [unit_of(each) for each in layers]
    for module in readout:
        if is_in_parts(module) and any(unit_of(module) is unit for unit in units):
            raise UnsupportedModelError(
                f"one unit of fully_shard holds layers and the {type(module).__name__} behind "
                "them, and lets go of them after its forward. Call fully_shard on every layer "
                "first, or leave reshard_after_forward of the outermost unit as it is"
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
    around = engine_around(model)
    if around is not None:
        allowed = ", ".join(each.name for each in ENGINES if each.refused is None)
        raise UnsupportedModelError(
            f"{name}: found {around.name} ({around.refused}); allowed are {allowed}"
        )
    lost = unplaced(model)
    if lost:
        raise UnsupportedModelError(
            f"{name}: weights of {lost[0]} and {len(lost) - 1} other modules are on the meta "
            "device, and Accelerate does not bring them when that module runs by itself; load them "
            "(from_pretrained without device_map='meta'), or offload every module by itself "
            "(without preload_module_classes)"
        )
    parts = [each for each, weight in model.named_parameters() if is_part(weight)]
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
