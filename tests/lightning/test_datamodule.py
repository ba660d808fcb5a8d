from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn

from softtrace.data import DEFAULT_SUFFIXES
from softtrace.errors import DataError, InvalidInputError, ModelDirectoryError
from softtrace.lightning.datamodule import PackedDataModule
from tests.support import warm
from tests.support.corpus import byte_tokenizer, write_tree
from tests.support.processes import script_environment
from tests.support.waiting import PATIENCE, held_port, port_of


class Bigram(LightningModule):
    """A model of two layers that notes what it is trained on."""

    def __init__(self, log_path: Path | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, 4)
        self.output = nn.Linear(4, 257)
        self.seen: list[tuple[int, int, list[int]]] = []
        self.validated: list[int] = []
        self.log_path = log_path

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.output(self.embedding(batch["input_ids"][:, :-1]))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, identify(batch["input_ids"])))
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated += identify(batch["input_ids"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()])

    def on_train_end(self) -> None:
        if self.log_path is not None:
            state = {"seen": self.seen, "validated": self.validated, "weights": self.weights()}
            torch.save(state, self.log_path.with_suffix(f".{self.global_rank}"))


def identify(blocks: Tensor) -> list[int]:
    """A number for each block, not equal for any two of the corpus."""
    return ((blocks * torch.arange(1, blocks.shape[1] + 1) ** 2).sum(1)).tolist()


class StopAfter(Callback):
    """An interruption: an exception in the middle of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("interrupted")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return write_tree(tmp_path / "tree")


def data_module(corpus: Path, **options: Any) -> PackedDataModule:
    options = {
        "tokenizer": str(corpus.parent / "tokenizer"),
        "block_size": 64,
        "batch_size": 4,
        "held_out_share": 0.2,
        "max_train_blocks": 22,
        **options,
    }
    return PackedDataModule(corpus, **options)


def trainer(corpus: Path, *callbacks: Callback, **options: Any) -> Trainer:
    options = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, **options}
    return Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        default_root_dir=corpus.parent,
        callbacks=list(callbacks),
        **options,
    )


# --- batches and sides


def test_batches_are_dicts_of_packed_blocks_and_sides_share_nothing(corpus: Path) -> None:
    data = data_module(corpus, max_train_blocks=None)
    data.prepare_data()
    data.setup("fit")
    train = [batch["input_ids"] for batch in data.train_dataloader()]
    held_out = [batch["input_ids"] for batch in data.val_dataloader()]
    assert train[0].shape == held_out[0].shape == (4, 64)
    assert not set(identify(torch.cat(train))) & set(identify(torch.cat(held_out)))
    blocks = data.train_blocks
    data.setup("fit")
    assert data.train_blocks is blocks  # a second call finds it done


def test_validation_alone_leaves_the_training_side_unread(corpus: Path) -> None:
    data = data_module(corpus)
    data.setup("validate")
    assert data.train_blocks is None
    held_out = data.held_out_blocks
    assert held_out is not None
    data.setup("fit")
    assert data.train_blocks is not None
    assert data.held_out_blocks is held_out


def test_limits_take_blocks_from_everywhere(corpus: Path) -> None:
    whole = data_module(corpus, max_train_blocks=None)
    some = data_module(corpus, max_train_blocks=5)
    whole.setup("fit")
    some.setup("fit")
    assert whole.train_blocks is not None
    assert some.train_blocks is not None
    count = len(whole.train_blocks)
    assert count > 10
    places = [i * (count - 1) // 4 for i in range(5)]  # the first and the last among them
    assert torch.equal(some.train_blocks, whole.train_blocks[places])
    limited = data_module(corpus, max_held_out_blocks=1)
    limited.setup("validate")
    assert limited.held_out_blocks is not None
    assert len(limited.held_out_blocks) == 1


def test_without_a_held_out_share_nothing_is_validated(corpus: Path) -> None:
    data = data_module(corpus, held_out_share=0)
    model = Bigram()
    with pytest.warns(UserWarning, match="length of `list` across ranks is zero"):
        trainer(corpus, max_epochs=1).fit(model, data)
    trainer(corpus, max_epochs=1, limit_val_batches=0).fit(model, data)  # without a warning
    assert len(model.seen) == 12
    assert not model.validated


def test_overfitting_repeats_the_same_batches(corpus: Path) -> None:
    model = Bigram()
    with pytest.warns(UserWarning, match="overfit"):
        trainer(corpus, max_epochs=2, overfit_batches=2).fit(model, data_module(corpus))
    assert [s[2] for s in model.seen[:2]] == [s[2] for s in model.seen[2:]]


def test_epochs_have_different_orders_of_the_same_blocks(corpus: Path) -> None:
    model = Bigram()
    trainer(corpus, max_epochs=2).fit(model, data_module(corpus))
    epochs = [[b for s in model.seen if s[0] == epoch for b in s[2]] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


# --- resuming


def fit(corpus: Path, folder: Path, when: dict[str, Any], **options: Any) -> Bigram:
    """Fit three or so epochs of 6 batches, saving into ``folder``; the same model every time."""
    torch.manual_seed(0)
    model = Bigram()
    checkpoint = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)
    ckpt_path = options.pop("ckpt_path", None)
    callbacks = [checkpoint, *options.pop("callbacks", [])]
    fitting = trainer(corpus, *callbacks, **options)
    fitting.fit(model, data_module(corpus), ckpt_path=ckpt_path, weights_only=True)
    return model


@pytest.mark.thorough
@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 3},
        {"max_steps": 16},
        {"max_epochs": 3, "limit_train_batches": 4},
        {"max_epochs": 3, "accumulate_grad_batches": 2},
        {"max_steps": 15, "check_val_every_n_epoch": 2},
    ],
    ids=lambda limits: "-".join(limits),
)
@pytest.mark.parametrize(
    "when",
    [{"every_n_train_steps": 1}, {"save_on_train_epoch_end": True}, {}],
    ids=["each_step", "epoch_end", "validation_end"],
)
def test_resumed_fit_equals_the_straight_one_bit_by_bit(
    corpus: Path, tmp_path: Path, limits: dict[str, Any], when: dict[str, Any]
) -> None:
    if not when and "check_val_every_n_epoch" not in limits:
        limits = {**limits, "val_check_interval": 2}  # checkpoints in mid-epoch, after validation
    folder = tmp_path / "checkpoints"
    straight = fit(corpus, folder, when, **limits)
    kept = folder.rename(tmp_path / "kept")
    checkpoints = sorted(kept.glob("*.ckpt"))
    assert checkpoints
    for number, ckpt_path in enumerate(checkpoints):
        folder = tmp_path / "again" / str(number) / "checkpoints"
        with pytest.warns(UserWarning, match="dirpath"):
            resumed = fit(corpus, folder, when, ckpt_path=ckpt_path, **limits)
        remaining = straight.seen[len(straight.seen) - len(resumed.seen) :]
        assert resumed.seen == (remaining if resumed.seen else []), ckpt_path.name
        assert torch.equal(resumed.weights(), straight.weights()), ckpt_path.name
        steps = torch.load(ckpt_path, weights_only=True)["global_step"]
        accumulated = limits.get("accumulate_grad_batches", 1)
        assert len(straight.seen) - len(resumed.seen) == steps * accumulated


def test_interrupted_fit_continues_with_the_batch_it_had_not_seen(
    corpus: Path, tmp_path: Path
) -> None:
    when = {"every_n_train_steps": 4, "save_last": True}
    straight = fit(corpus, tmp_path / "a", when, max_epochs=2)
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(corpus, tmp_path / "b", when, max_epochs=2, callbacks=[StopAfter(9)])
    with pytest.warns(UserWarning, match="exists and is not empty"):
        resumed = fit(corpus, tmp_path / "b", when, max_epochs=2, ckpt_path="last")
    assert resumed.seen == straight.seen[8:]
    assert torch.equal(resumed.weights(), straight.weights())


def test_resuming_in_mid_epoch_with_another_batch_size_is_refused(
    corpus: Path, tmp_path: Path
) -> None:
    fit(corpus, tmp_path / "a", {"every_n_train_steps": 4}, max_epochs=1)
    (tmp_path / "a").rename(tmp_path / "b")
    fitting = trainer(corpus, ModelCheckpoint(tmp_path / "a", every_n_train_steps=4), max_epochs=1)
    data = data_module(corpus, batch_size=2)
    with pytest.raises(InvalidInputError, match="batch_size is 2, was 4"):
        fitting.fit(Bigram(), data, ckpt_path=tmp_path / "b" / "step=4.ckpt", weights_only=True)


# --- several processes

TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.lightning.test_datamodule import Bigram, data_module, trainer

corpus, output = Path(sys.argv[1]), Path(sys.argv[2])
ckpt_path = sys.argv[3] if len(sys.argv) > 3 else None
torch.manual_seed(0)
saving = ModelCheckpoint(output, filename="{step}", save_top_k=-1, every_n_train_steps=1)
fitting = trainer(corpus, saving, devices=2, strategy="ddp", max_epochs=2)
fitting.fit(Bigram(output / "log"), data_module(corpus), ckpt_path=ckpt_path, weights_only=True)
# Lightning leaves the group standing: a rank that ends closes it for one that still listens.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def fit_in_two_processes(
    corpus: Path, output: Path, *ckpt_path: Path, by: Callable[..., Any] = warm.run
) -> list[dict[str, Any]]:
    script = corpus.parent / "two_processes.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    with held_port() as held:
        environment = {**script_environment(), "MASTER_PORT": str(port_of(held))}
        done = by(
            [sys.executable, script, corpus, output, *ckpt_path],
            env=environment, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(output / f"log.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_ranks_see_their_own_shares_and_resume_exactly(corpus: Path, tmp_path: Path) -> None:
    # by interpreters of their own: the order of their sets is not that of any other
    straight = fit_in_two_processes(corpus, tmp_path / "straight", by=subprocess.run)
    for epoch in (0, 1):
        shares = [
            {block for number, _, blocks in rank["seen"] if number == epoch for block in blocks}
            for rank in straight
        ]
        assert len(shares[0]) == len(shares[1]) == 11
        assert not shares[0] & shares[1]
    # Three batches an epoch and rank: inside the first, and after it.
    for step in (1, 3):
        ckpt_path = tmp_path / "straight" / f"step={step}.ckpt"
        resumed = fit_in_two_processes(corpus, tmp_path / f"resumed{step}", ckpt_path)
        for rank in range(2):
            assert resumed[rank]["seen"] == straight[rank]["seen"][step:]
            assert torch.equal(resumed[rank]["weights"], straight[rank]["weights"])


@pytest.mark.parametrize("replicas", [None, {"num_replicas": 2, "rank": 1}])
def test_loaders_take_the_share_that_the_strategy_names(
    corpus: Path, replicas: dict[str, int] | None
) -> None:
    class Fake:
        distributed_sampler_kwargs = replicas
        overfit_batches = 0

    data = data_module(corpus)
    data.setup("fit")
    data.trainer = Fake()  # type: ignore[assignment]
    ranks = 2 if replicas else 1
    assert len(data.train_dataloader().sampler) == 22 // ranks
    assert data.train_dataloader().sampler.rank == ranks - 1


# --- which tokens count


@pytest.mark.parametrize("answers_only", [None, True, False])
def test_labels_are_those_of_the_rows(corpus: Path, answers_only: bool | None) -> None:
    rows = [{"prompt": "repeat after me: ", "completion": f"say {n}"} for n in range(10)]
    path = corpus.parent / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data_module(corpus, block_size=23, held_out_share=0.3, answers_only=answers_only)
    data.path = path  # a row and its end fill a block
    data.setup("fit")
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    labels = torch.cat([batch["labels"] for batch in batches])
    assert len(labels) == 10
    found = sorted(byte_tokenizer().decode(row[row >= 0]) for row in labels)
    prompt = "repeat after me: " if answers_only is False else ""
    assert found == [f"{prompt}say {n}<end>" for n in range(10)]
    assert data.val_dataloader().blocks.shape == data.held_out_blocks.shape


def test_plain_text_has_no_answers(corpus: Path) -> None:
    data = data_module(corpus, answers_only=True)
    with pytest.raises(DataError, match=r"side of .*file\d+.py is plain text"):
        data.setup("fit")


# --- options


def test_every_option_can_be_set_from_yaml(corpus: Path) -> None:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(PackedDataModule, "data")
    config = parser.parse_string(
        f"data:\n  path: {corpus}\n  tokenizer: some/name\n  suffixes: [.py, .md]\n"
        "  exclude: [test]\n  block_size: 32\n  max_train_blocks: 3\n  held_out_share: 0.5\n"
        "  salt: other\n  seed: 4\n  answers_only: true\n"
    )
    data = parser.instantiate(config).data
    assert list(data.suffixes) == [".py", ".md"]
    assert list(data.exclude) == ["test"]
    assert (data.block_size, data.max_train_blocks, data.seed) == (32, 3, 4)
    assert data.answers_only is True
    defaults = parser.instantiate(parser.parse_string(f"data:\n  path: {corpus}\n")).data
    assert defaults.tokenizer is None
    assert tuple(defaults.suffixes) == DEFAULT_SUFFIXES
    assert defaults.answers_only is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("block_size", 1),
        ("batch_size", 0),
        ("max_train_blocks", 0),
        ("max_held_out_blocks", -1),
        ("held_out_share", 1),
        ("held_out_share", -0.5),
    ],
)
def test_options_outside_their_range_are_refused(corpus: Path, option: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=f"{option}: found {value}, allowed"):
        data_module(corpus, **{option: value})


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"held_out_share": 1e-9}, "no document of .* is on the held-out side"),
        ({"held_out_share": 0.999999}, "no document of .* is on the training side"),
        ({"block_size": 3000}, "the held-out side of .* less than one block of 3000"),
        ({"suffixes": [".rs"]}, "no file"),
    ],
)
def test_sides_without_a_block_are_refused(
    corpus: Path, options: dict[str, Any], part: str
) -> None:
    with pytest.raises(DataError, match=part):
        data_module(corpus, **options).setup("fit")


def test_missing_tokenizer_is_refused(corpus: Path) -> None:
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        data_module(corpus, tokenizer=None).prepare_data()
    with pytest.raises(ModelDirectoryError, match="no tokenizer"):
        data_module(corpus, tokenizer=str(corpus)).setup("fit")


def test_loaders_before_setup_are_refused(corpus: Path) -> None:
    for loader in (data_module(corpus).train_dataloader, data_module(corpus).val_dataloader):
        with pytest.raises(InvalidInputError, match="setup"):
            loader()


@pytest.mark.parametrize("longest", [63, 64])
def test_blocks_longer_than_the_model_takes_are_warned_of(
    corpus: Path, caplog: pytest.LogCaptureFixture, longest: int
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = longest
    tokenizer.save_pretrained(corpus.parent / "short")
    with caplog.at_level(logging.WARNING, "softtrace.lightning.datamodule"):
        data_module(corpus, tokenizer=str(corpus.parent / "short")).setup("fit")
    assert ("block_size is 64" in caplog.text) == (longest == 63)
