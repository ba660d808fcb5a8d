from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from softtrace.data.loader import BlockLoader, BlockSampler
from softtrace.errors import InvalidInputError

BLOCKS = torch.arange(22)[:, None].expand(22, 3).contiguous()  # block i is [i, i, i]


def loader(
    batch_size: int = 4,
    *,
    blocks: Tensor = BLOCKS,
    seed: int = 0,
    ranks: int = 1,
    rank: int = 0,
    counted: Tensor | None = None,
) -> BlockLoader:
    sampler = BlockSampler(len(blocks), seed=seed, ranks=ranks, rank=rank)
    return BlockLoader(blocks, batch_size, sampler, counted)


def numbers(batches: BlockLoader) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def test_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    first, again, other_seed = BlockSampler(50), BlockSampler(50), BlockSampler(50, seed=1)
    assert sorted(first) == list(range(50))
    assert list(first) == list(again)
    orders = set()
    for sampler in (first, other_seed):
        for epoch in range(4):
            torch.manual_seed(epoch)  # the global state plays no part
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 8
    first.set_epoch(0)
    assert list(first) == list(again)


def test_order_does_not_change_between_versions() -> None:
    sampler = BlockSampler(8, seed=3)
    sampler.set_epoch(2)
    # Recorded, not derived: a checkpoint of an older softtrace has to find its order again.
    assert list(sampler) == [5, 3, 1, 7, 2, 0, 4, 6]


def test_sampling_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    numbers(loader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("blocks", "ranks"), [(24, 3), (22, 3), (2, 5), (7, 1)])
def test_ranks_share_an_epoch_evenly(blocks: int, ranks: int) -> None:
    samplers = [BlockSampler(blocks, ranks=ranks, rank=rank) for rank in range(ranks)]
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])}
    assert {index for share in shares for index in share} == set(range(blocks))
    assert len(samplers[0]) * ranks - blocks < ranks  # no more repeats than needed
    # Interleaved, they are the order of a single process.
    together = [share[i] for i in range(len(shares[0])) for share in shares]
    assert together[:blocks] == list(BlockSampler(blocks))


def test_batches_have_copies_as_labels_and_a_full_mask() -> None:
    batch = next(iter(loader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(value.shape == (4, 3) for value in batch.values())
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["attention_mask"].all()
    batch["labels"].fill_(-100)
    assert (batch["input_ids"] >= 0).all()
    assert (BLOCKS >= 0).all()


def test_labels_look_away_where_tokens_do_not_count() -> None:
    counted = torch.arange(3)[None] > BLOCKS % 3  # another number of each block
    batches = BlockLoader(BLOCKS, 4, BlockSampler(22), counted)
    for batch in batches:
        ids = batch["input_ids"]
        expected = torch.where(torch.arange(3)[None] > ids % 3, ids, -100)
        assert torch.equal(batch["labels"], expected)


def test_a_state_from_before_tokens_were_counted_resumes() -> None:
    interrupted = loader()
    next(iter(interrupted))
    state = interrupted.state_dict()
    assert state["identity"].pop("tokens that count") == 66
    resumed = loader()
    resumed.load_state_dict(state)
    assert numbers(resumed) == numbers(loader())[1:]


def test_every_iteration_starts_over() -> None:
    batches = loader()
    assert len(batches) == 6
    whole = numbers(batches)
    assert [len(batch) for batch in whole] == [4, 4, 4, 4, 4, 2]
    assert numbers(batches) == whole
    next(iter(batches))  # left early
    assert numbers(batches) == whole


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("taken", range(7))
def test_resuming_gives_exactly_the_remaining_batches(taken: int, ranks: int) -> None:
    straight = loader(ranks=ranks, rank=ranks - 1)
    straight.sampler.set_epoch(5)
    whole = numbers(straight)
    taken = min(taken, len(whole))

    interrupted = loader(ranks=ranks, rank=0)  # its state serves every rank
    interrupted.sampler.set_epoch(5)
    iterator = iter(interrupted)
    for _ in range(taken):
        next(iterator)

    resumed = loader(ranks=ranks, rank=ranks - 1)
    resumed.load_state_dict(interrupted.state_dict())
    iterator = iter(resumed)  # as Lightning does: the iterator first, then the epoch
    resumed.sampler.set_epoch(5)
    assert len(resumed) == len(whole)
    if taken:
        assert resumed.state_dict() == interrupted.state_dict()  # saved again before any batch
    assert [batch["input_ids"][:, 0].tolist() for batch in iterator] == whole[taken:]
    # ... and only once: the next epoch is whole.
    resumed.sampler.set_epoch(6)
    straight.sampler.set_epoch(6)
    assert numbers(resumed) == numbers(straight)


def test_state_of_another_epoch_starts_the_epoch_asked_for_from_its_beginning() -> None:
    interrupted = loader()
    next(iter(interrupted))
    resumed, straight = loader(), loader()
    resumed.load_state_dict(interrupted.state_dict())
    for batches in (resumed, straight):
        batches.sampler.set_epoch(1)
    assert numbers(resumed) == numbers(straight)


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"batch_size": 2}, "batch_size is 2, was 4"),
        ({"seed": 7}, "seed is 7, was 0"),
        ({"ranks": 2}, "ranks is 2, was 1"),
        ({"blocks": BLOCKS[:10]}, "blocks is 10, was 22"),
        ({"blocks": BLOCKS + 1}, "sum of token ids"),
        ({"counted": BLOCKS > 3}, "tokens that count is 54, was 66"),
    ],
)
def test_resuming_with_other_data_is_refused_in_mid_epoch_only(
    other: dict[str, object], part: str
) -> None:
    interrupted = loader()
    fresh = interrupted.state_dict()
    iterator = iter(interrupted)
    next(iterator)
    with pytest.raises(InvalidInputError, match=part):
        loader(**other).load_state_dict(interrupted.state_dict())  # type: ignore[arg-type]
    list(iterator)
    for state in (fresh, interrupted.state_dict()):
        loader(**other).load_state_dict(state)  # type: ignore[arg-type]


@pytest.mark.parametrize("before", [4, 11])  # which 22 blocks do not fill, and do
@pytest.mark.parametrize("batch_size", [2, 8])
def test_an_epoch_that_has_ended_stays_ended_in_batches_of_another_size(
    batch_size: int, before: int
) -> None:
    first, resumed = loader(before), loader(batch_size)
    assert len(numbers(first)) == math.ceil(22 / before)
    resumed.load_state_dict(first.state_dict())
    assert numbers(resumed) == []
    assert len(numbers(resumed)) == len(resumed)


def test_state_of_another_version_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="version 2"):
        loader().load_state_dict({**loader().state_dict(), "version": 2})


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="blocks: found 0, allowed"):
        BlockSampler(0)
    with pytest.raises(InvalidInputError, match="rank: found 2, allowed are 0 to 1"):
        BlockSampler(5, ranks=2, rank=2)
    with pytest.raises(InvalidInputError, match="batch_size: found 0"):
        loader(0)
    with pytest.raises(InvalidInputError, match="sampler: found one of 5 blocks"):
        BlockLoader(BLOCKS, 2, BlockSampler(5))
