"""Families that can exit early: long prompts, ties of bfloat16, nothing compiled twice.

Of a few kinds of attention and layers, for all 67 families take six minutes on two cores; with
``EVERY_FAMILY=1`` in the environment of all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from softtrace.decoding import StaticDecoder, check_cache, check_early_exit, greedy, speculate
from softtrace.evaluation.decode_ways import largest_tie
from tests.decoding.test_families import IGNORING, NO_BASE, OWN_CACHE
from tests.support.zoo import VERIFIED, of_each_kind, tiny

pytestmark = pytest.mark.slow

CHOSEN = ("deepseek_v3", "gemma3_text", "kolibri1", "lfm2, attention alone", "mistral, window")
#: latent attention with experts, and windows by turns; each takes eight seconds to compile
COMPILED = ("deepseek_v3", "gemma3_text")
#: without those whose long prompts tests/decoding/test_families.py writes from
LONG = ("deepseek_v3", "kolibri1", "lfm2, attention alone")
LONGEST, NEW = 2000, 7
ROUNDINGS = 2 * torch.finfo(torch.bfloat16).eps
"""How far apart scores are, over the largest one's magnitude, that rounding may order."""
#: where rounding orders two experts instead, with the place of the token that is another one then:
#: the first layer's router says -0.148 of one, and -0.141 or -0.151 of another
EXPERTS_TIED = {"kolibri1": 11}


def drafting(some: tuple[str, ...]) -> list[str]:
    refused = IGNORING | OWN_CACHE | NO_BASE
    return [case for case in of_each_kind(some) if VERIFIED[case][0] not in refused]


def model_of(case: str, **changes: Any) -> Any:
    kind, own = VERIFIED[case]
    return tiny(kind, **{**own, **changes}).eval()


def long_model_of(case: str) -> Any:
    """With positions for a long prompt, and with a window that is shorter, if it has one."""
    window = {"sliding_window": 129} if "sliding_window" in VERIFIED[case][1] else {}
    return model_of(case, **window, max_position_embeddings=LONGEST + 48)


def rows_of(*lengths: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (count,), generator=draw) for count in lengths]


@pytest.mark.parametrize("case", drafting(LONG))
@pytest.mark.filterwarnings("ignore")  # of some configs about the length that is asked for here
def test_eight_and_two_thousand_tokens_write_as_plainly(case: str) -> None:
    model = long_model_of(case)
    rows = rows_of(8, LONGEST)
    proven = check_cache(check_early_exit(model), (1,))
    static = StaticDecoder(
        model, exit_layer=1, draft_tokens=3, rows=2, capacity=LONGEST + NEW, backend=None,
        eos_token_id=-1, proven_exit=proven,
    )  # fmt: skip
    wanted = [greedy(model, row[None], NEW, -1).tokens.tolist() for row in rows]
    for write in (static.plain, static.speculate):
        assert [each.tokens.tolist() for each in write(rows, NEW)] == wanted
    eager = speculate(
        model, rows[1][None], exit_layer=1, max_new_tokens=NEW, draft_tokens=3, confidence=0,
        eos_token_id=-1, proven_exit=proven,
    )  # fmt: skip
    assert eager.tokens.tolist() == wanted[1]


@pytest.mark.parametrize("case", drafting(CHOSEN))
def test_in_bfloat16_texts_part_at_ties_alone(case: str) -> None:
    assert_parts_at_ties(model_of(case), rows_of(8, 20), 12, EXPERTS_TIED.get(case, 12))


@pytest.mark.parametrize("case", drafting(CHOSEN[-1:]))
@pytest.mark.filterwarnings("ignore")  # of some configs about the length that is asked for here
def test_so_they_do_after_two_thousand_tokens(case: str) -> None:
    assert_parts_at_ties(long_model_of(case), rows_of(8, LONGEST), NEW, NEW)


def assert_parts_at_ties(model: Any, rows: list[Tensor], new: int, compared: int) -> None:
    """Texts by fixed steps in bfloat16 differ from the eager loop's where two scores are alike.

    Args:
        model: in any dtype.
        rows: two prompts, ``[T]`` each.
        new: tokens that are written for each.
        compared: how many of them count.
    """
    model = model.to(torch.bfloat16)
    static = StaticDecoder(
        model, exit_layer=1, draft_tokens=3, rows=2, capacity=max(map(len, rows)) + new,
        backend=None, eos_token_id=-1,
    )  # fmt: skip
    wanted = [greedy(model, row[None], new, -1) for row in rows]
    wanted = [replace(text, tokens=text.tokens.clone()) for text in wanted]  # of inference mode
    for write in (static.plain, static.speculate):
        found = write(rows, new)
        assert [len(each.tokens) for each in found] == [new, new]
        for texts in (wanted, found):
            for text in texts:
                text.tokens[compared:] = 0
        tie = largest_tie(model, [row[None] for row in rows], wanted, found)
        assert tie is None or tie < ROUNDINGS


@pytest.mark.parametrize("case", drafting(COMPILED))
@pytest.mark.filterwarnings("ignore")  # of the compiler, about code of transformers
def test_each_step_is_one_graph_that_is_compiled_once(case: str) -> None:
    torch._dynamo.reset()
    model = model_of(case)
    static = StaticDecoder(
        model, exit_layer=1, draft_tokens=3, rows=2, capacity=44, backend="eager", eos_token_id=-1
    )
    before = graphs()
    for lengths, new in (((8, 20), NEW), ((3,), 9), ((1, 30), 11), ((9, 2), 1)):
        rows = rows_of(*lengths)
        wanted = [greedy(model, row[None], new, -1).tokens.tolist() for row in rows]
        for write in (static.plain, static.speculate):
            assert [each.tokens.tolist() for each in write(rows, new)] == wanted
        assert graphs() - before == 4  # a token, a guess, the last one and a check
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs that were compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
