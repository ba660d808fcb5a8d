"""The order in which blocks are trained on, and batches of them that resume in mid-epoch.

:class:`BlockLoader` is deliberately not a ``torch.utils.data.DataLoader``. The blocks lie in memory
as one tensor, so workers would only cost; and Lightning rebuilds a DataLoader around a sampler of
its own in distributed runs, whose order depends on other things than (seed, epoch). Lightning takes
any iterable, calls ``sampler.set_epoch``, and keeps ``state_dict`` in its checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from softtrace.checks import check_least
from softtrace.data.encoding import Tokens
from softtrace.errors import InvalidInputError

STATE_VERSION = 1


class BlockSampler:
    """The blocks one rank sees in an epoch: a pure function of (seed, epoch) and the rank's share.

    All ranks draw the same order and take every ``ranks``-th block of it, beginning with their own
    number. So the n-th batches of all ranks together are the n-th stretch of that order. When the
    number of blocks is no multiple of ``ranks``, the first blocks of the order are repeated at its
    end: ranks with unequal numbers of batches would wait for each other forever.

    Args:
        blocks: how many there are, at least 1.
        shuffle: in another order every epoch, or always from first to last.
        seed: of the orders.
        ranks: number of processes that share the data.
        rank: number of this process, from 0.

    Raises:
        InvalidInputError: no blocks, or a rank outside of ``range(ranks)``.
    """

    def __init__(
        self, blocks: int, *, shuffle: bool = True, seed: int = 0, ranks: int = 1, rank: int = 0
    ) -> None:
        if blocks < 1:
            raise InvalidInputError(f"blocks: found {blocks}, allowed are integers from 1")
        if not 0 <= rank < ranks:
            raise InvalidInputError(f"rank: found {rank}, allowed are 0 to {ranks - 1}")
        self.blocks = blocks
        self.shuffle = shuffle
        self.seed = seed
        self.ranks = ranks
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next; Lightning calls this."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """Indices of this rank's blocks in this epoch, ``[ceil(blocks / ranks)]`` int64."""
        if self.shuffle:
            # Not seed + epoch: seeds 0 and 1 would then train on the same orders, one epoch apart.
            digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            order = torch.randperm(self.blocks, generator=generator)
        else:
            order = torch.arange(self.blocks)
        wanted = torch.arange(self.rank, len(self) * self.ranks, self.ranks)
        return order[wanted % self.blocks]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def __len__(self) -> int:
        return -(-self.blocks // self.ranks)


class BlockLoader:
    """Batches of blocks in the order of a :class:`BlockSampler`, resumable after any batch.

    A batch is a dict of ``[b, T]`` int64 tensors: ``input_ids``, ``attention_mask`` (all 1) and
    ``labels`` (a copy of ``input_ids``, with -100 where the loss does not count; models shift
    them). ``b`` is the batch size, less in the last batch of an epoch.

    Iterating starts at the first batch of the sampler's epoch, except for the first time after
    :meth:`load_state_dict` in the very epoch of that state: then it starts where the state was
    taken. Epoch and position are read when the first batch is asked for, not at ``iter()``:
    Lightning calls that before it sets the epoch.

    Args:
        blocks: ``[N, T]`` int64.
        batch_size: blocks in a batch, at least 1.
        sampler: over N blocks.
        counted: ``[N, T]`` bool, which tokens the loss counts; None for all.

    Raises:
        InvalidInputError: a batch size below 1, or a sampler over another number of blocks.
    """

    def __init__(
        self,
        blocks: Tensor,
        batch_size: int,
        sampler: BlockSampler,
        counted: Tensor | None = None,
    ) -> None:
        check_least("batch_size", batch_size, 1)
        if sampler.blocks != len(blocks):
            raise InvalidInputError(
                f"sampler: found one of {sampler.blocks} blocks, allowed is one of {len(blocks)}, "
                "as many as there are"
            )
        self.blocks = blocks
        self.counted = torch.ones_like(blocks, dtype=torch.bool) if counted is None else counted
        self.batch_size = batch_size
        self.sampler = sampler
        self.batch_sampler = None  # Lightning reads it of whatever has a sampler
        self._token_sum = int(blocks.sum())
        self._counted_sum = int(self.counted.sum())
        self._epoch = 0
        self._batches = 0  # of self._epoch, given out so far
        self._resuming = False

    def __len__(self) -> int:
        """Batches in a whole epoch of this rank, also while resuming in the middle of one."""
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch = self.sampler.epoch
        if not (self._resuming and epoch == self._epoch):
            self._epoch, self._batches = epoch, 0
        self._resuming = False
        order = self.sampler.order()
        for number in range(self._batches, len(self)):
            first = number * self.batch_size
            rows = order[first : first + self.batch_size]
            tokens = Tokens(self.blocks[rows], self.counted[rows])
            self._batches = number + 1
            yield {
                "input_ids": tokens.ids,
                "attention_mask": torch.ones_like(tokens.ids),
                "labels": tokens.labels,
            }

    def _identity(self) -> dict[str, int]:
        """What has to be equal for "the remaining batches" to mean anything."""
        return {
            "blocks": len(self.blocks),
            "sum of token ids": self._token_sum,
            "tokens that count": self._counted_sum,
            "batch_size": self.batch_size,
            "seed": self.sampler.seed,
            "ranks": self.sampler.ranks,
        }

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the batches of it given out so far, and what they depend on; plain integers.

        The same on every rank, so that rank 0's state in a checkpoint serves all of them.
        """
        return {
            "version": STATE_VERSION,
            "epoch": self._epoch,
            "batches": self._batches,
            "identity": self._identity(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last batch given out when ``state_dict`` was taken.

        Raises:
            InvalidInputError: a state of another version; or of the middle of an epoch of other
                data, batch size, seed or number of ranks, so that no exact continuation exists.
        """
        if state_dict.get("version") != STATE_VERSION:
            raise InvalidInputError(
                f"the checkpoint has a data state of version {state_dict.get('version')}; this "
                f"softtrace reads version {STATE_VERSION}. Resume with the softtrace that wrote it."
            )
        identity = self._identity()
        changed = [
            f"{name} is {identity[name]}, was {then}"
            for name, then in state_dict["identity"].items()
            if identity[name] != then
        ]
        epoch, batches = int(state_dict["epoch"]), int(state_dict["batches"])
        # Between two epochs nothing has to be continued, and such changes do no harm.
        share = -(-state_dict["identity"]["blocks"] // state_dict["identity"]["ranks"])
        finished = batches * state_dict["identity"]["batch_size"] >= share
        if changed and batches and not finished:
            raise InvalidInputError(
                f"cannot resume in the middle of epoch {epoch}, after {batches} batches: "
                f"{'; '.join(changed)}. Resume with the data settings of the interrupted run, or "
                "start a new fit from its weights alone."
            )
        self._epoch = epoch
        self._batches = len(self) if finished else batches
        self._resuming = True
