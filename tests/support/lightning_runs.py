"""Whole runs of Lightning with the penalty: on a small corpus, and in several processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from softtrace.lightning import DensityPenalty
from softtrace.lightning.datamodule import PackedDataModule
from tests.support import warm
from tests.support.fitting import Batch, Calls, Tuner, trainer, weights
from tests.support.processes import script_environment
from tests.support.tiny import tiny_model


class ByteTuner(Tuner):
    def __init__(self) -> None:
        super().__init__(model=tiny_model("llama", vocab_size=257))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss/held_out", self.model(**batch).loss, batch_size=len(batch["input_ids"]))


def data_module(corpus: Path) -> PackedDataModule:
    """Six batches an epoch, the last one smaller."""
    return PackedDataModule(
        corpus,
        tokenizer=str(corpus.parent / "tokenizer"),
        block_size=16,
        held_out_share=0.2,
        max_train_blocks=22,
        batch_size=4,
    )


def fit_corpus(
    corpus: Path, ckpt_path: Path | None = None, accumulate: int = 1, **changes: Any
) -> Tensor:
    """The weights after two epochs; without ``ckpt_path``, every step leaves a checkpoint."""

    def save(fitting: Trainer, *_: Any) -> None:
        path = corpus.parent / f"step={fitting.global_step}.ckpt"
        if ckpt_path is None and not path.exists():
            fitting.save_checkpoint(path)

    torch.manual_seed(0)
    module = ByteTuner()
    options = {"start_step": 1, "warmup_steps": 6, "crop": 12, "seed": 3, "exits": 0.3, **changes}
    fitting = trainer(
        DensityPenalty(0.5, **options),
        Calls(on_train_batch_end=save),
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        limit_val_batches=1,
        val_check_interval=2,
    )
    fitting.fit(module, data_module(corpus), ckpt_path=ckpt_path, weights_only=True)
    return weights(module)


PROCESSES = """
import sys
import torch
from softtrace.lightning.penalty import STATE_KEY; from softtrace.lightning import DensityPenalty
from tests.support.fitting import Batches, Calls, Tuner, batches, trainer, weights

strength, output, world, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
penalty = [] if strength == "None" else [DensityPenalty(float(strength))]
noted = []


class Ranked(Tuner):
    def train_dataloader(self):
        mine = batches(4 * world).batches[self.global_rank :: world]
        if self.global_rank == 1:  # the term has nothing to look at in one rank's second batch
            mine[1]["labels"].fill_(-100)
        return Batches(*mine)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


module = Ranked()
note = Calls(
    on_train_batch_end=lambda trainer, *_: noted.append(
        {name: float(value) for name, value in trainer.callback_metrics.items()}
    )
)
fitting = trainer(
    *penalty, note, devices=world, strategy="ddp", max_epochs=epochs,
    accumulate_grad_batches=2,
)
fitting.fit(module)
state = {"weights": weights(module), "noted": noted, "clean": "training_step" not in vars(module)}
torch.save(state, f"{output}.{fitting.global_rank}")
# Lightning leaves the group standing; gloo's threads then abort an ending interpreter now and then
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def fit_in_processes(
    folder: Path, strength: float | None, world: int, epochs: int = 2
) -> list[dict[str, Any]]:
    """What each process ended with; a strength of None is no callback at all."""
    script, output = folder / "processes.py", folder / f"strength{strength}"
    script.write_text(PROCESSES, encoding="utf-8")
    done = warm.run(
        [sys.executable, script, strength, output, world, epochs],
        env=script_environment(), capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{output}.{rank}", weights_only=True) for rank in range(world)]
