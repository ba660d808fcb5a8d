"""``measure``: the numbers are the text's, whatever the batch, the padding and the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from softtrace.density.halving import Portion
from softtrace.errors import InvalidInputError
from softtrace.evaluation import measure as measuring
from softtrace.evaluation import summary
from softtrace.evaluation.measure import Measurements, RunsShown, masked_runs, measure
from softtrace.evaluation.summary import summarise
from softtrace.graph.batch import Batch
from tests.support.tiny import tiny_model, tiny_prompt

pytestmark = pytest.mark.thorough

LENGTH, CONTEXT, BLOCKS, EXTRA = 8, 3, 5, 3
MODEL = tiny_model("llama", dtype=torch.float64, num_hidden_layers=2)
TEXT = tiny_prompt(LENGTH, batch=BLOCKS)


def measured(
    batch_size: int,
    ids: Tensor = TEXT,
    mask: Tensor | None = None,
    progress: Callable[[int], Any] = lambda blocks: None,
    extra_blocks: int = EXTRA,
) -> Measurements:
    return measure(
        MODEL, ids, min_context=CONTEXT, batch_size=batch_size, extra_blocks=extra_blocks,
        progress=progress, attention_mask=mask,
    )  # fmt: skip


def tensors(found: Measurements) -> dict[str, Tensor]:
    """Everything that was measured, tokens in one row."""
    assert found.composition is not None
    return {
        **{name: torch.cat(getattr(found, name)) for name in ("entropy", "loss", "area", "size")},
        **{name: torch.cat(getattr(found, name), 1) for name in ("variation", "agreement")},
        "nucleus": torch.cat(found.nucleus, 1),
        "composition": found.composition,
        **{f"{kind} {kept}": torch.cat(v, 1) for (kind, kept), v in found.baselines.items()},
    }


def difference(found: Measurements, wanted: Measurements) -> float:
    """The largest of any number."""
    one, other = tensors(found), tensors(wanted)
    assert one.keys() == other.keys()
    assert len(one) == 12
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def whole() -> Measurements:
    return measured(BLOCKS)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_change_nothing(whole: Measurements, batch_size: int) -> None:
    # the largest difference that was seen: 1.2e-13
    assert difference(measured(batch_size), whole) < 1e-11


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_nothing(whole: Measurements, left: bool) -> None:
    pad, real = torch.zeros(BLOCKS, 3, dtype=torch.int64), torch.ones_like(TEXT)
    order = (lambda a, b: (a, b)) if left else (lambda a, b: (b, a))
    ids, mask = torch.cat(order(pad, TEXT), 1), torch.cat(order(pad, real), 1)
    # the largest difference that was seen: 1.2e-13
    assert difference(measured(2, ids, mask), whole) < 1e-11


def test_rows_of_unequal_length() -> None:
    lengths = [LENGTH, 5, 7, 4, 6]
    mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
    found = measured(3, TEXT * mask, mask)
    alone = Measurements()
    for row, length in enumerate(lengths):
        alone.extend(
            measure(
                MODEL, TEXT[row : row + 1, :length], min_context=CONTEXT, batch_size=1,
                extra_blocks=max(0, EXTRA - row), progress=lambda blocks: None, first=row,
            )
        )  # fmt: skip
    assert len(torch.cat(found.entropy)) == sum(length - 1 - CONTEXT for length in lengths)
    assert difference(found, alone) < 1e-11


def limit(monkeypatch: pytest.MonkeyPatch, fits: Callable[[int, int], bool]) -> list[int]:
    """Let memory run out at so many sequences, positions of them; blocks that were tried."""
    tried: list[int] = []
    measured = measuring._measured

    def limited(*args: Any) -> Measurements:
        portion = args[-1]
        tried.append(len(portion.batch.valid))
        if not fits(tried[-1], int(portion.chosen.sum())):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return measured(*args)

    monkeypatch.setattr(measuring, "_measured", limited)
    monkeypatch.setattr("gc.collect", lambda: 0)  # it takes longer than the rest
    return tried


def test_batches_are_halved_until_they_fit(
    whole: Measurements, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried, done = limit(monkeypatch, lambda blocks, _: blocks == 1), list[int]()
    found = measured(4, progress=done.append)
    assert tried == [3, 1, 1, 1, 1, 1]
    assert found.batch_size == 1
    assert sum(done) == EXTRA * masked_runs(True) + (BLOCKS - EXTRA) * masked_runs(False)
    assert difference(found, whole) < 1e-11
    assert "memory ran out at 3 sequence(s); continuing with 1 at a time" in caplog.text


def test_explained_positions_are_halved_where_no_block_fits(
    whole: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[int]()
    limit(monkeypatch, lambda blocks, positions: positions <= 2)
    found = measured(4, progress=done.append)
    assert found.batch_size == 1
    assert sum(done) == EXTRA * masked_runs(True) + (BLOCKS - EXTRA) * masked_runs(False)
    assert difference(found, whole) < 1e-11


def test_every_masked_run_is_shown_when_it_ends() -> None:
    """A block of 1,024 tokens takes minutes on a processor, with baselines half an hour."""
    done = list[int]()
    measured(BLOCKS, progress=done.append)
    moved = [runs for runs in done if runs]
    assert moved == [EXTRA] * masked_runs(True) + [BLOCKS - EXTRA] * masked_runs(False)


def portion(blocks: int, before: float = 0.0, share: float = 1.0) -> Portion:
    return Portion(Batch.of(TEXT[:blocks]), None, 0, before, share)


def test_runs_that_are_made_again_are_shown_once() -> None:
    done = list[int]()
    runs = RunsShown(done.append)
    ran = runs.begin(portion(4), 3)
    ran()  # of 4 blocks; then memory runs out
    ran = runs.begin(portion(2), 3)
    for _ in range(3):
        ran()
    assert done == [4, 2]
    runs.settle(2 * 3)
    assert sum(done) == 6
    runs.begin(portion(2), 3)()
    assert done[-1] == 2
    runs.begin(portion(1), 3)
    runs.settle(1)  # one run of one block, where two had been shown
    assert sum(done) == 7


def test_runs_of_some_positions_are_shown_as_parts_of_runs() -> None:
    """Else the bar would stand still from the first of many parts of a long block to its last."""
    done = list[int]()
    runs = RunsShown(done.append)
    for part in range(3):
        ran = runs.begin(portion(1, part / 3, 1 / 3), 6)
        for _ in range(6):
            ran()
        assert sum(done) == 2 * (part + 1)
    runs.settle(6)
    assert done == [1] * 6 + [0]


def test_memory_for_not_even_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, lambda *_: False)
    message = "one position of one sequence of 8 tokens; allowed is what fits. Take shorter blocks"
    with pytest.raises(InvalidInputError, match=message) as refused:
        measured(2)
    assert "--positions" not in str(refused.value)  # fewer than one would not help


def test_summaries_equal_those_of_one_batch(whole: Measurements) -> None:
    found, wanted = summarise(measured(2)), summarise(whole)
    assert found["curve"]["all"]["q25"] == pytest.approx(wanted["curve"]["all"]["q25"], abs=1e-11)
    quartile = torch.cat(whole.variation, 1).quantile(0.75, dim=-1)
    assert wanted["curve"]["all"]["q75"] == pytest.approx(quartile.tolist(), abs=1e-12)


def test_some_tokens_are_scattered_evenly_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(2)
    entropy = torch.cat(found.entropy).tolist()
    assert summarise(found)["scatter"]["entropy"] == entropy
    monkeypatch.setattr(summary, "_SCATTER", 3)
    last = len(entropy) - 1
    wanted = [entropy[0], entropy[last // 2], entropy[last]]
    assert summarise(found)["scatter"]["entropy"] == wanted
