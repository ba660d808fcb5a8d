"""Trainings by DeepSpeed's ZeRO, for one of the processes of :mod:`tests.support.ways_to_shard`.

It computes in float32, or less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from softtrace import DensityLoss, attach, density_curve
from softtrace.errors import UnsupportedModelError
from softtrace.loss import exit_term
from tests.support.tiny import tiny_model, tiny_prompt, training_without_dropout
from tests.support.ways_to_shard import (
    OPTIONS,
    ROWS,
    STEPS,
    Trained,
    batch,
    loss_of,
    model_and_optimizer,
    said_of_wrong_on_one,
    whole_weights,
)
from tests.support.zoo import VERIFIED, tiny

#: tied weights and Conv1D, a norm after sub-blocks, in place and parallel, experts; adapters
FAMILIES = ("gpt2", "gemma2", "falcon, one key head", "deepseek_v3", "LoRA")
LAYERS = 8  # of the model whose weights are counted in the backward pass


def zero(stage: int) -> dict[str, Any]:
    """Settings of a stage of ZeRO; of stage 3 none keeps whole the weights of so small a model."""
    kept = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"stage": stage, **kept}


def engine_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, stage: int = 3, **settings: Any
) -> Any:
    """DeepSpeed's engine around a model."""
    import deepspeed

    config = {
        "zero_optimization": {**zero(stage), **settings}, "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": ROWS, "gradient_clipping": 0.0,  # it would be 1
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def trained_by_zero(
    stage: int, options: dict[str, Any], steps: int, rank: int, ranks: int, **settings: Any
) -> Trained:
    """As :func:`tests.support.ways_to_shard.trained`, by a stage of ZeRO."""
    model, optimizer = model_and_optimizer(None, torch.float32)
    return steps_of(engine_of(model, optimizer, stage, **settings), options, steps, rank, ranks)


def steps_of(engine: Any, options: dict[str, Any], steps: int, rank: int, ranks: int) -> Trained:
    """Losses of the steps, weights after them, and the gradients of each."""
    from deepspeed.utils import safe_get_full_grad

    density = DensityLoss(engine.module, **options)
    losses, gradients = [], []
    for step in range(steps):
        loss = loss_of(engine, density, step, rank, ranks)
        engine.backward(loss)
        trained = [each for each in engine.module.named_parameters() if each[1].requires_grad]
        gradients.append({name: safe_get_full_grad(each).clone() for name, each in trained})
        engine.step()
        losses.append(loss.detach())
    return losses, whole_weights(engine.module), gradients


def of_ways(ways: Sequence[str], rank: int, ranks: int) -> dict[str, Any]:
    """The default term by the first way; of stage 3, and of more ways, all else."""
    stage = int(ways[0].partition(" ")[2])
    default = trained_by_zero(stage, OPTIONS["default"], STEPS, rank, ranks)
    found: dict[str, Any] = {f"{ways[0]}, default": default}
    if len(ways) == 1:
        return found
    soft = OPTIONS["soft"]
    eager = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    return {
        **found,
        "soft": trained_by_zero(3, soft, 4, rank, ranks),
        "nothing ahead": trained_by_zero(3, soft, 4, rank, ranks, **eager),
        **{name: steps_of(family(name), soft, 2, rank, ranks)[1] for name in FAMILIES},
        "untouched": [plain(None), plain(0.0)],
        "term alone": of_the_term_alone(rank),
        "uneven": uneven_in_parts(rank),
        "whole in the backward pass": [most_whole(name, rank, ranks) for name in (None, *OPTIONS)],
        "wrong on one": said_of_wrong_on_one(parts()),
        "curve": density_curve(parts(), *batch(0, 0, 1)).total_variation,
        "refusals": refusals(),
    }


def parts(model: Any = None) -> Any:
    """A model in parts."""
    model = model_and_optimizer(None, torch.float32)[0] if model is None else model
    engine_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return model


def family(name: str, by: Callable[..., Any] = engine_of) -> Any:
    """A tiny model of the zoo, or one with adapters, and its optimiser, in the hands of ``by``."""
    if name == "LoRA":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(0)
        model: Any = get_peft_model(tiny_model("llama", seed=1), config)
    else:
        kind, changes = VERIFIED[name]
        model = tiny(kind, **changes)
    training_without_dropout(model)
    trained = [each for each in model.parameters() if each.requires_grad]
    return by(model, torch.optim.SGD(trained, lr=0.02))


def plain(strength: float | None) -> dict[str, Tensor]:
    """Weights after three steps without a term, or with one of a strength."""
    model, optimizer = model_and_optimizer(None, torch.float32)
    engine = engine_of(model, optimizer)
    density = None if strength is None else DensityLoss(model, strength=strength)
    rank = torch.distributed.get_rank()
    for step in range(3):
        ids, mask = batch(step, rank, 9)
        loss = engine(input_ids=ids, attention_mask=mask, labels=ids).loss
        if density is not None:
            loss = loss + density(ids, mask, labels=ids).loss
        engine.backward(loss)
        engine.step()
    return whole_weights(model)


ALONE: dict[str, Any] = {"share": 1.0, "masks": "soft", "size_weight": 0.3, "exits": 0.0}


def of_the_term_alone(rank: int) -> dict[str, Tensor]:
    """Weights after a step whose loss is the term, so that copies are what gradients reach last."""
    model, optimizer = model_and_optimizer(None, torch.float32)
    engine = engine_of(model, optimizer)
    ids, mask = batch(0, rank, 9)
    engine.backward(DensityLoss(model, **ALONE)(ids, mask, step=0).loss)
    engine.step()
    return whole_weights(model)


def uneven(rank: int, model: Any, by: Any = None) -> Tensor:
    """Loss of a batch that is longer on one process, whose forward gives no logits to rank by."""
    ids = tiny_prompt(LONGER[rank], seed=rank, batch=ROWS)
    density = DensityLoss(model, **OPTIONS["default"], exit_quantile=0.5)
    with patch.object(exit_term, "CHUNK", 2):  # tokens that are read at a time
        with density.watching(step=0) as watched:
            task = (by or model)(input_ids=ids, logits_to_keep=1, use_cache=False).logits.mean()
        loss: Tensor = task + density(ids, step=0, watched=watched).loss
    loss.backward() if by is None else by.backward(loss)
    return loss.detach()


LONGER = (5, 17)  # tokens of a sequence on the two processes


def uneven_in_parts(rank: int) -> Tensor:
    """:func:`uneven` by ZeRO 3."""
    model, optimizer = model_and_optimizer(None, torch.float32)
    return uneven(rank, model, engine_of(model, optimizer))


def most_whole(name: str | None, rank: int, ranks: int) -> float:
    """The largest share of weights that are whole at once in a backward pass."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    model = tiny_model("llama", seed=1, num_hidden_layers=LAYERS).train()
    eager = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    engine = engine_of(model, torch.optim.SGD(model.parameters(), lr=0.1), **eager)
    density = DensityLoss(model, **({"strength": 0.0} if name is None else OPTIONS[name]))
    weights: list[Any] = list(model.parameters())
    loss, shares = loss_of(engine, density, 0, rank, ranks), [0.0]
    own = PartitionedParameterCoordinator.fetch_sub_module

    def fetch(*args: Any, **options: Any) -> None:
        own(*args, **options)
        whole = sum(each.ds_numel for each in weights if each.ds_status.name == "AVAILABLE")
        shares.append(whole / sum(each.ds_numel for each in weights))

    with patch.object(PartitionedParameterCoordinator, "fetch_sub_module", fetch):
        engine.backward(loss)
    return max(shares)


def refusals() -> dict[str, str]:
    """What is said of a model inside of what DeepSpeed was given, and of one with leaves."""
    found = {}
    inner = tiny_model("llama")
    experts = tiny("mixtral")  # which DeepSpeed marks
    for name, around, model in (("inside", nn.Sequential(inner), inner), ("leaf", None, experts)):
        parts(model if around is None else around)
        try:
            attach(model)
        except UnsupportedModelError as error:
            found[name] = str(error)
    return found
