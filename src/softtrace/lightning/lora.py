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
            InvalidInputError: PEFT is not installed, or finds none of the targets.
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
            return get_peft_model(model, config)
        except ValueError as error:
            raise InvalidInputError(f"lora.targets: {error}") from error


def merged(model: Any) -> PreTrainedModel:
    """The model with its adapters added into its weights; without adapters the model itself."""
    merge = getattr(model, "merge_and_unload", None)
    whole: PreTrainedModel = merge() if callable(merge) else model
    return whole
