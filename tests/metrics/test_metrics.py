"""The metrics against statistics by hand, whatever way the tokens arrive."""

from __future__ import annotations

import doctest
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric, MetricCollection

import softtrace.metrics
from softtrace import DensityCurve, InvalidInputError
from softtrace.graph.edges import EDGE_KINDS
from softtrace.metrics import (
    METRICS,
    ComputationDensity,
    EarlyExitAgreement,
    NucleusRecovery,
    TraceComposition,
    readings,
)
from softtrace.metrics.functional import density_uncertainty_correlation, entropy_bounds
from softtrace.tracing.runner import Runner
from tests.support.numbers import flat
from tests.support.processes import script_environment
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.warm import run_ranks


def collection() -> MetricCollection:
    return MetricCollection([metric() for metric in METRICS])


def test_the_list_holds_every_metric_there_is() -> None:
    public = [getattr(softtrace.metrics, name) for name in softtrace.metrics.__all__]
    metrics = {each for each in public if isinstance(each, type) and issubclass(each, Metric)}
    assert metrics == set(METRICS)


def batch(rows: int, seed: int, length: int = 6, layers: int = 3) -> dict[str, Any]:
    """Readings of a made-up batch: random curves over two thresholds; one position is padding."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    size = torch.stack((rand(rows, length) * 0.01, 0.02 + rand(rows, length) * 0.5))
    variation = torch.stack((0.5 + rand(rows, length) / 2, rand(rows, length) / 2))
    edges = torch.full((rows, length), 5000)
    edges[0, 0] = 0
    size[:, 0, 0] = variation[:, 0, 0] = torch.nan
    curve = DensityCurve(
        thresholds=torch.tensor([0.3, 0.1]),
        size=size,
        total_variation=variation,
        edges=edges,
        entropy=rand(rows, length),
        composition=(rand(3, rows, length, 4, 4) * 100).long(),
        nucleus=rand(3, rows, length, 8) > 0.5,
    )
    exits = torch.cat((rand(layers - 1, rows, length) > 0.4, torch.ones(1, rows, length).bool()))
    positions = (edges > 0) & (rand(rows, length) > 0.2)
    return {"curve": curve, "exits": exits, "positions": positions}


BATCHES = [batch(rows, seed) for seed, rows in enumerate((3, 1, 2, 4))]


def of(batches: list[dict[str, Any]]) -> Tensor:
    metrics = collection()
    for each in batches:
        metrics.update(**each)
    return flat(metrics.compute())


def test_equals_statistics_by_hand() -> None:
    metrics = collection()
    for each in BATCHES:
        metrics.update(**each)
    found = metrics.compute()
    joined: dict[str, Tensor] = {}
    for name, values in {
        "entropy": [b["curve"].entropy for b in BATCHES],
        "area": [b["curve"].area() for b in BATCHES],
        "size": [b["curve"].size_at(0.2) for b in BATCHES],
    }.items():
        kept = [v[b["positions"]] for v, b in zip(values, BATCHES, strict=True)]
        joined[name] = torch.cat(kept)
    entropy, area, size = joined["entropy"], joined["area"], joined["size"]
    low, high = entropy.quantile(0.25), entropy.quantile(0.75)
    groups = {"all": entropy >= 0, "easy": entropy <= low, "hard": entropy >= high}
    exits = torch.cat([b["exits"][:, b["positions"]] for b in BATCHES], dim=1).double()
    for name, rows in groups.items():
        assert 0 < int(rows.sum()) < len(entropy) or name == "all"
        assert found[f"area_{name}"] == pytest.approx(float(area[rows].mean()), rel=1e-12)
        assert found[f"size_{name}"] == pytest.approx(float(size[rows].median()), rel=1e-12)
        torch.testing.assert_close(found[name], exits[:, rows].mean(1))

    def ranks(values: Tensor) -> Tensor:
        return values.argsort().argsort().double()

    for name, values in (("area", area), ("size", size)):
        wanted = torch.corrcoef(torch.stack((ranks(values), ranks(entropy))))[0, 1]
        assert float(found[name]) == pytest.approx(float(wanted), rel=1e-6)
    recovered = [b["curve"].at_sizes(values=b["curve"].nucleus)[:, b["positions"]] for b in BATCHES]
    torch.testing.assert_close(
        found["NucleusRecovery"], torch.cat(recovered, dim=1).double().mean(1)
    )
    edges = torch.cat(
        [b["curve"].at_sizes(values=b["curve"].composition)[:, b["positions"]] for b in BATCHES], 1
    ).double().sum(1)  # fmt: skip
    torch.testing.assert_close(found["TraceComposition"].sum((1, 2)), torch.ones(26).double())
    for kind in range(len(EDGE_KINDS)):
        share = edges[..., kind] / edges.sum((1, 2))[:, None]
        torch.testing.assert_close(found["TraceComposition"][..., kind], share)


@given(order=st.permutations(range(4)), cut=st.integers(0, 4))
@settings(max_examples=25)
def test_any_order_and_any_merge_give_the_same(order: list[int], cut: int) -> None:
    wanted = of(BATCHES)
    first, second = collection(), collection()
    none = {**BATCHES[0], "positions": torch.zeros(3, 6, dtype=torch.bool)}
    first.update(**none)
    second.update(**none)
    for place, number in enumerate(order):
        (first if place < cut else second).update(**BATCHES[number])
    for one, other in zip(first.values(), second.values(), strict=True):
        one.merge_state(other)
    assert (flat(first.compute()) - wanted).abs().max() < 1e-12


def test_forward_gives_the_batch_and_keeps_the_sum() -> None:
    metric = ComputationDensity()
    alone = [metric(b["curve"], b["positions"])["area_all"] for b in BATCHES]
    for value, each in zip(alone, BATCHES, strict=True):
        assert float(value) == pytest.approx(float(each["curve"].area()[each["positions"]].mean()))
    counts = torch.tensor([int(b["positions"].sum()) for b in BATCHES])
    mean = (torch.stack(alone) * counts).sum() / counts.sum()
    assert float(metric.compute()["area_all"]) == pytest.approx(float(mean), rel=1e-12)


def test_padding_and_batches_of_a_model_make_no_difference() -> None:
    model = tiny_model("llama", dtype=torch.float64, num_hidden_layers=4)
    prompts = [tiny_prompt(length, seed=number)[0] for number, length in enumerate((9, 6, 8, 7, 9))]
    found = []
    for side, per_batch in (("none", 1), ("left", 2), ("right", 3), ("left", 5)):
        metrics = collection()
        for first in range(0, len(prompts), per_batch):
            rows = prompts[first : first + per_batch]
            longest = max(map(len, rows))
            ids = torch.full((len(rows), longest), 5)
            mask = torch.zeros_like(ids)
            for number, row in enumerate(rows):
                part = slice(longest - len(row), None) if side == "left" else slice(len(row))
                ids[number, part], mask[number, part] = row, 1
            metrics.update(**readings(model, ids, mask, min_context=3, nucleus=True))
        assert int(metrics["NucleusRecovery"].tokens) == sum(len(row) - 3 for row in prompts)
        found.append(flat(metrics.compute()))
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-9


@pytest.mark.parametrize("attention", ["recorded", "recomputed"])
def test_readings_are_the_same_where_memory_runs_out(
    attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a validation of long rows, say: the batch is halved, then positions are."""
    model, ids = tiny_model("llama", dtype=torch.float64), tiny_prompt(12, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, -3:] = 0
    whole = readings(model, ids, mask, attention=attention, nucleus=True)
    record = Runner.record

    def limited(runner: Runner, batch: Any, **options: Any) -> Any:
        chosen = options["positions"]
        if chosen is None or int(chosen.sum()) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return record(runner, batch, **options)

    monkeypatch.setattr(Runner, "record", limited)
    parts = readings(model, ids, mask, attention=attention, nucleus=True)
    assert torch.equal(parts["positions"], whole["positions"])
    real = mask.bool()
    assert torch.equal(parts["exits"][:, real], whole["exits"][:, real])
    for name in ("size", "total_variation", "edges", "entropy", "composition", "nucleus"):
        ours, theirs = (getattr(each["curve"], name) for each in (parts, whole))
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0, equal_nan=True)


def test_nothing_gives_nan_and_reset_forgets() -> None:
    metrics = collection()
    empty = {**BATCHES[0], "positions": torch.zeros(3, 6, dtype=torch.bool)}
    metrics.update(**empty)
    found = metrics.compute()
    assert torch.isnan(found["area_easy"])
    assert torch.isnan(found["area"])
    assert torch.isnan(found["all"]).all()
    assert torch.isnan(found["NucleusRecovery"]).all()
    assert (found["TraceComposition"] == 0).all()
    metrics.update(**BATCHES[1])
    metrics.reset()
    metrics.update(**BATCHES[2])
    assert torch.equal(flat(metrics.compute()), of([BATCHES[2]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ComputationDensity(total_variation=1.0), "total_variation: found 1.0"),
        (lambda: EarlyExitAgreement(easy_share=0.0), "easy_share: found 0.0"),
        (
            lambda: ComputationDensity().update(BATCHES[0]["curve"], torch.ones(2, 6).bool()),
            r"positions: found torch.bool of shape \(2, 6\)",
        ),
        (
            lambda: ComputationDensity().update(BATCHES[0]["curve"], torch.ones(3, 6).bool()),
            "positions: found padding among them",
        ),
        (
            lambda: EarlyExitAgreement().update(BATCHES[0]["curve"], torch.ones(3, 1, 6).bool()),
            r"exits: found shape \(3, 1, 6\), allowed is \('L', 3, 6\)",
        ),
        (lambda: _of_two_depths(), r"exits: found shape \(4, 1, 6\), allowed is \(3, 1, 6\)"),
        (lambda: NucleusRecovery().update(_bare()), "found no nuclei, make it with nucleus=True"),
        (lambda: TraceComposition().update(_bare()), "found no composition"),
        (
            lambda: readings(tiny_model("llama"), tiny_prompt(6), min_context=-1),
            "min_context: found -1",
        ),
    ],
)
def test_wrong_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call()


def _of_two_depths() -> None:
    metric = EarlyExitAgreement()
    for each in (batch(2, 0), batch(1, 0, layers=4)):
        metric.update(each["curve"], each["exits"])


def _bare() -> DensityCurve:
    full = BATCHES[0]["curve"]
    return DensityCurve(full.thresholds, full.size, full.total_variation, full.edges, full.entropy)


def test_plots_show_what_was_computed() -> None:
    metrics = collection()
    for each in BATCHES:
        metrics.update(**each)
    for name, lines in (
        ("EarlyExitAgreement", 3),
        ("NucleusRecovery", 8),
        ("TraceComposition", 4),
    ):
        _, axes = metrics[name].plot()
        assert len(axes.lines) == lines
        drawn = torch.tensor([float(v) for line in axes.lines for v in line.get_ydata()]).double()
        found = metrics[name].compute()
        values = found.values() if isinstance(found, dict) else found.flatten(1, -1).T
        if name == "TraceComposition":
            values = found.sum(1).T
        torch.testing.assert_close(drawn, torch.cat([*values]).float().double())
    figure, _ = metrics["ComputationDensity"].plot()
    assert figure is not None


@pytest.mark.parametrize("share", [0.25, 0.4, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_bounds_are_torchs_quantiles(count: int, share: float) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)).double()
    found = torch.stack(entropy_bounds(values, share))
    wanted = torch.stack((values.quantile(share), values.quantile(1 - share)))
    torch.testing.assert_close(found, wanted, atol=1e-15, rtol=0)


@pytest.mark.parametrize("name", ["per_token", "over_sizes"])
def test_examples_in_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"softtrace.metrics.{name}"))
    assert found.attempted > 10
    assert found.failed == 0


SCRIPT = """
import sys
import torch
from tests.metrics.test_metrics import BATCHES, collection, flat

folder = sys.argv[1]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
metrics = collection()
share = {2: [BATCHES[:3], BATCHES[3:]], 3: [BATCHES[:1], [], BATCHES[1:]]}[world][rank]
for each in share:
    metrics.update(**each)
torch.save(flat(metrics.compute()), f"{folder}/{world}-{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def over_processes(folder: Path, world: int) -> list[Tensor]:
    """What every process of a group computes: unequal shares, in three one has nothing."""
    script = folder / "metrics.py"
    script.write_text(SCRIPT, encoding="utf-8")
    for done in run_ranks([sys.executable, script, folder], world, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_processes_with_unequal_shares_compute_what_one_does(tmp_path: Path, world: int) -> None:
    wanted = of(BATCHES)
    for found in over_processes(tmp_path, world):
        assert (found - wanted).abs().max() < 1e-12


def literal_correlation(one: list[int], other: list[int]) -> float:
    """Spearman's, token by token: a rank is the mean of the places of all equal values."""

    def ranks(values: list[int]) -> list[float]:
        ordered = sorted(values)
        return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]

    x, y = ranks(one), ranks(other)
    middle = (len(x) + 1) / 2
    both = sum((a - middle) * (b - middle) for a, b in zip(x, y, strict=True))
    size = sum((a - middle) ** 2 for a in x) * sum((b - middle) ** 2 for b in y)
    return both / math.sqrt(size) if size else 0.0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_rank_correlation_is_the_literal_one_in_float64(pairs: list[tuple[int, int]]) -> None:
    one, other = map(list, zip(*pairs, strict=True))
    values = torch.tensor(one, dtype=torch.float32)
    found = density_uncertainty_correlation(torch.tensor(other), values, values)["area"]
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(literal_correlation(one, other), abs=1e-12)


def test_two_equal_rankings_correlate_by_one_exactly() -> None:
    values = torch.tensor([0.3, 0.1])
    found = density_uncertainty_correlation(values, values, -values)
    assert (float(found["area"]), float(found["size"])) == (1.0, -1.0)
