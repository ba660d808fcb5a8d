"""LoRA for ``softtrace fit``: a thin layer over PEFT, which does the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from softtrace.checks import check_least, check_range
from softtrace.errors import InvalidInputError


@dataclass(frozen=True)
class LoRA:
    """Adapters of low rank beside the matrices of every layer (Hu et al., arXiv 2106.09685).

    Args:
        rank: Rank of the update, >= 1.
        alpha: The update is multiplied with alpha / rank (alpha / √rank if rslora), > 0.
        dropout: Dropout of what the adapters read, in [0, 1).
        targets: Names of modules, or "all-linear" for all but the head.
        rslora: Scale by the root of the rank.

    Raises:
        InvalidInputError: a number outside its range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False

    def __post_init__(self) -> None:
        check_least("lora.rank", self.rank, 1)
        check_range("lora.alpha", self.alpha, 0, float("inf"), open_low=True, open_high=True)
        check_range("lora.dropout", self.dropout, 0, 1, open_high=True)

    def wrap(self, model: PreTrainedModel) -> nn.Module:
        """The model with new adapters, which alone are trained.

        Raises:
            InvalidInputError: PEFT is not installed, or finds none of the targets; or a target has
                the matrix of another module too, which it could not be added into by itself.
        """
        try:
            from peft import LoraConfig, TaskType, get_peft_model
        except ImportError as error:
            raise InvalidInputError(
                "lora: found no PEFT; install it with pip install peft"
            ) from error
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.targets,
            use_rslora=self.rslora,
        )
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise InvalidInputError(f"lora.targets: {error}") from error
        _refuse_tied(wrapped)
        return wrapped


def _refuse_tied(model: nn.Module) -> None:
    """Refuse adapters of a matrix that two modules have: merged, each would change both."""
    having: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            having.setdefault(id(weight), []).append(name.removeprefix("base_model.model."))
    for names in having.values():
        plain = [name.removesuffix(".base_layer") for name in names]
        adapted = [each for each, name in zip(plain, names, strict=True) if each != name]
        if adapted and len(names) > 1:
            both = " and ".join(plain)
            raise InvalidInputError(
                f"lora.targets: found {adapted[0]}, but {both} have one matrix (tied embeddings), "
                "which an adapter of one of them cannot be added into when the model is saved; "
                "leave it out, as 'all-linear' does"
            )


def merged(model: Any) -> PreTrainedModel:
    """The model with its adapters added into its weights; without adapters the model itself."""
    merge = getattr(model, "merge_and_unload", None)
    whole: PreTrainedModel = merge() if callable(merge) else model
    return whole
