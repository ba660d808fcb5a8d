"""A LightningModule around any causal LM of transformers: what ``softtrace fit`` trains.

Nothing here knows of densities; the penalty is a callback. People with a module of their own keep
it and add the callback alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from transformers import (
    PreTrainedModel,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
)

from softtrace.checks import check_least, check_range
from softtrace.data.encoding import IGNORED
from softtrace.lightning.lora import LoRA, merged
from softtrace.lightning.sharded import shard
from softtrace.model.exit_maps import exit_maps_of, set_exit_maps
from softtrace.model.flat_units import is_flat_unit
from softtrace.model.loading import load_model, refuse_adapter


class CausalLM(LightningModule):
    """Fine-tunes a causal model with AdamW, linear warm-up and cosine decay to 0.

    Without a number of steps or epochs (only a ``max_time``) the learning rate stays constant after
    the warm-up.

    Logs ``loss/train`` every step and ``loss/held_out`` at validation, both in nats per token, over
    those that the labels of its batches count.

    Args:
        path: Model directory (safetensors) or name on the hub.
        learning_rate: Largest learning rate, > 0.
        weight_decay: Weight decay of matrices, >= 0; biases and norm weights are left alone.
        betas: The two decay rates of AdamW.
        warmup_steps: Optimiser steps of the linear warm-up.
        dtype: Number format of the weights: "float32", "bfloat16", "float16" or "auto" (as stored).
        attn_implementation: Attention kernel: "sdpa", "eager", "flash_attention_2", ...; None lets
            transformers choose.
        lora: Train adapters of low rank alone; None trains all weights.
        recompute: Keep no activations of layers, but run them again in the backward pass
            (activation checkpointing): a third more time, and far less memory.

    Under Lightning's ModelParallelStrategy every layer is sharded by ``fully_shard`` (FSDP2),
    under FSDPStrategy every layer is wrapped (FSDP1).

    Raises:
        InvalidInputError: a number outside its range.
        ModelDirectoryError: see :func:`softtrace.model.loading.load_model`.
    """

    def __init__(
        self,
        path: str,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 20,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        lora: LoRA | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        infinity = float("inf")
        check_range("learning_rate", learning_rate, 0, infinity, open_low=True, open_high=True)
        check_range("weight_decay", weight_decay, 0, infinity, open_high=True)
        for beta in betas:
            check_range("betas", beta, 0, 1, open_high=True)
        check_least("warmup_steps", warmup_steps, 0)
        self.path, self.dtype_of_weights = path, dtype
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        options = (
            {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        )
        # from_pretrained returns it in eval mode; what is fine-tuned is in train mode.
        model = load_model(path, dtype=dtype, **options)
        refuse_adapter(path, model)
        if recompute:
            older: Any = model  # before transformers 5.23 there is the longer name alone
            name = "activation_checkpointing_enable"
            getattr(older, name, older.gradient_checkpointing_enable)({"use_reentrant": False})
        self.lora = lora
        self.model = (model if lora is None else lora.wrap(model)).train()
        # FSDP1 makes them flat before the optimiser is made.
        self._matrices = {id(weight) for weight in self.model.parameters() if weight.dim() >= 2}

    def configure_model(self) -> None:
        """Shard the model where the strategy is for that; Lightning may call this twice."""
        shard(self.model, self.trainer.strategy, str(self.trainer.precision))

    def again(self, weights: dict[str, Tensor]) -> PreTrainedModel:
        """The model as it was loaded, on the CPU and not sharded, with these weights.

        Adapters are added into its weights, and exits are read through the maps that were learned.
        """
        model = load_model(self.path, dtype=self.dtype_of_weights)
        trained = model if self.lora is None else self.lora.wrap(model)
        trained.load_state_dict(weights)
        found = merged(trained)
        set_exit_maps(found, exit_maps_of(self.model))
        return found

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of the batch, nats per token."""
        loss = self._loss(batch)
        self.log("loss/train", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        """Log the mean held-out loss, nats per token that counts."""
        loss, tokens = self._loss(batch), int((batch["labels"][:, 1:] != IGNORED).sum())
        self.log("loss/held_out", loss, prog_bar=True, batch_size=tokens, sync_dist=True)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**batch, use_cache=False).loss
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's, but for FSDP1, which clips by the norm of all processes' pieces itself."""
        around: Any = self.trainer.strategy.model
        if is_flat_unit(around) and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            around.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepped with the optimiser."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        matrices = [each.dim() >= 2 or id(each) in self._matrices for each in trained]
        groups = [
            {
                "params": [w for w, is_one in zip(trained, matrices, strict=True) if is_one == own],
                "weight_decay": self.weight_decay if own else 0.0,
            }
            for own in (True, False)
        ]
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            # it drops an empty group, as with adapters, of which the schedule would not know
            groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):  # only max_time ends this fit
            schedule = get_constant_schedule_with_warmup(optimizer, self.warmup_steps)
        else:
            schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
