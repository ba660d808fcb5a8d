"""Self-speculation on every verified type: lossless, or refused with the reason."""

from __future__ import annotations

import pytest
import torch

from softtrace.decoding import (
    StaticDecoder,
    check_cache,
    check_early_exit,
    exit_early,
    generate,
    greedy,
    speculate,
)
from softtrace.errors import UnsupportedModelError
from tests.support.zoo import VERIFIED, tiny

pytestmark = pytest.mark.thorough

#: of transformers 5.23: forwards that run over all layers whatever the config says
IGNORING = {
    *("bigbird_pegasus", "biogpt", "blenderbot", "bloom", "codegen", "cohere2", "cohere2_moe"),
    *("ctrl", "exaone4", "falcon", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox"),
    *("gpt_oss", "gptj", "mbart", "moshi", "mpt", "nemotron", "opt", "pegasus", "persimmon"),
    *("stablelm", "whisper", "xglm"),
}
#: their attention keeps more than keys and values
OWN_CACHE = {"deepseek_v32", "glm_moe_dsa"}
#: no base model of theirs carries the config
NO_BASE = {"llama4_text"}
CASES = sorted(VERIFIED)


def test_most_verified_types_can_draft_for_themselves() -> None:
    refused = IGNORING | OWN_CACHE | NO_BASE
    assert refused <= {kind for kind, _ in VERIFIED.values()}
    assert sum(kind not in refused for kind, _ in VERIFIED.values()) >= 60


@pytest.mark.parametrize("case", CASES)
def test_lossless_or_refused(case: str) -> None:
    kind, changes = VERIFIED[case]
    model = tiny(kind, **changes).eval()
    ids = torch.tensor([[5, 9, 31, 7, 12, 40]])
    if kind in IGNORING | NO_BASE:
        reason = "would be ignored without a word" if kind in IGNORING else "found no base model"
        for refuse in (check_early_exit, lambda m: speculate(m, ids, exit_layer=1)):
            with pytest.raises(UnsupportedModelError, match=reason):
                refuse(model)
        with pytest.raises(UnsupportedModelError, match=reason):
            generate(model, ids, 1)
        return
    proven_exit = check_early_exit(model)
    if kind in OWN_CACHE:
        for refuse in (
            lambda: check_cache(proven_exit),
            lambda: speculate(model, ids, exit_layer=1),
            lambda: exit_early(model, ids, exit_layer=1, confidence=0.5),
        ):
            with pytest.raises(UnsupportedModelError, match=r"does not run with .* DynamicCache"):
                refuse()
        with pytest.raises(UnsupportedModelError, match="does not run over a cache of fixed size"):
            StaticDecoder(model, exit_layer=1, backend=None, proven_exit=proven_exit)
        return
    found = speculate(
        model, ids, exit_layer=1, max_new_tokens=12, draft_tokens=3, confidence=0, eos_token_id=-1,
        proven_exit=check_cache(proven_exit, (1,)),
    )  # fmt: skip
    assert found.tokens.tolist() == greedy(model, ids, 12, -1).tokens.tolist()
    rows = [ids[0], ids[0, 2:5]]
    static = StaticDecoder(
        model, exit_layer=1, draft_tokens=3, rows=2, capacity=18, backend=None, eos_token_id=-1,
        proven_exit=proven_exit,
    )  # fmt: skip
    wanted = [found.tokens.tolist()[:9], greedy(model, rows[1][None], 9, -1).tokens.tolist()]
    assert [each.tokens.tolist() for each in static.speculate(rows, 9)] == wanted
    whole = ids
    for token in found.tokens.tolist():  # and what the model says without any cache
        with torch.no_grad():
            logits = model(input_ids=whole, use_cache=False).logits[0, -1]
        assert logits.max() - logits[token] < 1e-4
        whole = torch.cat((whole, torch.tensor([[token]])), dim=1)


#: what attention sees of a long text: all of it, a window, both by turns, no positions
LONG = ("gemma3_text", "llama", "mistral, window", "smollm3")


@pytest.mark.parametrize("case", LONG)
def test_prompts_of_eight_and_of_two_thousand_tokens_write_as_plainly(case: str) -> None:
    kind, changes = VERIFIED[case]
    window = {"sliding_window": 129} if "sliding_window" in changes else {}
    model = tiny(kind, **{**changes, **window, "max_position_embeddings": 2048}).eval()
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 60, (count,), generator=draw) for count in (8, 2000)]
    proven_exit = check_early_exit(model)
    static = StaticDecoder(
        model, exit_layer=1, draft_tokens=3, rows=2, capacity=2007, backend=None, eos_token_id=-1,
        proven_exit=proven_exit,
    )  # fmt: skip
    wanted = [greedy(model, row[None], 7, -1).tokens.tolist() for row in rows]
    assert [each.tokens.tolist() for each in static.speculate(rows, 7)] == wanted
    found = speculate(
        model, rows[1][None], exit_layer=1, max_new_tokens=7, draft_tokens=3, confidence=0,
        eos_token_id=-1,
    )  # fmt: skip
    assert found.tokens.tolist() == wanted[1]
