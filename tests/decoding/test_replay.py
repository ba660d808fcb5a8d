"""Replayed drafting against drafting, and the choice among ways to draft against all of them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softtrace.decoding import ProvenExit, check_cache, check_early_exit, greedy, speculate
from softtrace.decoding.recommend import guesses_of
from softtrace.decoding.replay import (
    CONFIDENCES,
    LONGEST,
    Guesses,
    best_drafting,
    check_costs,
    replay,
)
from softtrace.evaluation.decode_race import guesses_on
from softtrace.tracing.attach import attach
from tests.support.tiny import tiny_model, tiny_prompt

NEW = 24


def _text_of(model: torch.nn.Module, prompt: torch.Tensor) -> Guesses:
    tokens = greedy(model, prompt, NEW, -1).tokens
    instrument = attach(model)
    whole = torch.cat((prompt, tokens[None, :-1]), dim=1)
    recording = instrument.record(instrument.batch(whole), keep_hidden=True, keep_attention=False)
    return guesses_of(instrument, recording, slice(prompt.shape[1] - 1, None), tokens[None])


class Drafted(NamedTuple):
    """A model whose exits are proven, and texts of it to speculate on and to replay."""

    proven: ProvenExit
    prompts: list[torch.Tensor]
    texts: list[Guesses]


@pytest.fixture(scope="module")
def drafted() -> Drafted:
    model = tiny_model("llama", num_hidden_layers=3).double().eval()
    with torch.no_grad():  # so that some guesses are right and some are not
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
    draws = torch.Generator().manual_seed(3)
    prompts = [torch.randint(model.config.vocab_size, (1, 5), generator=draws) for _ in range(4)]
    texts = [_text_of(model, prompt) for prompt in prompts]
    return Drafted(check_cache(check_early_exit(model), (1, 2)), prompts, texts)


@pytest.mark.thorough
@pytest.mark.parametrize("confidence", [0.0, 0.15, 0.25])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_replay_accepts_and_checks_as_speculation_does(
    drafted: Drafted, count: int, confidence: float
) -> None:
    sure = torch.tensor([text.sure for text in drafted.texts])
    for gate in (0.15, 0.25):  # so that drafts end, and not at once
        assert 0.1 < (sure >= gate).double().mean() < 0.9
    for depth in (1, 2):
        found = replay(drafted.texts, depth, count, confidence, 0.3, [1.0] * count)
        runs = [
            speculate(
                drafted.proven.model, prompt, exit_layer=depth, max_new_tokens=NEW,
                draft_tokens=count, confidence=confidence, eos_token_id=-1,
                proven_exit=drafted.proven,
            )
            for prompt in drafted.prompts
        ]  # fmt: skip
        assert found.accepted == sum(run.accepted for run in runs)
        assert found.checks == sum(run.checks for run in runs)
        assert found.accepted + found.checks == 4 * (NEW - 1)
        if not confidence:  # else it is not known how long a wrong draft continues
            assert found.drafted == sum(run.drafted for run in runs)
    assert 0 < found.accepted < found.drafted or confidence or count == 1


def test_what_is_spent_is_counted() -> None:
    right = [[True, True, False, True, True, True]]
    sure = [[0.9, 0.9, 0.8, 0.1, 0.9, 0.9]]
    found = replay([Guesses(right, sure)], 1, 3, 0.0, 0.25, [1.5, 2.0, 2.5], 0.125)
    # tokens 1 (right) and 2 (wrong, so the check writes it); 3 and 4 (right) and 5, of the check
    assert (found.drafted, found.accepted, found.checks) == (4, 3, 2)
    assert found.speedup == 5 / (2 * (2.5 + 3 * 0.25 - 0.125))
    # the same tokens: 1 (right), 2 (wrong); 3 (sure) and 4, for the guess is not, with its head
    found = replay([Guesses(right, sure)], 1, 3, 0.5, 0.25, [1.5, 2.0, 2.5], 0.125)
    assert (found.drafted, found.accepted, found.checks) == (3, 2, 3)
    spent = (2.5 + 3 * 0.25 - 0.125) + (2.0 + 2 * 0.25) + (1.5 + 0.25 - 0.125)
    assert found.speedup == 5 / spent


def test_a_guess_below_the_confidence_ends_its_draft() -> None:
    right = [[True] * 8]
    sure = [[0.9, 0.1, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9]]
    found = replay([Guesses(right, sure)], 1, 6, 0.5, 0.25, [1.0] * 6)
    # 1; 2 and 3, and 4; 5 and 6, and 7, the last of the text: checks write 1, 4 and 7
    assert (found.drafted, found.accepted, found.checks) == (4, 4, 3)
    assert replay([Guesses(right, sure)], 1, 6, 0.0, 0.25, [1.0] * 6).checks == 2


@given(st.integers(0, 10**6), st.floats(0.05, 0.9), st.floats(1, 1.6))
def test_the_best_way_is_the_best_of_all(seed: int, cost: float, check: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    right = torch.rand(2, 12, generator=draws) < torch.tensor([[0.5], [0.8]])
    texts = [Guesses(right.tolist(), torch.rand(2, 12, generator=draws).tolist())]
    costs = {1: cost, 2: 1.5 * cost}
    checks = {layer: [check / layer + 0.05 * n for n in range(LONGEST)] for layer in costs}
    found = best_drafting(texts, (1, 2), costs, checks)
    ways = itertools.product((1, 2), range(1, LONGEST + 1), CONFIDENCES)
    every = [replay(texts, d, k, c, costs[d], checks[d]).speedup for d, k, c in ways]
    assert found.speedup == max(every)
    again = replay(
        texts, found.exit_layer, found.draft_tokens, found.confidence, costs[found.exit_layer],
        checks[found.exit_layer],
    )  # fmt: skip
    assert again == found
    fixed = best_drafting(texts, (2,), costs, checks, draft_tokens=3, confidence=0.5)
    assert fixed == replay(texts, 2, 3, 0.5, costs[2], checks[2])


@given(st.integers(2, 40), st.floats(0, 0.5), st.floats(0, 0.3), st.floats(-0.002, 0.002))
def test_a_check_costs_what_the_layers_above_take(
    layers: int, besides: float, each: float, noise: float
) -> None:
    """A run of a layers over n tokens takes besides + (1 - besides) a (1 + each (n - 1)) / L."""

    def run(depth: int, tokens: int) -> float:
        return besides + (1 - besides) * depth * (1 + each * (tokens - 1)) / layers

    costs = {depth: run(depth, 1) + noise * (-1) ** depth for depth in range(1, layers)}
    found = check_costs(costs, [run(layers, n) for n in range(1, 6)])
    assert list(found) == list(costs)
    for depth, checks in found.items():
        wanted = [run(layers - depth, n) for n in range(1, 6)]
        assert checks == pytest.approx(wanted, abs=0.01)


def test_what_a_run_takes_besides_layers_is_no_more_than_a_token() -> None:
    found = check_costs({1: 1.2, 2: 1.1}, [1.0, 2.0])  # a line that begins at 1.3
    assert found == {1: pytest.approx([1, 1 + 2 / 3]), 2: pytest.approx([1, 1 + 1 / 3])}


def test_an_unsure_guess_is_none_too_sure() -> None:
    """As ``speculate`` has it, a confidence that is not a number ends the draft."""
    text = Guesses([[True] * 6], [[float("nan")] * 6])
    assert replay([text], 1, 4, 0.5, 0.25, [1.0] * 4).checks == 5


def test_how_sure_an_exit_is_is_replayed_as_it_is_asked() -> None:
    """Of two tokens that are left one has half of the probability at least; the exit has not."""
    model, prompt = tiny_model("llama", seed=2), tiny_prompt(5)
    model.generation_config.suppress_tokens = list(range(2, model.config.vocab_size))
    found = replay(guesses_on(model, [prompt], NEW), 1, 5, 0.4, 0.3, [1.0] * 5)
    run = speculate(
        model, prompt, exit_layer=1, max_new_tokens=NEW, draft_tokens=5, confidence=0.4,
        eos_token_id=-1,
    )  # fmt: skip
    assert (found.accepted, found.checks) == (run.accepted, run.checks)
