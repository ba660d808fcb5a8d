"""What real models write with drafts is what they write plainly."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from softtrace.anatomy.tolerances import tolerance
from softtrace.decoding import StaticDecoder, check_cache, check_early_exit, generate, speculate
from tests.support.real import GEMMA, LONG, SMOLLM, prompt, real_model, real_tokenizer

pytestmark = pytest.mark.real

NEW = 8


class Case(NamedTuple):
    """What one model writes on from."""

    name: str
    dtype: str
    #: how many tokens, and whether ``<bos>`` is the first; each is drafted alone
    prompts: tuple[tuple[int, bool], ...]
    #: how many tokens, of those that are drafted together
    together: tuple[int, ...]


CASES = [
    Case(SMOLLM, "float32", ((64, True), (64, False)), (8, 24, 64)),
    # ties are no excuse but here; a CPU may multiply bfloat16 at an eighth of float32's speed
    Case(SMOLLM, "bfloat16", ((32, True),), (8, 16)),
    # its layers see windows of less than LONG tokens
    Case(GEMMA, "float32", ((64, True), (64, False), (LONG, True)), (8, 64, LONG)),
]


class Decoder:
    """A model whose exits are proven, once for all prompts."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, real_model(case.name, case.dtype)
        self.tokenizer = real_tokenizer(case.name)
        proven_exit = check_early_exit(self.model)
        self.depth = proven_exit.layers // 2
        # at every depth in float32, which takes a fraction of the time
        depths = (self.depth,) if case.dtype == "bfloat16" else ()
        self.proven_exit = check_cache(proven_exit, depths)
        self._plain: dict[tuple[int, ...], Tensor] = {}

    def prompt(self, length: int, bos: bool = True) -> Tensor:
        """``[1, length]`` ids."""
        ids = prompt(self.tokenizer, length, bos=bos)
        assert ids.shape == (1, length)
        return ids

    def plain(self, ids: Tensor) -> Tensor:
        """The new tokens of transformers' own greedy decoding."""
        key = tuple(ids[0].tolist())
        if key not in self._plain:
            found: Tensor = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
            )
            self._plain[key] = found[0, ids.shape[1] :]
        return self._plain[key]

    def assert_plain(self, ids: Tensor, found: Tensor) -> None:
        """The same tokens as plain decoding's, up to a tie that rounding decides."""
        wanted = self.plain(ids)
        count = min(len(found), len(wanted))
        differs = (found[:count] != wanted[:count]).nonzero()
        if not len(differs):
            assert len(found) == len(wanted), ids.shape
            return
        place = int(differs[0])
        with torch.no_grad():
            whole = torch.cat([ids, wanted[None, :place]], dim=1)
            logits = self.model(input_ids=whole).logits[0, -1]
        gap = float((logits[wanted[place]] - logits[found[place]]).abs() / logits.abs().max())
        said = ids.shape, place, found.tolist(), wanted.tolist()
        assert gap <= tolerance(logits.dtype), said


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.name}-{case.dtype}")
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return Decoder(request.param)


def test_drafted_text_is_the_plain_text(decoder: Decoder) -> None:
    for length, bos in decoder.case.prompts:
        ids = decoder.prompt(length, bos)
        proven = {"proven_exit": decoder.proven_exit, "max_new_tokens": NEW}
        drafted = speculate(decoder.model, ids, exit_layer=decoder.depth, confidence=0, **proven)
        assert drafted.drafted > 0
        decoder.assert_plain(ids, drafted.tokens)
        if length <= 64:  # transformers' loop runs all layers again for every check
            by_transformers = generate(decoder.model, ids, decoder.depth, **proven)
            decoder.assert_plain(ids, by_transformers[0, length:])


def test_a_batch_over_a_cache_of_fixed_size_writes_the_plain_texts(decoder: Decoder) -> None:
    rows = [decoder.prompt(length)[0] for length in decoder.case.together]
    static = StaticDecoder(
        decoder.model, exit_layer=decoder.depth, draft_tokens=4, rows=len(rows),
        capacity=max(map(len, rows)) + NEW, backend=None, proven_exit=decoder.proven_exit,
    )  # fmt: skip
    for write in (static.plain, static.speculate):
        for row, found in zip(rows, write(rows, NEW), strict=True):
            decoder.assert_plain(row[None], found.tokens)
