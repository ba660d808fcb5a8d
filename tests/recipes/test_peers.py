"""The peers' losses against their papers' formulas, and reading fronts at equal loss."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from recipes.benchmarks.comparison import exit_variants, paired_runs, peers, step_cost
from recipes.benchmarks.comparison import peer_losses as losses
from softtrace.files import write_json
from softtrace.model.loading import load_model, load_tokenizer
from softtrace.tracing.instrument import Instrument
from tests.support.corpus import write_model, write_tree
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.waiting import no_collector

pytestmark = pytest.mark.thorough


def exit_loss(model: Any, ids: torch.Tensor, depth: int) -> torch.Tensor:
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[depth]
    logits = model.lm_head(model.model.norm(hidden))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_every_method_has_the_task_loss_in_it() -> None:
    ids = tiny_prompt(8, batch=3)
    for name, method in losses.METHODS.items():
        model = tiny_model("llama", num_hidden_layers=4, attn_implementation="sdpa")
        own = model(input_ids=ids, labels=ids).loss
        if name == "layerskip":
            method = type("Whole", (method,), {"p_max": 0.0})
        plain = [10.0] * 3 if method.needs_plain else None  # others must do without
        found, task = method(model.train(), 0.5, 0, plain)(ids, 0)
        torch.testing.assert_close(task, own, msg=name)
        found.backward()
        assert model.model.layers[0].mlp.up_proj.weight.grad.any(), name
        if not name.startswith("attention"):  # transformers leaves hooks once it gave attention out
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), name
        if name == "plain":
            assert found == task
        elif name != "layerskip":  # which takes a weighted mean
            assert found > task, name


def test_every_variant_takes_a_step() -> None:
    ids = tiny_prompt(64, batch=2)
    # One for all: what a variant leaves behind is the next one's, and each would be proven anew.
    model = tiny_model("llama", num_hidden_layers=4, attn_implementation="sdpa").train()
    own = model(input_ids=ids, labels=ids).loss.detach()
    for name, variant in exit_variants.VARIANTS.items():
        model.zero_grad()
        plain = [10.0] * 2 if variant.needs_plain else None
        found, task = variant(model, 0.5, 0, plain)(ids, 0)
        torch.testing.assert_close(task, own, msg=name)
        assert found.isfinite(), name
        # From nothing; and a value that stands for its gradient alone.
        assert found > task or name in ("strength rises", "gradient projected"), name
        found.backward()
        assert model.model.layers[0].mlp.up_proj.weight.grad.isfinite().all(), name
        assert all(parameter.requires_grad for parameter in model.parameters()), name
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), name


def test_windows_of_mixed_length_come_in_turns() -> None:
    model = tiny_model("llama", num_hidden_layers=4).train()
    method, ids = exit_variants.VARIANTS["windows of 64 to 512"](model, 0.5), tiny_prompt(40)
    ids, lengths = ids.repeat(1, 4), []
    with patch.object(Instrument, "record", autospec=True, side_effect=Instrument.record) as record:
        for step in range(5):
            method(ids, step)
            lengths.append(record.call_args.args[1].input_ids.shape[1])
    assert lengths == [64, 128, 160, 160, 64]


def test_layerskip_weighs_exits_as_its_paper_does() -> None:
    model, ids = tiny_model("llama", num_hidden_layers=4).train(), tiny_prompt(8, batch=3)
    method = type("Whole", (losses.LayerSkip,), {"p_max": 0.0})(model, 0.5)
    for step in range(6):
        on = step % 3
        early, last = 0.5 * sum(range(on + 1)), 3 + 0.5 * (0 + 1 + 2)
        # hidden_states[-1] is normed already: the last layer's loss is the model's own
        wanted = early * exit_loss(model, ids, on + 1) + last * model(ids, labels=ids).loss
        torch.testing.assert_close(method(ids, step)[0], wanted / (early + last))


def test_layerskip_drops_deep_layers_more_often() -> None:
    model, ids = tiny_model("llama", num_hidden_layers=4).train(), tiny_prompt(6, batch=4)
    method = type("Often", (losses.LayerSkip,), {"p_max": 0.9})(model, 0.0)
    dropped, rows = [0] * 4, 0
    for step in range(150):
        with method.watching(True, method.layers) as read, torch.no_grad():
            method(ids, step)
        rows += len(ids)
        for layer, (before, after) in enumerate(itertools.pairwise(read)):
            dropped[layer] += int((before == after).flatten(1).all(1).sum())
    assert dropped[0] == 0
    for layer in (1, 2):
        rate = 0.9 * (math.exp(layer * math.log(2) / 3) - 1)
        assert dropped[layer] / rows == pytest.approx(rate, abs=4 * math.sqrt(rate / rows))


def test_distillation_is_the_divergence_of_the_exit_that_is_on() -> None:
    model, ids = tiny_model("llama", num_hidden_layers=4).train(), tiny_prompt(8, batch=2)
    method = losses.ExitDistillation(model, 0.3)
    for step in (0, 2, 4):
        hidden = model(input_ids=ids, output_hidden_states=True)
        p = hidden.logits.softmax(-1)
        q = model.lm_head(model.model.norm(hidden.hidden_states[step % 3 + 1])).softmax(-1)
        wanted = 0.3 * (p * (p.log() - q.log())).sum(-1).mean()
        found, task = method(ids, step)
        torch.testing.assert_close(found - task, wanted, atol=1e-5, rtol=1e-4)


def test_attention_penalties_by_hand() -> None:
    attention = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).tril()
    attention = attention / attention.sum(-1, keepdim=True)
    model = tiny_model("llama")
    entropies = [
        -sum(a * math.log(a) for a in row.tolist() if a > 0) for row in attention.flatten(0, 2)
    ]
    found = losses.AttentionEntropy(model, 1.0).penalty(attention)
    assert found.item() == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    shares = [
        1 / (1 + (0.01 / attention[b, h, t, s].item()) ** 2)
        for b in range(2) for h in range(3) for t in range(4) for s in range(t + 1)
    ]  # fmt: skip
    connected = losses.AttentionConnectivity(model, 0.1, 0, [1.0] * 60)
    assert connected.penalty(attention).item() == pytest.approx(sum(shares) / len(shares), rel=1e-4)
    inside = [connected.weight(torch.tensor(1.05), step) for step in range(20)]
    assert all(a < b for a, b in itertools.pairwise(inside))  # within 1 + 0.1: press on
    outside = [connected.weight(torch.tensor(3.0), step) for step in range(20, 60)]
    assert outside[-1] < outside[10] < max(outside)
    with pytest.raises(ValueError, match="paired plain run"):
        losses.AttentionConnectivity(model, 0.1)


def point(loss: float, value: float) -> dict[str, float]:
    return {"loss": loss, "area_easy": value, "exit_easy": value}


def test_a_front_is_read_where_it_meets_the_budget() -> None:
    falling = [point(1.0, 0.3), point(1.005, 0.25), point(1.02, 0.1)]
    assert peers.at_budget(falling, "area_easy") == pytest.approx(0.25 - 0.15 / 3)
    assert peers.at_budget(falling, "exit_easy") == 0.3  # worse than plain: plain is within budget
    rising = [point(1.0, 0.6), point(1.003, 0.8), point(1.004, 0.7)]
    assert peers.at_budget(rising, "exit_easy") == 0.8  # the best inside, not the last
    better = [point(1.0, 0.6), point(0.99, 0.9)]
    assert peers.at_budget(better, "exit_easy") == 0.9
    bent = [point(1.0, 0.3), point(1.02, 0.1), point(1.0, 0.2)]  # a noisy front, by strength
    assert peers.at_budget(bent, "area_easy") == pytest.approx(0.15)
    too_dear = [point(1.0, 0.3), point(1.1, 0.1)]
    assert peers.at_budget(too_dear, "area_easy") == pytest.approx(0.3 - 0.2 * 0.1)


def test_every_exit_is_read_at_the_budget_by_itself() -> None:
    # The second exit is best at a strength that the first one gains nothing from.
    points = [
        {"loss": loss, "exits_all": exits}
        for loss, exits in ((1.0, [0.2, 0.5]), (1.005, [0.1, 0.9]), (1.02, [0.4, 0.8]))
    ]
    assert peers.exits_at_budget(points, "exits_all") == pytest.approx([0.2, 0.9])
    assert peers.exits_at_budget(points, "exits_all", budget=1.0175) == pytest.approx([0.35, 0.9])
    assert peers.exits_at_budget(points, "exits_all", budget=1.02) == [0.4, 0.9]


@pytest.mark.parametrize("by_method", [False, True])
def test_runs_come_seed_by_seed_or_method_by_method(
    by_method: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(peers, "perform_all", lambda tasks, *_: asked.extend(tasks) or iter(()))
    words = ["peers.py", "--out", str(tmp_path / "peers.json"), "--seeds", "2", "--methods"]
    # One that is asked for twice runs once.
    words += ["softtrace=0.1,0.2", "layerskip=1", "softtrace=0.2", *["--by-method"][:by_method]]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="resumes"):
        peers.main()
    names = [(task.method, task.seed) for task in asked]
    assert len(names) == 2 * (1 + 2 + 1)
    if by_method:
        assert [name for name, _ in names] == (
            ["plain"] * 2 + ["softtrace"] * 4 + ["layerskip"] * 2
        )
        assert [seed for _, seed in names] == [0, 1, 0, 0, 1, 1, 0, 1]
    else:
        assert [seed for _, seed in names] == [0] * 4 + [1] * 4


def test_points_are_means_of_paired_ratios() -> None:
    def run(method: str, strength: float, seed: int, loss: float, value: float) -> dict[str, Any]:
        measures = dict.fromkeys(peers.MEASURES, value)
        exits = {key: [value / 2, value] for key in peers.EXITS}
        named = {"method": method, "strength": strength, "seed": seed, "loss": loss}
        return named | measures | exits

    runs = [
        run("plain", 0.0, 0, 1.0, 0.5), run("plain", 0.0, 1, 2.0, 0.7),
        run("layerskip", 0.2, 0, 1.1, 0.2), run("layerskip", 0.2, 1, 2.0, 0.4),
        run("layerskip", 0.1, 0, 1.0, 0.9),
    ]  # fmt: skip
    plain, weak, strong = peers.front(runs, "layerskip")
    assert (plain["loss"], plain["area_easy"]) == (1.0, pytest.approx(0.6))
    assert (weak["strength"], weak["loss"], weak["seeds"]) == (0.1, 1.0, 1)
    alone = peers.front([run for run in runs if run["strength"] != 0.2], "layerskip")
    assert (alone[0]["area_easy"], alone[0]["seeds"]) == (0.5, 1)  # plain's other seed has no pair
    assert strong["loss"] == pytest.approx(1.05)
    assert strong["area_easy"] == pytest.approx(0.3)
    assert strong["exits_all"] == pytest.approx([0.15, 0.3])
    early = run("layerskip", 0.1, 2, 1.0, 0.9)  # before its seed's plain run
    assert peers.paired([*runs, early]) == runs
    assert peers.paired([early]) == []


def test_a_method_is_timed_over_a_whole_number_of_its_periods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=2, max_position_embeddings=64)
    steps: dict[str, list[int]] = {}

    def counting(name: str, own: int) -> type:
        class Counting(losses.Method):
            every = own

            def __call__(self, ids: torch.Tensor, step: int) -> Any:
                steps.setdefault(name, []).append(step)
                return super().__call__(ids, step)

        return Counting

    own = {"plain": 1, "each 3rd": 3, "each 8th": 8, "each 10th": 10}
    monkeypatch.setattr(
        step_cost, "EVERY", {name: counting(name, every) for name, every in own.items()}
    )
    args = argparse.Namespace(model=model, device="cpu", batch_size=2, rounds=2, bf16=False)
    blocks = torch.randint(0, 200, (60, 8), generator=torch.Generator().manual_seed(0))
    found = step_cost.costs(args, blocks, list(own))
    for name, period in {"plain": 8, "each 3rd": 9, "each 8th": 8, "each 10th": 10}.items():
        timed = [
            step for turn in range(3) for step in (1, *range(period * turn, period * (turn + 1)))
        ]
        assert steps[name] == [*timed, 0, 1], name  # and twice for memory
        assert found[name]["rounds"] == 2
    assert found["plain"]["time"]["median"] == found["plain"]["memory"] == 1.0


def test_a_term_comes_again_after_as_many_steps_as_its_masked_runs() -> None:
    model = tiny_model("llama", attn_implementation="sdpa").train()
    periods = {"plain": 1, "layerskip": 1, "softtrace": 1, "softtrace, every 8th": 8, "10th": 10}
    for name, period in periods.items():
        assert exit_variants.EVERY[name](model, 0.1).every == period, name


def measurement(**changes: Any) -> dict[str, Any]:
    usual = {
        "model": "small", "data": "text", "batch_size": 2, "block_size": 8,
        "precision": "float32", "hardware": "a CPU", "neighbours": False, "created": "then",
        "cost": {"plain": 1.0, "softtrace": 1.3, "layerskip": 1.1},
    }  # fmt: skip
    return {**usual, **changes}


def test_a_cost_that_is_measured_anew_replaces_that_of_the_same_loss_and_conditions() -> None:
    known = [
        measurement(), measurement(neighbours=True), measurement(hardware="a GPU"),
        measurement(created="later", cost={"plain": 1.0, "softtrace": 1.4}),
    ]  # fmt: skip
    new = measurement(created="now", cost={"plain": 1.0, "softtrace": 1.2})
    kept = measurement(cost={"plain": 1.0, "layerskip": 1.1})
    assert step_cost.with_measurement(known, new) == [kept, *known[1:3], new]
    assert step_cost.with_measurement([], new) == [new]


def test_cost_goes_into_the_file_with_its_conditions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cost.json"
    monkeypatch.setattr(step_cost, "costs", lambda args, blocks, names: dict.fromkeys(names, 1.0))
    monkeypatch.setattr(peers, "blocks_of", lambda *words: (torch.zeros(1),))
    words = ["peers.py", "--cost", "--device", "cpu", "--out", str(out), "--methods", "softtrace"]
    for more in ([], ["--neighbours", "no"], ["--neighbours", "yes"], ["--neighbours", "no"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        peers.main()
    quiet, beside, unsaid = json.loads(out.read_text())["measurements"][::-1]
    found = (quiet["neighbours"], beside["neighbours"], unsaid["neighbours"])
    assert found == (False, True, None)
    assert quiet["tokens_a_step"] == 16 * 128
    assert set(quiet["cost"]) == {"plain", "softtrace"}
    assert {*step_cost.CONDITIONS, "created", "versions", "command"} < set(quiet)


def test_peak_memory_is_that_of_what_is_alive_at_once() -> None:
    def step() -> None:
        first = torch.ones(1 << 20)
        second = first * 2
        del first
        third = second * 2
        del second, third

    with no_collector():  # what others left behind is not to be let go in between
        assert step_cost.peak_memory(step, "cpu") == pytest.approx(2 * 4 << 20, rel=0.01)


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "peers.json"
    text = write_tree(tmp_path / "text", lines=20)
    model = write_model(tmp_path / "model", num_hidden_layers=4, max_position_embeddings=128)
    words = (
        f"peers.py --steps 2 --seeds 1 --batch-size 4 --blocks 4 --device cpu --out {out} "
        f"--model {model} --data {text} --methods"
    ).split()
    monkeypatch.setattr(paired_runs, "NEW", 8)  # tokens a text
    monkeypatch.setattr(paired_runs, "ELSEWHERE", 8)  # blocks of other text
    monkeypatch.setattr(sys, "argv", [*words, "layerskip=0.2", "--keep", str(tmp_path)])
    peers.main()
    monkeypatch.setattr(peers, "plot", lambda *_: None)  # twice is enough: it takes seconds
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "model",
        "text",
        "plain-0-0",
        "layerskip-0.2-0",
    }
    assert len(load_tokenizer(tmp_path / "plain-0-0")) == 257
    assert load_model(tmp_path / "layerskip-0.2-0").config.num_hidden_layers == 4
    first = json.loads(out.read_text())
    assert [run["method"] for run in first["runs"]] == ["plain", "layerskip"]
    assert {"loss_rare", "loss_elsewhere", "calibration_error"} < set(first["runs"][0])
    monkeypatch.setattr(sys, "argv", [*words, "layerskip=0.2,1"])
    peers.main()
    result = json.loads(out.read_text())
    assert result["runs"][:2] == first["runs"]
    assert [run["strength"] for run in result["runs"]] == [0.0, 0.2, 1.0]
    assert set(result["at_budget"]) == {"plain", "layerskip"}
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "at +1 % held-out loss" in capsys.readouterr().out
    # A row that was lost comes from the model that was kept.
    write_json(out, {**result, "runs": result["runs"][::2]})
    monkeypatch.setattr(paired_runs, "train", None)
    monkeypatch.setattr(sys, "argv", [*words, "layerskip=0.2,1", "--keep", str(tmp_path)])
    peers.main()
    again = json.loads(out.read_text())["runs"]
    assert [again[i] for i in (0, 2, 1)] == result["runs"]
    kept = json.loads((tmp_path / "plain-0-0" / "kept.json").read_text())
    assert kept["losses"] == again[0]["curve"]
    args = argparse.Namespace(**kept["settings"])
    assert paired_runs.kept_losses(tmp_path / "plain-0-0", args) == kept["losses"]
    assert paired_runs.kept_losses(tmp_path / "plain-0-1", args) is None
    args.steps = 3
    with pytest.raises(ValueError, match=r"'steps': 2, .* allowed .*'steps': 3"):
        paired_runs.kept_losses(tmp_path / "plain-0-0", args)
    monkeypatch.setattr(sys, "argv", [*words[:2], "3", *words[3:], "layerskip"])
    with pytest.raises(SystemExit, match="holds runs of other settings"):
        peers.main()
