"""A training in parts by Lightning or by transformers' Trainer, and what a checkpoint of it holds.

Run as a module: ``lightning FOLDER PROCESSES CHECKPOINT STRENGTH EPOCHS WAY ACCUMULATE`` starts its
own processes, ``trainer FOLDER CHECKPOINT VERSION`` and ``deepspeed FOLDER STAGE ACCUMULATE`` are
one of them; without a checkpoint (``None``) they train and save. A strength of ``None`` is no
penalty.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import strategies
from lightning.pytorch.plugins import FSDPPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies import fsdp as lightning_fsdp
from torch import Tensor, nn

from softtrace import DensityLoss
from softtrace.hf import with_density
from softtrace.lightning import DensityMonitor, DensityPenalty
from tests.support import warm, ways_to_zero
from tests.support.fitting import Batch, Batches, Tuner, batches, trainer
from tests.support.hf_training import OPTIONS, OrderedTrainer, arguments, rows
from tests.support.processes import as_rank, script_environment
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.units import by_layer
from tests.support.ways_to_shard import whole_weights

BATCHES = 4  # of a process
BLOCKS = tiny_prompt(12, seed=9, batch=3)
KEPT = 2  # rows of a process


class FSDPStrategy(strategies.FSDPStrategy):
    """Lightning's own, on CPUs: for which it lets subclasses pass, and FSDP1 has to be told."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with _nothing_to_offload():
            return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        with _nothing_to_offload():
            return super().optimizer_state(optimizer)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with _nothing_to_offload():
            return super().load_checkpoint(*args, **kwargs)


@contextmanager
def _nothing_to_offload() -> Iterator[None]:
    """FSDP1 crashes where it shall offload weights from a CPU to a CPU."""
    from torch.distributed import fsdp
    from torch.distributed.fsdp.api import FullOptimStateDictConfig

    def context(module: nn.Module, world_size: int, rank0_only: bool = True) -> Any:
        return fsdp.FullyShardedDataParallel.state_dict_type(
            module,
            fsdp.StateDictType.FULL_STATE_DICT,
            fsdp.FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
            FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        )

    with patch.object(lightning_fsdp, "_get_full_state_dict_context", context):
        yield


class DeepSpeedStrategy(strategies.DeepSpeedStrategy):
    """Lightning's own, on CPUs, which it refuses."""

    root_device = torch.device("cpu", 0)  # DeepSpeed wants a number

    def __init__(self, stage: int = 2, **options: Any) -> None:
        super().__init__(stage=stage, zero_allow_untested_optimizer=True, **options)
        self.config["zero_optimization"].update(ways_to_zero.zero(stage))

    def setup_environment(self) -> None:
        super(strategies.DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class AsItIs(FSDPPrecision):
    """Leaves a model in float64."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


class OfBlocks(DensityMonitor):
    """Measures given blocks, beside one that measures what it kept."""


class Ranked(Tuner):
    """Processes take turns at the batches."""

    def __init__(self, world: int) -> None:
        super().__init__(model=tiny_model("llama", dtype=torch.float64))
        self.world = world

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        if not isinstance(self.model, FSDPModule) and self.device_mesh is not None:
            by_layer(self.model, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self) -> Batches:
        return Batches(*batches(BATCHES * self.world).batches[self.global_rank :: self.world])

    def val_dataloader(self) -> Batches:
        return Batches(validation(self.global_rank))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss/held_out", self.model(**batch).loss, batch_size=4, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def validation(rank: int) -> Batch:
    """The batch that a process validates on; one has padding among the rows that are kept."""
    found: Batch = batches(9 + rank).batches[-1]
    return found


def fit_in_parts(
    folder: Path,
    world: int,
    checkpoint: Path | None = None,
    strength: float | None = 0.5,
    epochs: int = 1,
    way: str = "FSDP2",
    accumulate: int = 1,
) -> dict[str, Tensor]:
    """Weights after a fit in processes of its own, or after one that a checkpoint was of.

    What was measured at the end of the fit lies in FOLDER, a ``measured-RANK.pt`` of each process.
    """
    words = ["lightning", folder, world, checkpoint, strength, epochs, way, accumulate]
    done = warm.run(
        [sys.executable, "-m", "tests.support.ways_to_resume", *words],
        env=script_environment(), capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Tensor] = torch.load(folder / f"lightning-{world}.pt", weights_only=True)
    return found


def by_hand(
    world: int, accumulate: int = 1, dtype: torch.dtype = torch.float64, rate: float = 0.1
) -> nn.Module:
    """The fit by Lightning written out, of one process that has the batches of all."""
    model = tiny_model("llama", dtype=dtype).train()
    density = DensityLoss(model, strength=0.5, **OPTIONS_OF_A_FIT)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for step in range(BATCHES // accumulate):
        optimizer.zero_grad()
        for number in range(accumulate * world):
            micro, rank = divmod(number, world)
            batch = batches(BATCHES * world).batches[step * accumulate * world + number]
            with density.watching(step=step):
                loss = model(**batch).loss
            with as_rank(rank):
                term = density(**batch, step=step, micro_step=micro).loss
            (loss + term).backward()
        for weight in model.parameters():
            assert weight.grad is not None
            weight.grad /= world * accumulate
        optimizer.step()
    return model


def lightning(
    folder: str, world: str, checkpoint: str, strength: str, epochs: str, way: str, accumulate: str
) -> None:
    """Fit and save in parts, or load, fit what is left, and save."""
    module = Ranked(int(world))
    given = () if strength == "None" else (DensityPenalty(float(strength), **OPTIONS_OF_A_FIT),)
    monitors = (OfBlocks(BLOCKS, batch_size=1), DensityMonitor(max_rows=KEPT * int(world)))
    fitting = trainer(
        *given, *monitors, devices=int(world), max_epochs=int(epochs), limit_val_batches=1.0,
        num_sanity_val_steps=0, accumulate_grad_batches=int(accumulate), **strategy(way, module),
    )  # fmt: skip
    # What resumes at the end of its last epoch trains no more.
    fitting.fit(module, ckpt_path=None if checkpoint == "None" else checkpoint)
    own = "model." if way == "FSDP1" else ""
    found = whole_weights(fitting.strategy.model if way == "FSDP1" else module.model)
    found = {name.removeprefix(own): each for name, each in found.items()}
    if checkpoint == "None":
        measured = [monitor.history[-1] for monitor in monitors]
        torch.save(measured, Path(folder, f"measured-{module.global_rank}.pt"))
        fitting.save_checkpoint(Path(folder, "parts.ckpt"))
    if module.global_rank == 0:
        torch.save(found, Path(folder, f"lightning-{world}.pt"))


def strategy(way: str, module: Ranked) -> dict[str, Any]:
    """Options of a Trainer for "FSDP2", "FSDP1", "ZeRO 1", "ZeRO 2" or "ZeRO 3"."""
    if way == "FSDP2":
        parallel = ModelParallelStrategy(data_parallel_size=module.world, tensor_parallel_size=1)
        return {"strategy": parallel}
    if way == "FSDP1":
        layers = {type(module.model.model.layers[0])}
        flat = FSDPStrategy(auto_wrap_policy=layers, state_dict_type="sharded")
        return {"strategy": flat, "plugins": [AsItIs("32-true")]}
    return {"strategy": DeepSpeedStrategy(int(way.partition(" ")[2]))}


OPTIONS_OF_A_FIT: dict[str, Any] = {"share": 0.5, "crop": 6, "exits": 0.3}


HF_CLIP = {1: 0.0, 2: 0.5}  # FSDP1 takes no norm of float64


def hf(folder: str, checkpoint: str, version: str) -> None:
    """Train and save in parts, or load and save what was loaded."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    loaded = {}
    torch.manual_seed(0)
    training: Any = with_density(OrderedTrainer)(
        model=tiny_model("llama", dtype=torch.float64).train(),
        args=arguments(
            Path(folder), save_strategy="steps", save_steps=1, max_grad_norm=HF_CLIP[int(version)]
        ),
        train_dataset=rows(), density=OPTIONS,
    )  # fmt: skip
    # Accelerate offers FSDP where there are GPUs; what it does then runs on CPUs too.
    state = training.accelerator.state
    training.is_fsdp_enabled = True
    if version == "1":
        training._get_grad_norm = lambda *args, **kwargs: 0.0
    for each in (state, PartialState()):  # of which every AcceleratorState() is updated again
        each.distributed_type = DistributedType.FSDP
        each.device = torch.device("cpu")  # it was cpu:0, which FSDP1 takes for another
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=int(version), auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False,
        use_orig_params=True if version == "1" else None,
    )  # fmt: skip
    if checkpoint == "None":
        training.train()
        loaded = whole_weights(training.model)
    else:
        own = training._load_optimizer_and_scheduler

        def note(*args: Any) -> None:  # the weights are there, and nothing was trained since
            own(*args)
            loaded.update(whole_weights(training.model))

        training._load_optimizer_and_scheduler = note
        training.train(resume_from_checkpoint=checkpoint)
    if training.args.process_index == 0:
        torch.save(loaded, Path(folder, f"trainer-{training.args.world_size}.pt"))


EPSILON = 1e-3  # of AdamW where weights are float32's


def deepspeed(folder: str, stage: str, accumulate: str) -> None:
    """Train by a stage of ZeRO; what each process has at the end."""
    training: Any = with_density(OrderedTrainer)(
        model=tiny_model("llama").train(),
        args=arguments(
            Path(folder), deepspeed=zero(int(stage)), gradient_accumulation_steps=int(accumulate),
            adam_epsilon=EPSILON,
        ),
        train_dataset=rows(), density=OPTIONS,
    )  # fmt: skip
    assert training.is_deepspeed_enabled
    training.train()
    rank = training.args.process_index
    torch.save(whole_weights(training.model), Path(folder, f"zero-{stage}-{rank}.pt"))


def zero(stage: int) -> dict[str, Any]:
    """A configuration of DeepSpeed in which the Trainer's optimiser is kept."""
    return {
        "zero_optimization": ways_to_zero.zero(stage),
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    {"lightning": lightning, "trainer": hf, "deepspeed": deepspeed}[sys.argv[1]](*sys.argv[2:])
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort or wait in an orderly exit: nothing of ours is left
