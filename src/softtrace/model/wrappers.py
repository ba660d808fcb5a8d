"""The causal language model inside of what is trained, freed of what is wrapped around it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from softtrace.errors import TrainerSetupError, UnsupportedModelError
from softtrace.model.flat_units import bare, is_flat_unit
from softtrace.model.sharding import note_units

_ROUTED = {  # PEFT's adapters whose weights a router chooses by what it reads
    "LILY": "a Lily adapter, whose weights follow from all tokens of a batch",
    "XLORA": "X-LoRA, which weighs adapters for each token",
}


def find_causal_lm(
    module: nn.Module,
    who: str = "DensityPenalty",
    instead: str = "For others call softtrace.DensityLoss(model, ...) in training_step",
) -> PreTrainedModel:
    """The one transformers model with a language-model head inside ``module``.

    Args:
        module: what is trained.
        who: needs it, for the error.
        instead: what to do with other modules, for the error.

    Raises:
        TrainerSetupError: there is none, or more than one.
        UnsupportedModelError: PEFT puts a prompt before its tokens.
    """
    found: dict[str, PreTrainedModel] = {}
    for name, child in module.named_modules():
        unwrapped(child)  # a prompt that PEFT puts before the tokens is refused here
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in found)
        if isinstance(child, PreTrainedModel) and not inside:
            head = child.get_output_embeddings()  # type: ignore[no-untyped-call]
            if isinstance(head, nn.Module):
                found[name] = child
    if len(found) != 1:
        names = ", ".join(f"{name or 'itself'} ({type(m).__name__})" for name, m in found.items())
        raise TrainerSetupError(
            f"{type(module).__name__} holds {len(found)} causal language models"
            f"{f': {names}' if names else ''}; {who} needs exactly one "
            "(an attribute such as self.model = AutoModelForCausalLM.from_pretrained(...)). "
            f"{instead}"
        )
    note_units(module)  # PEFT's model may hold weights of the one inside
    return next(iter(found.values()))


def checked_module(model: nn.Module) -> nn.Module:
    """A model as it is.

    Raises:
        UnsupportedModelError: something else, such as the name of one.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model: found {type(model).__name__}, expected a transformers causal language model; "
            "pass the model that AutoModelForCausalLM.from_pretrained returns"
        )
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside ``torch.compile``'s wrapper, FSDP1's and PEFT's.

    PEFT puts its adapters into the layers of the base model, so that one is run, adapters included.

    Raises:
        UnsupportedModelError: no model, or an adapter of PEFT that is not in the layers (prompt
            tuning), or not the same linear map for every token.
    """
    model = getattr(checked_module(model), "_orig_mod", model)
    if is_flat_unit(model):
        model = bare(model)
    settings = getattr(model, "peft_config", None)
    base = getattr(model, "get_base_model", None)
    if isinstance(settings, dict) and callable(base):
        virtual = [name for name, each in settings.items() if each.is_prompt_learning]
        if virtual:
            raise UnsupportedModelError(
                f"PEFT adapter {', '.join(virtual)} adds virtual tokens, which are no tokens of "
                "the graph; allowed are adapters inside the layers (LoRA, rsLoRA, DoRA, ...)"
            )
        for name, each in settings.items():
            if (found := _depends_on_tokens(each)) is not None:
                raise UnsupportedModelError(
                    f"PEFT adapter {name} is {found}, so it is no fixed projection of a head's "
                    "output; allowed are adapters that add the same linear map at every token "
                    "(LoRA, rsLoRA, DoRA, ...)"
                )
        inner = base()
        if isinstance(inner, nn.Module):
            return inner
    return model


def _depends_on_tokens(adapter: Any) -> str | None:
    """What an adapter of these settings is, if it is not the same linear map for every token."""
    if getattr(adapter, "alora_invocation_tokens", None):
        return "an activated LoRA, which begins after its invocation tokens"
    if getattr(adapter, "arrow_config", None) is not None:
        return "routed by Arrow, which weighs adapters for each token"
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    return _ROUTED.get(str(kind))


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """The model's forward without the autocast that Accelerate puts around it, for a proof.

    Accelerate replaces ``forward`` where it prepares a model for mixed precision, and keeps the
    model's own; autocast that is switched off outside is switched on again by the replacement.
    """
    own, around = (vars(model).get(name) for name in ("_original_forward", "forward"))
    if own is None or around is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = around


def forward_parameters(model: nn.Module) -> tuple[str, ...]:
    """Names that the forward of the model inside takes; too slow to ask at every step."""
    return tuple(inspect.signature(unwrapped(model).forward).parameters)


def with_cache(parameters: Collection[str], cache: Any) -> dict[str, Any]:
    """Options with which a forward that takes these reads a cache and writes to it.

    transformers calls it ``cache`` since 5.24, and ``past_key_values`` before.
    """
    return {"cache" if "cache" in parameters else "past_key_values": cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """The cache that a forward gave back, by either name; None without one."""
    name = "cache" if hasattr(output, "cache") else "past_key_values"
    return getattr(output, name, None)


def one_logit(parameters: Collection[str]) -> dict[str, int]:
    """Options with which a forward that takes these computes logits of the last token alone.

    No options where it cannot. Logits of all tokens of a long prompt take more memory than the
    rest, and of a small model with a large vocabulary most of the time.
    """
    return {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
