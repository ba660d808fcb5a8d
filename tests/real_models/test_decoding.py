"""What real models write with drafts is what they write plainly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from softtrace.anatomy.tolerances import tolerance
from softtrace.decoding import StaticDecoder, check_cache, check_early_exit, generate, speculate
from tests.support.real import GEMMA, LONG, SMOLLM, prompt, real_model, real_tokenizer

pytestmark = pytest.mark.real

NEW = 8
PROMPTS = [(64, True), (64, False), (LONG, True)]
#: of Gemma, whose layers see windows, that in which ties are no excuse
CASES = [(SMOLLM, "float32"), (SMOLLM, "bfloat16"), (GEMMA, "float32")]


class Decoder:
    """A model whose exits are proven, once for all prompts."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.model = name, real_model(name, dtype)
        self.proven_exit = check_cache(check_early_exit(self.model))
        self.depth = self.proven_exit.layers // 2
        self._plain: dict[tuple[int, ...], Tensor] = {}

    def plain(self, ids: Tensor) -> Tensor:
        """The new tokens of transformers' own greedy decoding."""
        key = tuple(ids[0].tolist())
        if key not in self._plain:
            found: Tensor = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
            )
            self._plain[key] = found[0, ids.shape[1] :]
        return self._plain[key]


@pytest.fixture(scope="module", params=CASES)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return Decoder(*request.param)


def assert_same(model: Any, ids: Tensor, found: Tensor, wanted: Tensor) -> None:
    """The same tokens, up to a tie that rounding decides."""
    count = min(len(found), len(wanted))
    differs = (found[:count] != wanted[:count]).nonzero()
    if not len(differs):
        assert len(found) == len(wanted)
        return
    place = int(differs[0])
    with torch.no_grad():
        whole = torch.cat([ids, wanted[None, :place]], dim=1)
        logits = model(input_ids=whole).logits[0, -1]
    gap = float((logits[wanted[place]] - logits[found[place]]).abs() / logits.abs().max())
    assert gap <= tolerance(logits.dtype), (place, found.tolist(), wanted.tolist())


@pytest.mark.parametrize(("length", "bos"), PROMPTS)
def test_drafted_text_is_the_plain_text(decoder: Decoder, length: int, bos: bool) -> None:
    ids = prompt(real_tokenizer(decoder.name), length, bos=bos)
    assert ids.shape == (1, length)
    wanted = decoder.plain(ids)
    proven = {"proven_exit": decoder.proven_exit, "max_new_tokens": NEW}
    drafted = speculate(decoder.model, ids, exit_layer=decoder.depth, **proven)
    assert drafted.drafted > 0
    assert_same(decoder.model, ids, drafted.tokens, wanted)
    if length > 64:
        return  # transformers' loop runs all layers again for every check
    by_transformers = generate(decoder.model, ids, decoder.depth, **proven)
    assert_same(decoder.model, ids, by_transformers[0, length:], wanted)


def test_a_batch_over_a_cache_of_fixed_size_writes_the_plain_texts(decoder: Decoder) -> None:
    tokenizer = real_tokenizer(decoder.name)
    rows = [prompt(tokenizer, length, bos=True)[0] for length in (8, 64, LONG)]
    static = StaticDecoder(
        decoder.model, exit_layer=decoder.depth, draft_tokens=4, rows=3, capacity=LONG + NEW,
        backend=None, proven_exit=decoder.proven_exit,
    )  # fmt: skip
    for write in (static.plain, static.speculate):
        for row, found in zip(rows, write(rows, NEW), strict=True):
            assert_same(decoder.model, row[None], found.tokens, decoder.plain(row[None]))
