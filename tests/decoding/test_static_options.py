"""Steps of fixed shapes apply what a generation config asks for, or refuse it by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from softtrace.decoding import Sampling, StaticDecoder, check_early_exit, greedy
from softtrace.decoding.static_processors import Places, static_processors
from softtrace.errors import InvalidInputError
from tests.decoding.test_greedy_choice import CHANGING, UNCHANGING, drafting_model
from tests.support.tiny import tiny_prompt

NEW = 12
#: options that look at the text, which these steps apply; others are refused
APPLIED: dict[str, Any] = {
    "repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "min_new_tokens": 9, "min_length": 14,
}  # fmt: skip
#: option -> a value, and what is refused: a processor, or the option itself
REFUSED: dict[str, tuple[Any, str]] = {
    **{name: (value, "Processor|LengthPenalty") for name, value in CHANGING.items()
       if name not in APPLIED and name != "suppress_tokens"},
    **{name: (value, name) for name, value in {
        "num_beams": 2, "num_return_sequences": 2, "guidance_scale": 1.5, "penalty_alpha": 0.5,
        "dola_layers": "low", "stop_strings": ["a"], "max_time": 1.0, "token_healing": True,
        "cache_implementation": "quantized",
    }.items()},
}  # fmt: skip
#: of drawing alone: greedy decoding does not look at them
DRAWN: dict[str, tuple[Any, str | None]] = {
    "temperature": (2.0, None), "top_k": (3, None), "top_p": (0.5, None), "min_p": (0.1, None),
    "typical_p": (0.5, "TypicalLogitsWarper"), "epsilon_cutoff": (0.01, "EpsilonLogitsWarper"),
    "eta_cutoff": (0.01, "EtaLogitsWarper"), "top_h": (0.5, "TopHLogitsWarper"),
}  # fmt: skip


def with_options(model: Any, **options: Any) -> Any:
    model.generation_config = GenerationConfig(pad_token_id=0, **options)
    return model


@pytest.mark.parametrize("option", [*APPLIED, "no_repeat_ngram_size of 2", "all of them"])
def test_what_looks_at_texts_is_applied_to_each_by_its_own(option: str) -> None:
    model = drafting_model("llama")
    rows = [tiny_prompt(length, seed=length)[0] for length in (6, 2, 11)]
    rows[2] = rows[2][:4].repeat(3)[:11]
    plain = [greedy(with_options(model), row[None], NEW).tokens.tolist() for row in rows]
    ends: dict[str, Any] = {"eos_token_id": [plain[0][1], plain[1][2]]}
    options = {option: APPLIED.get(option)}
    if option == "no_repeat_ngram_size of 2":  # texts have to be long enough to repeat themselves
        ends, options = {}, {"no_repeat_ngram_size": 2}
    if option == "all of them":
        options = {**APPLIED, "no_repeat_ngram_size": 2, "suppress_tokens": [plain[0][0]]}
    with_options(model, **ends, **options)
    wanted = [
        model.generate(
            row[None], attention_mask=torch.ones_like(row[None]), do_sample=False,
            max_new_tokens=NEW,
        )[0, len(row) :].tolist()
        for row in rows
    ]  # fmt: skip
    for draft in ("exit", "both"):
        static = StaticDecoder(
            model, exit_layer=2, draft_tokens=3, draft=draft, rows=4, capacity=32, backend=None
        )
        for write in (static.plain, static.speculate):
            assert [each.tokens.tolist() for each in write(rows, NEW)] == wanted
    with_options(model, **ends)
    assert wanted != [greedy(model, row[None], NEW).tokens.tolist() for row in rows]


@pytest.mark.parametrize(
    "processor",
    [
        MinLengthLogitsProcessor(9, 2),
        MinNewTokensLengthLogitsProcessor(5, 4, 2),
        NoRepeatNGramLogitsProcessor(2),
        NoRepeatNGramLogitsProcessor(4),
        RepetitionPenaltyLogitsProcessor(1.5),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_texts_of_every_length_have_the_scores_of_transformers(processor: Any) -> None:
    tokens, scores = torch.tensor([[0, 1, 1, 2] * 4]), torch.randn(1, 12, 7)
    places = Places(tokens, start=torch.tensor([[1]]), prompt=torch.tensor([[5]]))
    (static,) = static_processors([processor], "")
    found = static(scores, places)
    for place in range(12):
        assert torch.equal(found[:, place], processor(tokens[:, : 1 + place], scores[:, place]))
    assert not torch.equal(found, scores)


@pytest.mark.thorough
def test_every_option_is_applied_or_refused() -> None:
    model, ids = drafting_model("llama"), tiny_prompt(6)
    proven_exit = check_early_exit(model)

    def decoder(name: str, value: Any, sampling: Sampling | None = None) -> StaticDecoder:
        model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=2)
        setattr(model.generation_config, name, value)
        return StaticDecoder(
            model, exit_layer=2, draft_tokens=3, capacity=32, backend=None, sampling=sampling,
            proven_exit=proven_exit,
        )  # fmt: skip

    for name, (value, said) in REFUSED.items():
        for sampling in (None, Sampling()):
            with pytest.raises(InvalidInputError, match=said):
                decoder(name, value, sampling)
    applied = {"suppress_tokens": CHANGING["suppress_tokens"], **APPLIED, **UNCHANGING}
    for name, value in {**applied, **{name: value for name, (value, _) in DRAWN.items()}}.items():
        found = decoder(name, value).speculate([ids], NEW)[0].tokens
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
        )
        assert torch.equal(found, wanted[0, 6:]), name
    for name, (value, refused) in DRAWN.items():
        if refused is None:
            assert decoder(name, value, Sampling())._processors
            continue
        with pytest.raises(InvalidInputError, match=refused):
            decoder(name, value, Sampling())
