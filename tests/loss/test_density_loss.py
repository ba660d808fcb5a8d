"""The density term against a literal recomputation, its gradients, and the batches it skips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softtrace
from softtrace import DensityLoss, DensityOptions, DensityTerm
from softtrace.density.distortion import total_variation
from softtrace.errors import InvalidInputError, NonFiniteError
from softtrace.graph.batch import Batch
from softtrace.graph.edges import LayerEdges
from softtrace.graph.masks import hard_masks
from softtrace.loss import density_loss as loss_module
from softtrace.loss.draws import Draw, draw
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.masking import MaskedRun
from tests.support import oracle, zoo
from tests.support.tiny import tiny_model, tiny_prompt

LAYERS = 3


def batch() -> tuple[Tensor, Tensor]:
    """Four rows: whole, left-padded, right-padded, padding alone."""
    ids, mask = tiny_prompt(7, seed=5, batch=4), torch.ones(4, 7, dtype=torch.long)
    mask[1, :2], mask[2, 4:], mask[3] = 0, 0, 0
    return ids, mask


def drawn(options: DensityOptions, counted: Tensor, step: tuple[int, int]) -> Draw:
    length = counted.shape[1]
    found = draw(
        seed=options.seed,
        step=step,
        rank=0,
        counted=counted,
        share=options.share,
        window=length if options.crop is None else min(length, options.crop),
        thresholds=options.thresholds,
        depths=options.depth_bounds(LAYERS),
    )
    assert found is not None
    return found


def literal_weights(scores: list[float], quantile: float, width: float) -> list[float]:
    rank = max(1, min(len(scores), round(quantile * len(scores))))
    bound = sorted(scores)[rank - 1]
    mean = sum(scores) / len(scores)
    spread = width * math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    weights = [1 / (1 + math.exp(-(bound - score) / spread)) for score in scores]
    return [weight if weight >= 0.02 else 0.0 for weight in weights]


def exits(
    instrument: Instrument,
    ids: Tensor,
    mask: Tensor | None,
    masks: Sequence[LayerEdges],
    depths: Tensor,
    attention: Sequence[Tensor] | None,
) -> Tensor:
    """[B, T, V]: a whole masked run, every token read after its own number of layers."""
    batch = instrument.batch(ids, mask)
    run = MaskedRun(instrument.anatomy, batch, masks, attention, keep_hidden=True)
    instrument.forward(run)
    assert run.hidden is not None
    index = depths[None, :, :, None].expand(-1, -1, -1, run.hidden[0].shape[-1])
    return instrument.anatomy.readout.early(torch.stack(run.hidden).gather(0, index)[0])


def literal_term(
    model: nn.Module, options: DensityOptions, ids: Tensor, mask: Tensor, step: int
) -> tuple[float, float, float]:
    """Distortion, trace size and easy share with straight masks, by the oracle, token by token."""
    chosen = drawn(options, mask.bool(), (step, 0))
    entropies, distances, sizes = [], [], []
    for row, tau, depths in zip(chosen.rows, chosen.thresholds, chosen.depths, strict=True):
        real = mask[row].bool()
        prompt, levels = ids[row][real], depths[real].tolist()
        run = oracle.run_full(model, prompt)
        level = 0.0 if options.family == "shallow" else tau.double().item()
        kept = {edge for edge, score in run.importance.items() if score >= level}
        attention = run.attention if options.attention == "recorded" else None
        graph = oracle.build_graph(run)
        for position in range(len(prompt)):
            p = run.logits[position].double().softmax(-1)
            q = oracle.masked_distribution(
                model, prompt, kept, position, attention, levels[position]
            )
            entropies.append(-(p * p.log()).sum().item())
            kl = (p * (p.log() - q.log())).sum().item()
            distances.append(oracle.total_variation(p, q) if options.distance == "tv" else kl)
            ordered = oracle.best_first(graph, position)
            sizes.append(len(oracle.trace_at_threshold(ordered, level)) / len(ordered))
    easy = literal_weights(entropies, options.easy_quantile, options.easy_width)
    total = sum(easy)
    weighed = [
        sum(w * x for w, x in zip(easy, each, strict=True)) / total for each in (distances, sizes)
    ]
    return weighed[0], weighed[1], total / len(easy)


@pytest.mark.parametrize("distance", ["tv", "kl"])
@pytest.mark.parametrize("attention", ["recorded", "recomputed"])
@pytest.mark.parametrize(
    ("subgraphs", "family"), [("both", "llama"), ("sparse", "gpt2"), ("shallow", "mistral"),
                              ("both", "gpt2"), ("sparse", "qwen3"), ("both", "smollm3")]
)  # fmt: skip
def test_straight_terms_equal_a_literal_recomputation(
    family: str, subgraphs: Any, attention: Any, distance: Any
) -> None:
    model = tiny_model(family, seed=6, dtype=torch.float64)
    ids, mask = batch()
    options = DensityOptions(
        strength=0.7, family=subgraphs, attention=attention, distance=distance, share=0.7, seed=3
    )
    penalty = DensityLoss(model, options)
    for step in (0, 5):
        term = penalty(ids, mask, step=step)
        distortion, size, share = literal_term(model, options, ids, mask, step)
        assert term.distortion.item() == pytest.approx(distortion, abs=2e-6, rel=1e-5)
        assert term.loss.item() == pytest.approx(0.7 * distortion, abs=2e-6, rel=1e-5)
        assert term.soft_size.item() == pytest.approx(size, abs=1e-6)
        assert term.easy_share.item() == pytest.approx(share, abs=1e-5)
        assert term.strength == 0.7
        assert term.skipped is None


def test_a_distance_of_ones_own_gives_one_number_a_token() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(6, batch=4)
    options = {"share": 1.0, "distance": lambda p, q: 2 * total_variation(p, q)}
    twice, once = (DensityLoss(model, **each)(ids) for each in (options, {"share": 1.0}))
    assert twice.distortion.item() == pytest.approx(2 * once.distortion.item())
    for wrong in (lambda p, q: total_variation(p, q)[:, None], lambda p, q: (p - q).mean()):
        with pytest.raises(InvalidInputError, match=r"distance: found shape .*one number a token"):
            DensityLoss(model, share=1.0, distance=wrong)(ids)


def test_a_preset_beside_ready_options_is_refused() -> None:
    model = tiny_model("llama")
    assert DensityLoss(model, preset="sparse").options.exits == 0
    with pytest.raises(InvalidInputError, match="preset: found one beside ready options"):
        DensityLoss(model, DensityOptions(), preset="sparse")
    for given in ("sparse", {"preset": "sparse"}, 0.2):
        with pytest.raises(InvalidInputError, match=r"options: found .*, preset='sparse'\)"):
            DensityLoss(model, given)  # type: ignore[arg-type]


def assert_nothing(term: DensityTerm, strength: float) -> None:
    assert term.loss.item() == 0
    for value in (term.distortion, term.soft_size, term.easy_share):
        assert math.isnan(value)  # unknown is not 0
    for value in (term.loss, term.distortion, term.soft_size, term.easy_share):
        assert value.shape == ()
        assert not value.requires_grad
    assert term.strength == strength
    assert term.exit_distance is None


def forbidden(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("nothing may run")


def test_strength_zero_attaches_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "attach", forbidden)
    penalty = DensityLoss(nn.Linear(1, 1), strength=0.0)  # not even a language model
    term = penalty(*batch())
    assert_nothing(term, 0.0)
    assert term.skipped is None


def test_nothing_runs_before_the_start_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = tiny_model("llama"), batch()
    penalty = DensityLoss(model, strength=0.8, start_step=2, warmup_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(Instrument, "record", forbidden)
        for _ in range(2):
            assert_nothing(penalty(ids, mask), 0.0)
    assert [penalty(ids, mask).strength for _ in range(3)] == pytest.approx([0.4, 0.8, 0.8])
    assert penalty.step == 5
    assert penalty(ids, mask, step=2).strength == pytest.approx(0.4)
    assert penalty.step == 5


def test_counted_and_given_steps_draw_alike_and_micro_steps_differ() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(6, batch=6)
    counting, given = DensityLoss(model), DensityLoss(model)
    first = [counting(ids).loss.item() for _ in range(3)]
    assert first == [given(ids, step=step).loss.item() for step in range(3)]
    assert len(set(first)) == 3
    assert given(ids, step=1, micro_step=1).loss.item() not in first
    assert DensityLoss(model, seed=1)(ids, step=1).loss.item() not in first


def test_batches_without_targets_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = tiny_model("llama"), batch()
    penalty = DensityLoss(model, share=1.0)
    monkeypatch.setattr(Instrument, "record", forbidden)
    nowhere = torch.full_like(ids, -100)
    first_only = nowhere.clone()
    first_only[:, 0] = 5  # no position predicts the first token
    padding_only = torch.where(mask.bool(), -100, ids)
    for labels in (nowhere, first_only):
        term = penalty(ids, mask, labels)
        assert_nothing(term, DensityOptions().strength)
        assert term.skipped == "no token of the batch has a target"
    assert penalty(ids, torch.zeros_like(mask)).skipped == "no token of the batch has a target"
    assert padding_only[0].unique().tolist() == [-100]
    assert penalty(ids[:1], mask[:1], padding_only[:1]).skipped is not None


def test_steps_whose_windows_have_no_targets_are_skipped() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(8, batch=2)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = 5  # position 6 alone counts
    penalty = DensityLoss(model, crop=3)  # windows at 0 and 3, 1 and 4, or 2 and 5
    reasons = [penalty(ids, None, labels).skipped for _ in range(20)]
    assert set(reasons) == {None, "no token of the windows has a target"}


def test_rows_of_padding_alone_are_left_out() -> None:
    model, (ids, mask) = tiny_model("gpt2"), batch()
    for options in ({"share": 1.0}, {"share": 0.3}, {"share": 1.0, "masks": "soft"}):
        penalty = DensityLoss(model, **options)
        whole = penalty(ids, mask, step=0)
        without = penalty(ids[:3], mask[:3], step=0)
        assert whole == without


def test_labels_decide_which_positions_count() -> None:
    model, ids = tiny_model("gpt2", seed=3, dtype=torch.float64), tiny_prompt(7, batch=1)
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[0, 6] = 7, 8  # positions 2 and 5 predict them
    options = DensityOptions(share=1.0, easy_quantile=1.0)
    term = DensityLoss(model, options)(ids, None, labels, step=4)
    chosen = drawn(options, torch.ones_like(ids).bool(), (4, 0))
    recording = attach(model).record(attach(model).batch(ids))
    q = exits(
        attach(model),
        ids,
        None,
        hard_masks(recording.importance, chosen.thresholds),
        chosen.depths,
        recording.attention,
    )
    distances = total_variation(recording.logits, q)[0]
    assert term.distortion.item() == pytest.approx((distances[2] + distances[5]).item() / 2)
    assert term.easy_share.item() == 1
    with pytest.raises(InvalidInputError, match="labels: found shape"):
        DensityLoss(model)(ids, None, labels[:, :3])


@pytest.mark.parametrize("masks", ["straight", "soft"])
def test_one_token(masks: Any) -> None:
    model, ids = tiny_model("llama"), torch.tensor([[5]])
    term = DensityLoss(model, masks=masks, thresholds=(0.5, 0.5), family="sparse")(ids)
    term.loss.backward()
    assert 0 < term.loss.item() <= 1.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert DensityLoss(model)(ids, None, ids).skipped == "no token of the batch has a target"


@pytest.mark.thorough
def test_share_and_crop_choose_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), torch.arange(3, 63).reshape(6, 10)
    seen: list[Tensor] = []
    record = Instrument.record

    def spy(self: Instrument, batch: Batch, **options: Any) -> Any:
        seen.append(batch.input_ids)
        return record(self, batch, **options)

    monkeypatch.setattr(Instrument, "record", spy)
    sizes = {(0.5, 4): (6, 4), (0.01, None): (1, 10), (1.0, 99): (6, 10), (0.75, 1): (45, 1)}
    for (share, crop), shape in sizes.items():
        penalty = DensityLoss(model, share=share, crop=crop)
        starts, rows = set(), set()
        for _ in range(30):
            penalty(ids)
            part = seen.pop()
            assert part.shape == shape
            assert (part.diff(dim=1) == 1).all()  # one piece of one row
            assert len(part.unique()) == part.numel()  # no token twice
            starts |= set(((part[:, 0] - 3) % 10).tolist())
            rows |= set(((part[:, 0] - 3) // 10).tolist())
            assert len({int(start) % shape[1] for start in (part[:, 0] - 3) % 10}) == 1
        assert rows == set(range(6))
        slots, room = divmod(10, shape[1])
        assert starts == {o + k * shape[1] for o in range(room + 1) for k in range(slots)}


def test_tokens_of_no_finite_easiness_never_count() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(8, batch=2)

    def odd(logits: Tensor, targets: Tensor) -> Tensor:  # integers, too
        return torch.where(torch.arange(8) % 2 == 0, torch.arange(8), 99).expand(2, 8)

    def never(logits: Tensor, targets: Tensor) -> Tensor:
        return odd(logits, targets).float().masked_fill(torch.arange(8) % 2 == 1, math.inf)

    both = [
        DensityLoss(model, easiness=each, easy_quantile=quantile, share=1.0)(ids, step=0)
        for each, quantile in ((odd, 0.5), (never, 1.0))
    ]
    assert both[1].loss > 0
    assert both[0].skipped is both[1].skipped is None
    term = DensityLoss(model, easiness=lambda p, t: never(p, t) * math.inf, share=1.0)(ids)
    assert term.skipped == "no token of the windows has a finite easiness"
    assert_nothing(term, DensityOptions().strength)


def broken_model() -> tuple[nn.Module, DensityLoss, DensityLoss]:
    model = tiny_model("llama")
    stops, skips = DensityLoss(model), DensityLoss(model, on_nonfinite="skip")
    with torch.no_grad():
        oracle.blocks(model)[0].mlp.down_proj.weight[0, 0] = math.nan
    return model, stops, skips


def test_weights_that_are_not_finite() -> None:
    _, stops, skips = broken_model()
    ids, mask = batch()
    with pytest.raises(NonFiniteError, match=r"^step 7: logits of the full model: .* NaN or inf"):
        stops(ids, mask, step=7)
    term = skips(ids, mask, step=7)
    assert_nothing(term, DensityOptions().strength)
    assert str(term.skipped).startswith("step 7: logits of the full model")


def test_skipped_steps_are_told_of_but_never_in_a_flood(caplog: pytest.LogCaptureFixture) -> None:
    model, *_ = broken_model()
    skips = DensityLoss(model, on_nonfinite="skip", exits=0.0)
    for step in range(9):
        skips(*batch(), step=step)
    told = [
        record.getMessage()
        for record in caplog.records
        if record.name == "softtrace.loss.non_finite"
    ]
    assert [text.split()[1] for text in told] == ["0:", "1:", "3:", "7:"]
    assert all(
        text.endswith(f"so far {n} times.") for text, n in zip(told, (1, 2, 4, 8), strict=True)
    )


def test_a_masked_run_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = tiny_model("llama"), batch()
    monkeypatch.setattr(
        Instrument,
        "exit_logits",
        lambda self, batch, *rest, **_: torch.full((int(rest[2].sum()), 67), math.inf),
    )
    with pytest.raises(NonFiniteError, match="step 0: logits of the masked run"):
        DensityLoss(model)(ids, mask)
    assert "masked run" in str(DensityLoss(model, on_nonfinite="skip")(ids, mask).skipped)


def test_malformed_batches_are_refused_also_when_skipping() -> None:
    penalty = DensityLoss(tiny_model("llama"), on_nonfinite="skip")
    with pytest.raises(InvalidInputError, match="found ids from 3 to 67, allowed are 0 to 66"):
        penalty(torch.tensor([[3, 67]]))
    with pytest.raises(InvalidInputError, match="attention_mask"):
        penalty(torch.tensor([[3, 6]]), torch.ones(2, 2))


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_lists_of_ids_are_refused_at_every_step(strength: float) -> None:
    penalty = DensityLoss(tiny_model("llama"), strength=strength)
    lists: Any = [[3, 6]]
    with pytest.raises(InvalidInputError, match=r"found list, expected .*; pass torch\.tensor\("):
        penalty(lists)
    assert penalty.step == 0  # it was none


def test_options_and_changes() -> None:
    model, base = tiny_model("llama"), DensityOptions(strength=0.2, seed=4)
    assert DensityLoss(model, base, share=0.25).options == DensityOptions(
        strength=0.2, seed=4, share=0.25
    )
    assert DensityLoss(model, base).options == base
    assert DensityLoss(model).options == DensityOptions()
    with pytest.raises(TypeError):
        DensityLoss(model, no_such_option=1)
    with pytest.raises(InvalidInputError, match="share: found 0"):
        DensityLoss(model, base, share=0)


def test_a_callable_easiness_sees_the_sub_batch() -> None:
    model, (ids, mask) = tiny_model("llama"), batch()
    seen = []

    def score(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append((logits, targets))
        return torch.arange(targets.numel()).reshape(targets.shape).to(logits.dtype)

    term = DensityLoss(model, easiness=score, share=1.0, easy_width=0.0, easy_quantile=0.5)(
        ids, mask
    )
    logits, targets = seen[0]
    assert logits.shape == (3, 7, 67)
    assert not logits.requires_grad
    assert targets.shape == (3, 7)
    # the last token's is unknown; rows come in any order, the one of padding alone does not
    known = (targets >= 0).sum(1) + 1
    assert sorted(known.tolist()) == sorted(mask.sum(1).tolist())[1:]
    assert term.easy_share.item() == pytest.approx(round(0.5 * int(mask.sum())) / mask.sum().item())
    with torch.no_grad():
        assert not softtrace.DensityLoss(model)(ids, mask).loss.requires_grad


def test_a_term_without_any_gradient_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, (ids, mask) = tiny_model("llama"), batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "k_proj" in name)
    silent = DensityLoss(model, exits=0.0, attention="recomputed")
    density = DensityLoss(model, exits=0.0)
    with caplog.at_level("WARNING"):
        assert silent(ids, mask, step=0).loss.requires_grad
        with torch.no_grad():
            density(ids, mask, step=0)  # nobody asked for one
        assert not caplog.records
        for step in range(2):
            assert not density(ids, mask, step=step).loss.requires_grad
    [record] = caplog.records
    assert "no gradient" in record.getMessage()
    assert "attention='recomputed'" in record.getMessage()


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "flex_olmo"]
)
def test_a_mixtures_loss_of_its_routers_is_no_part_of_our_runs(kind: str) -> None:
    """``output_router_logits``, which trl turns on: their own runs would count rows left out."""
    ids, mask = batch()
    labels, found = ids.masked_fill(mask == 0, -100), []
    for routers in (False, True):
        model = zoo.tiny(kind, output_router_logits=routers).train()
        density = DensityLoss(model, share=1.0, crop=4)
        torch.manual_seed(0)  # PhiMoE's routers draw noise in training
        with density.watching() as watched:
            task = model(input_ids=ids, attention_mask=mask, labels=labels)
        assert (getattr(task, "router_logits", None) is not None) == routers
        term = density(ids, mask, labels, step=0, watched=watched)
        (task.loss + term.loss).backward()
        assert model.config.output_router_logits == routers
        found.append((term.loss.detach(), term.exit_distance))
    torch.testing.assert_close(found[0], found[1])
