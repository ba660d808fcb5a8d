"""Drafted texts that are drawn have the distribution of plain sampling."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softtrace.decoding import Sampling, StaticDecoder
from softtrace.decoding.sampling import SampledSteps
from softtrace.errors import InvalidInputError
from tests.support.tiny import tiny_model

VOCABULARY, NEW, ROWS, CALLS = 7, 2, 512, 5
PROMPT = torch.tensor([3, 5, 4, 6, 3, 5])  # two tokens stand there twice


def model_of(**generation: Any) -> Any:
    model = tiny_model("llama", seed=2, vocab_size=VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.7)  # neither uniform nor certain
    for name, value in {"top_k": None, **generation}.items():
        setattr(model.generation_config, name, value)
    return model


def decoder(model: Any, sampling: Sampling, **options: Any) -> StaticDecoder:
    usual = {"exit_layer": 1, "draft_tokens": NEW, "capacity": 12, "backend": None, "rows": ROWS}
    return StaticDecoder(model, sampling=sampling, **{**usual, "eos_token_id": -1, **options})


def exact(model: Any, processors: list[Any]) -> Tensor:
    """Probability of every text of two tokens, ``[V * V]``, by transformers' own processors."""

    def after(rows: Tensor) -> Tensor:
        with torch.no_grad():
            scores = model(rows).logits[:, -1]
        for processor in processors:
            scores = processor(rows, scores)
        return scores.softmax(-1).double()

    first = after(PROMPT[None])[0]
    second = after(torch.stack([torch.cat((PROMPT, torch.tensor([t]))) for t in range(VOCABULARY)]))
    return (first[:, None] * second).flatten()


def drawn(write: Any, new: int = NEW) -> Tensor:
    """How often each text of two tokens was written, or began one, ``[V * V]``."""
    counts = torch.zeros(VOCABULARY * VOCABULARY, dtype=torch.float64)
    for _ in range(CALLS):
        for found in write([PROMPT] * ROWS, new):
            first, second, *_ = found.tokens.tolist()
            counts[first * VOCABULARY + second] += 1
    return counts


def chance(counts: Tensor, wanted: Tensor) -> float:
    """Probability of a chi-square at least as large, by chance."""
    assert counts[wanted == 0].sum() == 0
    expected, seen = (wanted * counts.sum())[wanted > 0], counts[wanted > 0]
    rare = expected < 5  # one cell for all of them
    if rare.any():
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
        seen = torch.cat((seen[~rare], seen[rare].sum()[None]))
    statistic = ((seen - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], list[Any]]] = {
    "as it is": ({}, {}, []),
    "top-k and top-p": (
        {"temperature": 0.8, "top_k": 4, "top_p": 0.9},
        {},
        [TemperatureLogitsWarper(0.8), TopKLogitsWarper(4), TopPLogitsWarper(0.9)],
    ),
    "min-p": ({"min_p": 0.3}, {}, [MinPLogitsWarper(0.3)]),
    "repetition penalty": (  # whose second token depends on the first
        {"temperature": 1.3},
        {"repetition_penalty": 1.8},
        [RepetitionPenaltyLogitsProcessor(1.8), TemperatureLogitsWarper(1.3)],
    ),
}
"""What is asked of a decoder and of the model's generation config, and what it comes to."""


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.thorough
def test_drafted_texts_have_the_distribution_of_plain_sampling(kind: str) -> None:
    options, generation, processors = KINDS[kind]
    model = model_of(**generation)
    static = decoder(model, Sampling(**options))
    wanted = exact(model, processors)
    assert chance(drawn(static.speculate), wanted) > 0.01
    assert chance(drawn(static.plain), wanted) > 0.01


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{"draft": "lookup"}, {"draft": "both"}, {"confidence": 0.2}])
def test_other_drafts_have_it_too(options: dict[str, Any]) -> None:
    model = model_of()
    static = decoder(model, Sampling(), **options)
    assert chance(drawn(static.speculate), exact(model, [])) > 0.01
    found = static.speculate([PROMPT] * ROWS, NEW)
    assert sum(each.drafted for each in found) > 0


@pytest.mark.thorough
def test_a_second_guess_has_it_too() -> None:
    model = model_of()  # of texts of two tokens only the first is guessed, and judged
    static = decoder(model, Sampling(), draft_tokens=NEW + 1)
    counts = drawn(static.speculate, NEW + 1)
    assert chance(counts, exact(model, [])) > 0.01
    found = static.speculate([PROMPT] * ROWS, NEW + 1)
    assert sum(each.accepted == NEW for each in found) > ROWS // 10


@pytest.mark.thorough
@pytest.mark.parametrize("broken", ["every guess is taken", "drawn anew from the whole model's"])
def test_a_broken_rule_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = SampledSteps.judge

    def judge(self: SampledSteps, guesses: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        if broken == "every guess is taken":
            return torch.ones_like(guesses, dtype=torch.bool), guesses
        right, _ = own(self, guesses, scores)
        anew = (scores / self.noise[:, -1:]).argmax(-1)
        return right, torch.where(right, guesses, anew)

    monkeypatch.setattr(SampledSteps, "judge", judge)
    model = model_of()
    assert chance(drawn(decoder(model, Sampling()).speculate), exact(model, [])) < 1e-6


def test_the_generation_config_is_honoured_or_refused() -> None:
    model = model_of(temperature=0.5, suppress_tokens=[3])
    static = decoder(model, Sampling(seed=3), rows=64)
    found = [each.tokens.tolist() for each in static.speculate([PROMPT] * 64, 4)]
    assert not any(3 in tokens for tokens in found)
    again = decoder(model, Sampling(seed=3), rows=64).speculate([PROMPT] * 64, 4)
    assert [each.tokens.tolist() for each in again] == found
    assert len({tuple(tokens) for tokens in found}) > 8
    one = decoder(model, Sampling(top_k=1), rows=1).speculate([PROMPT], 4)[0]  # the most likely
    greedy = StaticDecoder(
        model, exit_layer=1, capacity=12, backend=None, eos_token_id=-1, draft_tokens=2
    )
    assert torch.equal(one.tokens, greedy.plain([PROMPT], 4)[0].tokens)
    model.generation_config.temperature = 0.7
    with pytest.raises(InvalidInputError, match="changed since the decoder was made"):
        greedy.plain([PROMPT], 4)
    for sampling in (Sampling(temperature=0.0), Sampling(min_p=2.0)):
        with pytest.raises(InvalidInputError, match=r"^sampling or model\.generation_config: "):
            decoder(model, sampling)
    for name, value, said in (
        ("typical_p", 0.5, "TypicalLogitsWarper"),
        ("encoder_repetition_penalty", 1.2, "EncoderRepetitionPenaltyLogitsProcessor"),
        ("num_beams", 3, "num_beams"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            decoder(model_of(**{name: value}), Sampling())


@pytest.mark.thorough
def test_drawing_compiles() -> None:
    model = model_of()
    options = {"rows": 2, "draft_tokens": 2}
    wanted = decoder(model, Sampling(top_k=5), **options)
    compiled = decoder(model, Sampling(top_k=5), **options, backend="eager")
    for row in itertools.chain([PROMPT] * 3):
        assert [each.tokens.tolist() for each in wanted.speculate([row, row[:2]], 3)] == [
            each.tokens.tolist() for each in compiled.speculate([row, row[:2]], 3)
        ]


def test_noise_is_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of no probability would be drawn by it: 0 / 0 is the largest."""
    steps = decoder(model_of(), Sampling(), rows=2)._steps
    assert isinstance(steps, SampledSteps)
    monkeypatch.setattr(Tensor, "exponential_", lambda noise, generator: noise.zero_())
    steps.refresh(1)
    assert (steps.noise > 0).all()
