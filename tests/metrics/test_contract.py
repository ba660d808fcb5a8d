"""What torchmetrics asks of every metric, in the spirit of its own ``MetricTester``.

Public reports of users began where a metric broke this contract: it could not be scripted, moved,
merged, or plotted by a tracker or a collection.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric, MetricCollection, MetricTracker
from torchmetrics.utilities.data import dim_zero_cat

from softtrace import DensityCurve, InvalidInputError
from softtrace.metrics import (
    METRICS,
    ComputationDensity,
    EarlyExitAgreement,
    NucleusRecovery,
    TraceComposition,
)
from softtrace.metrics.functional import (
    computation_density,
    density_uncertainty_correlation,
    early_exit_agreement,
    nucleus_recovery,
    trace_composition,
)
from tests.metrics.test_metrics import BATCHES, batch
from tests.support.numbers import flat

every_metric = pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)

#: metrics whose result is a curve -> lines of one result
CURVES: dict[Any, int] = {EarlyExitAgreement: 3, NucleusRecovery: 8, TraceComposition: 4}


def taken(kind: type[Metric], readings: dict[str, Any]) -> dict[str, Any]:
    """What a metric's ``update`` takes of the readings of a batch."""
    return {
        name: value
        for name, value in readings.items()
        if name != "exits" or kind is EarlyExitAgreement
    }


def updated(kind: Callable[..., Any], batches: list[dict[str, Any]], **options: Any) -> Any:
    metric = kind(**options)
    for each in batches:
        metric.update(**taken(type(metric), each))
    return metric


def states(metric: Metric) -> dict[str, Tensor]:
    return {name: dim_zero_cat(getattr(metric, name)) for name in metric._reductions}


def values(found: Any) -> list[Tensor]:
    return list(found.values()) if isinstance(found, dict) else [found]


@every_metric
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.filterwarnings("ignore:This property will be removed")  # scripting reads all of them
def test_can_be_scripted(kind: type[Metric]) -> None:
    torch.jit.script(kind())
    torch.jit.script(updated(kind, BATCHES[:1]))


@every_metric
def test_what_it_is_cannot_be_changed(kind: type[Metric]) -> None:
    metric = kind()
    for name in ("is_differentiable", "higher_is_better", "full_state_update"):
        with pytest.raises(RuntimeError, match=f"Can't change const `{name}`"):
            setattr(metric, name, None)
    assert metric.state_dict() == {}
    assert isinstance(hash(metric), int)


@every_metric
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "clone", "pickle"],
)
def test_a_copy_computes_the_same_and_lives_on_its_own(
    kind: type[Metric], copied: Callable[[Any], Any]
) -> None:
    metric = updated(kind, BATCHES[:2])
    before = flat(metric.compute())
    other = copied(metric)
    assert torch.equal(flat(other.compute()), before)
    other.update(**taken(kind, BATCHES[3]))
    assert torch.equal(
        flat(other.compute()), flat(updated(kind, [*BATCHES[:2], BATCHES[3]]).compute())
    )
    assert torch.equal(flat(metric.compute()), before)


@every_metric
def test_a_reset_leaves_nothing(kind: type[Metric]) -> None:
    metric, new = updated(kind, BATCHES), kind()
    metric.reset()
    assert metric.update_count == 0
    for name, value in states(metric).items():
        assert torch.equal(value, states(new)[name])
        assert value.dtype == states(new)[name].dtype


@every_metric
def test_a_state_that_was_saved_goes_on(kind: type[Metric]) -> None:
    """Every state can be saved with its module, as ``persistent`` promises."""
    metric, other = updated(kind, BATCHES[:2]), kind()
    for each in (metric, other):
        each.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(**taken(kind, BATCHES[2]))
    assert torch.equal(flat(other.compute()), flat(updated(kind, BATCHES[:3]).compute()))


@every_metric
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_two_processes_compute_what_one_does(kind: type[Metric], cut: int) -> None:
    """The gathering of states is played; tests/metrics/test_metrics.py gathers over processes."""
    wanted = flat(updated(kind, BATCHES).compute())
    other = updated(kind, BATCHES[cut:])
    theirs = iter(states(other).values())
    metric = updated(
        kind,
        BATCHES[:cut],
        dist_sync_fn=lambda state, group: [state, next(theirs)],
        distributed_available_fn=lambda: True,
    )
    metric._update_count = 1  # a process without a batch takes part
    alone = {name: value.clone() for name, value in states(metric).items()}
    torch.testing.assert_close(flat(metric.compute()), wanted, rtol=0, atol=1e-12, equal_nan=True)
    for name, value in states(metric).items():  # and then continues with its own
        assert torch.equal(value, alone[name])


@every_metric
def test_states_merge_either_way(kind: type[Metric]) -> None:
    wanted = flat(updated(kind, BATCHES).compute())
    one = updated(kind, BATCHES[:1])
    one.merge_state(updated(kind, BATCHES[1:]))
    other = updated(kind, BATCHES[:1])
    other.merge_state(
        {
            name: getattr(rest, name)
            for rest in [updated(kind, BATCHES[1:])]
            for name in rest._reductions
        }
    )
    for merged in (one, other):
        torch.testing.assert_close(flat(merged.compute()), wanted, rtol=0, atol=1e-12)


@every_metric
def test_forward_is_the_metric_of_the_batch(kind: type[Metric]) -> None:
    metric = kind()
    for each in BATCHES:
        found = flat(metric(**taken(kind, each)))
        torch.testing.assert_close(found, flat(updated(kind, [each]).compute()), equal_nan=True)
    torch.testing.assert_close(flat(metric.compute()), flat(updated(kind, BATCHES).compute()))


@every_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moves_to_another_dtype(kind: type[Metric], dtype: torch.dtype) -> None:
    wanted = flat(updated(kind, BATCHES).compute())
    metric = updated(kind, BATCHES[:2])
    kept = {name: value.dtype for name, value in states(metric).items()}
    metric.half().bfloat16()  # means the weights of a module that holds it
    assert {name: value.dtype for name, value in states(metric).items()} == kept
    metric.set_dtype(dtype)
    assert {value.dtype for value in states(metric).values()} == {dtype}
    for each in BATCHES[2:]:
        metric.update(**taken(kind, each))
    # of rounded readings: a token of thirty may change its group or its rank
    torch.testing.assert_close(flat(metric.compute()), wanted, rtol=0.02, atol=0.02)


@every_metric
def test_a_module_that_was_moved_before_it_began_counts_in_float64(kind: type[Metric]) -> None:
    module = torch.nn.ModuleDict({"metric": kind()}).to(torch.bfloat16)
    metric: Any = module["metric"]
    for each in BATCHES:
        metric.update(**taken(kind, each))
    found = metric.compute()
    assert {value.dtype for value in values(found)} == {torch.float64}
    assert torch.equal(flat(found), flat(updated(kind, BATCHES).compute()))


def with_gradients(readings: dict[str, Any]) -> dict[str, Any]:
    """The same readings of tensors that ask for a gradient."""
    curve: DensityCurve = readings["curve"]
    tensors = {field.name: getattr(curve, field.name) for field in fields(curve)}
    asking = {
        name: value.detach().clone().requires_grad_()
        for name, value in tensors.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return {**readings, "curve": replace(curve, **asking)}


@every_metric
def test_is_differentiable_says_whether_the_result_is(kind: type[Metric]) -> None:
    metric = kind()
    for each in map(with_gradients, BATCHES[:2]):
        found = metric(**taken(kind, each))
        assert {value.requires_grad for value in values(found)} == {metric.is_differentiable}
    assert {v.requires_grad for v in values(metric.compute())} == {metric.is_differentiable}
    assert {state.requires_grad for state in states(metric).values()} == {False}


def test_the_functional_twins_are_what_the_metrics_compute() -> None:
    tokens = batch(4, seed=9)
    curve, rows = tokens["curve"], tokens["positions"]
    entropy, area, size = curve.entropy[rows], curve.area()[rows], curve.size_at()[rows]
    agreed = tokens["exits"].movedim(0, -1)[rows]
    twins = [
        computation_density(entropy, area, size),
        density_uncertainty_correlation(entropy, area, size),
        early_exit_agreement(entropy, agreed),
        nucleus_recovery(curve.at_sizes(values=curve.nucleus)[:, rows].sum(1), rows.sum()),
        trace_composition(curve.at_sizes(values=curve.composition)[:, rows].sum(1)),
    ]
    for kind, twin in zip(METRICS, twins, strict=True):
        torch.testing.assert_close(flat(updated(kind, [tokens]).compute()), flat(twin))
        assert all(value.dtype == torch.float64 for value in values(twin))


def results_over_time(kind: Any) -> list[Any]:
    return [updated(kind, BATCHES[: count + 1]).compute() for count in range(len(BATCHES))]


@every_metric
def test_one_result_and_several_can_be_plotted(kind: Any) -> None:
    metric, several = updated(kind, BATCHES), results_over_time(kind)
    for val in (None, several[-1], several, tuple(several), several[:1]):
        axes = Figure().add_subplot()
        _, drawn_in = metric.plot(val, axes)
        assert drawn_in is axes
        count = len(val) if isinstance(val, list | tuple) else 1
        # a point or a line over time for each number, or the curve of each result
        lines = count * CURVES[kind] if kind in CURVES else len(several[0])
        assert len(axes.lines) == lines
    figure, _ = metric.plot(several)
    assert figure is not None


@pytest.mark.parametrize("kind", CURVES, ids=lambda kind: kind.__name__)
def test_the_last_of_several_curves_stands_out(kind: Any) -> None:
    several, count = results_over_time(kind), CURVES[kind]
    metric = kind()
    _, axes = metric.plot(several)
    drawn = [line.get_ydata() for line in axes.lines]
    for place, found in enumerate(several):
        alone = metric.plot(found)[1].lines
        for line, own in zip(alone, drawn[place * count :], strict=False):
            assert line.get_ydata().tolist() == own.tolist()
    strength = [line.get_alpha() for line in axes.lines]
    assert strength == sorted(strength)
    assert strength[0] < strength[-1] == 1
    shown = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert shown == [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(shown) == count
    colours = [line.get_color() for line in axes.lines]
    assert colours == colours[:count] * len(several)
    with pytest.raises(InvalidInputError, match="val: found no result"):
        metric.plot([])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_agreement_of_one_layer_or_of_no_token_can_be_plotted() -> None:
    seen = BATCHES[0]
    one = EarlyExitAgreement()
    one.update(**{**taken(EarlyExitAgreement, seen), "exits": seen["exits"][-1:]})
    for metric in (one, EarlyExitAgreement()):
        _, axes = metric.plot()  # torchmetrics squeezes a single number
        assert [len(line.get_ydata()) for line in axes.lines] == [1, 1, 1]


def test_a_collection_hands_lists_over() -> None:
    metrics = MetricCollection([NucleusRecovery(), TraceComposition()])
    found = [metrics(curve=b["curve"], positions=b["positions"]) for b in BATCHES]
    for val, count in ((found, len(found)), (found[0], 1), (None, 1)):
        drawn = [axes for _, axes in metrics.plot(val)]
        assert [len(axes.lines) for axes in drawn] == [8 * count, 4 * count]


@pytest.mark.parametrize("kind", [ComputationDensity, EarlyExitAgreement])
def test_a_tracker_can_be_plotted(kind: Any) -> None:
    tracker = MetricTracker(kind(), maximize=None)
    for each in BATCHES[:3]:
        tracker.increment()
        tracker.update(**taken(kind, each))
    _, axes = tracker.plot(ax=Figure().add_subplot())
    assert axes.lines
