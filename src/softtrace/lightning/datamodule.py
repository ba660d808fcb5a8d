"""A data module of Lightning for ``softtrace.data``, of packed blocks, resumable mid-epoch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from softtrace.checks import check_least
from softtrace.data.blocks import evenly, pack_with_labels
from softtrace.data.documents import (
    DEFAULT_EXCLUDE,
    DEFAULT_SUFFIXES,
    Document,
    SpecialTokens,
    check_share,
    read_documents,
    split_by_file,
)
from softtrace.data.encoding import Tokens
from softtrace.data.loader import BlockLoader, BlockSampler
from softtrace.data.split_record import SplitRecord, record_split, unseen
from softtrace.errors import DataError, InvalidInputError
from softtrace.graph.batch import check_ids
from softtrace.model.loading import load_tokenizer

logger = logging.getLogger(__name__)


class _TrainerSampler(BlockSampler):
    """Counts epochs as ``trainer.current_epoch`` does, whatever number Lightning passes.

    It passes the number of processed epochs. With ``max_steps`` set and a checkpoint saved at the
    end of an epoch, lightning 2.6.6 counts that epoch as processed once more on resuming, and every
    order after it would be the next epoch's. ``current_epoch`` (completed epochs) stays right.
    """

    trainer: Trainer | None = None

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch if self.trainer is None else self.trainer.current_epoch)


class PackedDataModule(LightningDataModule):
    """Text, split by file and packed into blocks of one length.

    Batches are dicts of ``[batch_size, block_size]`` int64 tensors: ``input_ids``,
    ``attention_mask`` and ``labels``, which are -100 where the loss does not count; blocks of
    which nothing counts are left out. The order of training batches is a function of (seed, epoch)
    alone, and a fit resumed from a checkpoint taken in mid-epoch sees exactly the batches that the
    interrupted one had left. In distributed runs every rank takes its own share of each epoch; the
    data module shards by itself, so ``Trainer(use_distributed_sampler=...)`` makes no difference.

    Every process tokenizes the text for itself, in ``setup``.

    Args:
        path: Text file, file of rows (``.jsonl``, ``.json``, ``.parquet``) or folder, or data set
            of the hub (``hf://datasets/OWNER/NAME[/CONFIG][:SPLIT]``). A row holds text, messages
            (written out by the model's chat template), or prompt and completion; see
            :func:`softtrace.data.read_documents`.
        tokenizer: Directory or name on the hub. May be left out here when something sets the
            attribute before ``setup``, as the command line does from the model.
        block_size: Tokens in a block, at least 2.
        batch_size: Blocks in a batch of one process.
        held_out_share: Share of documents for validation, in [0, 1); 0 means no validation.
        suffixes: Which files of a folder are read.
        exclude: Globs of files and folders of a folder that are left out.
        salt: Another salt gives another split; see :func:`softtrace.data.split_by_file`.
        seed: Seed of the order of training blocks.
        max_train_blocks: Use this many blocks, evenly spaced over all of them.
        max_held_out_blocks: The same for held-out blocks.
        special_tokens: How special tokens that are spelled out in a text are read: as tokens, as
            what a chat template rendered is to be read, or as plain characters. With auto they
            are tokens in a text that begins or ends with one, and characters in any other. Those
            of a chat template are always tokens.
        answers_only: What the loss counts: true for what the assistant says in messages, and for
            completions; false for everything, prompts too. By default all of messages and of text
            counts, and of prompt and completion the completion. Densities are measured on all.

    Raises:
        InvalidInputError: an option outside its range.
        DataError: in ``setup``: text that cannot be read, or a side without a single full block.
        ModelDirectoryError: in ``setup``: the directory holds no tokenizer.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | None = None,
        block_size: int = 128,
        batch_size: int = 8,
        held_out_share: float = 0.05,
        suffixes: Sequence[str] = DEFAULT_SUFFIXES,
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        salt: str = "",
        seed: int = 0,
        max_train_blocks: int | None = None,
        max_held_out_blocks: int | None = None,
        special_tokens: SpecialTokens = "auto",
        answers_only: bool | None = None,
    ) -> None:
        super().__init__()
        check_least("block_size", block_size, 2)
        check_least("batch_size", batch_size, 1)
        check_least("max_train_blocks", max_train_blocks, 1, optional=True)
        check_least("max_held_out_blocks", max_held_out_blocks, 1, optional=True)
        check_share(held_out_share)
        self.path = path
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.batch_size = batch_size
        self.held_out_share = held_out_share
        self.suffixes = suffixes
        self.exclude = exclude
        self.salt = salt
        self.seed = seed
        self.max_train_blocks = max_train_blocks
        self.max_held_out_blocks = max_held_out_blocks
        self.special_tokens = special_tokens
        self.answers_only = answers_only
        self.train: Tokens | None = None
        self.held_out: Tokens | None = None
        self.split: SplitRecord | None = None

    @property
    def train_blocks(self) -> Tensor | None:
        """Ids of the training blocks, ``[N, block_size]`` int64, once they are set up."""
        return None if self.train is None else self.train.ids

    @property
    def held_out_blocks(self) -> Tensor | None:
        """Ids of the held-out blocks, ``[N, block_size]`` int64; None too for a share of 0."""
        return None if self.held_out is None else self.held_out.ids

    def prepare_data(self) -> None:
        """Fetch the tokenizer once a machine, before all of its processes want it."""
        self._load_tokenizer()

    def setup(self, stage: str) -> None:
        """Read, split, tokenize and pack; a second call finds it done."""
        if self.train is not None or (stage != "fit" and self.held_out is not None):
            return
        documents = read_documents(self.path, self.suffixes, self.exclude, self.special_tokens)
        train, held_out = split_by_file(documents, self.held_out_share, self.salt)
        tokenizer = self._load_tokenizer()
        if self.block_size > tokenizer.model_max_length:
            logger.warning(
                "block_size is %d, but the tokenizer says that its model takes at most %d tokens",
                self.block_size, tokenizer.model_max_length,
            )  # fmt: skip
        if self.held_out_share > 0 and self.held_out is None:
            self.held_out = self._pack("held-out", held_out, tokenizer, self.max_held_out_blocks)
        if stage == "fit":
            # The tokenizer's directory is usually that of the model, which may be of a fit itself.
            held_out = list(unseen(held_out, [str(self.tokenizer)], held_out_share=0))
            self.split = record_split(train, held_out, self.held_out_share, self.salt)
            self.train = self._pack("training", train, tokenizer, self.max_train_blocks)

    def check_ids(self, vocabulary: int) -> None:
        """Refuse blocks, once they are set up, with ids that a model does not have.

        Args:
            vocabulary: tokens that the model has.

        Raises:
            InvalidInputError: an id beyond them.
        """
        for blocks in (self.train_blocks, self.held_out_blocks):
            if blocks is not None:
                check_ids(blocks, vocabulary)

    def _load_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InvalidInputError(
                "the data module has no tokenizer. Give tokenizer=... (a directory or hub name), "
                "usually the model's."
            )
        return load_tokenizer(self.tokenizer)

    def _pack(
        self, side: str, documents: list[Document], tokenizer: Any, limit: int | None
    ) -> Tokens:
        """Blocks of one side, ``[N, block_size]``, with errors that name the side."""
        if not documents:
            raise DataError(
                f"no document of {self.path} is on the {side} side. The split goes by the hash of "
                f"each name at held_out_share={self.held_out_share}, so with few documents a side "
                "can come out empty: give more documents, another share or salt, or "
                "held_out_share=0 to train without validation."
            )
        try:
            blocks = pack_with_labels(documents, tokenizer, self.block_size, self.answers_only)
        except DataError as error:
            raise DataError(f"the {side} side of {self.path}: {error}") from error
        if limit is None:
            return blocks
        # From everywhere, since neighbours come from the same file or folder.
        return Tokens(*(evenly(part, limit) for part in blocks))

    def _loader(self, blocks: Tokens, shuffle: bool) -> BlockLoader:
        # What the strategy gives, not the world size: under tensor parallelism several ranks have
        # to see the same data.
        share = self.trainer.distributed_sampler_kwargs if self.trainer else None
        share = share or {"num_replicas": 1, "rank": 0}
        sampler = _TrainerSampler(
            len(blocks.ids),
            shuffle=shuffle,
            seed=self.seed,
            ranks=int(share["num_replicas"]),
            rank=int(share["rank"]),
        )
        sampler.trainer = self.trainer
        return BlockLoader(blocks.ids, self.batch_size, sampler, blocks.counted)

    def train_dataloader(self) -> BlockLoader:
        """Training blocks, in another order every epoch (but under ``overfit_batches``)."""
        if self.train is None:
            raise InvalidInputError("there are no training blocks yet; call setup('fit') first.")
        overfitting = getattr(self.trainer, "overfit_batches", 0) > 0
        return self._loader(self.train, shuffle=not overfitting)

    def val_dataloader(self) -> BlockLoader | list[Any]:
        """Held-out blocks in order; an empty list for a share of 0.

        Lightning then skips validation, with a warning that every way of having none gives rise to;
        ``Trainer(limit_val_batches=0)`` avoids it.
        """
        if self.held_out_share == 0:
            return []
        if self.held_out is None:
            raise InvalidInputError("there are no held-out blocks yet; call setup('fit') first.")
        return self._loader(self.held_out, shuffle=False)
