"""The causal language model inside of what is trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from softtrace.anatomy.refusals import unwrapped
from softtrace.errors import TrainerSetupError


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
    return next(iter(found.values()))
