"""The steps of decoding with fixed shapes: read, guess, check, each without a word to the host.

All that a step reads and changes are tensors that stay where they are, so that a step can be
compiled, and captured in a CUDA graph and replayed.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from softtrace.collecting import none_collected
from softtrace.decoding.confidence import surest
from softtrace.decoding.static_model import StaticModel
from softtrace.decoding.static_processors import Places, StaticProcessor
from softtrace.errors import UnsupportedModelError
from softtrace.model.state import adapters_of

LONGEST_MATCH = 3
"""Tokens that are compared at most where what a text says next is looked up in it."""


class Texts:
    """What a batch of texts holds, and how far each of them is.

    Args:
        rows: B.
        capacity: C, tokens that a text has room for.
        ends: tokens that end a text.
        device: of all tensors.

    Attributes:
        tokens: ``[B, C]`` int64; what lies behind ``length`` are guesses.
        length: ``[B, 1]`` int64, tokens that are written. The cache holds all but the last one.
        prompt: ``[B, 1]`` int64, tokens of the prompt.
        limit: ``[B, 1]`` int64, how long a text may become.
        ended: ``[B, 1]`` bool. Texts that have ended are run along and change no more.
        drafted, reached, accepted, checks: ``[B, 1]`` int64; see
            :class:`softtrace.decoding.Generation`.
    """

    def __init__(self, rows: int, capacity: int, ends: Sequence[int], device: torch.device) -> None:
        def zeros(columns: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(rows, columns, dtype=dtype, device=device)

        self.tokens, self.length, self.limit = zeros(capacity), zeros(1), zeros(1)
        self.prompt = zeros(1)
        self.ended = zeros(1, torch.bool)
        self.drafted, self.reached = zeros(1), zeros(1)
        self.accepted, self.checks = zeros(1), zeros(1)
        self.ends = torch.tensor([*ends], dtype=torch.long, device=device)
        self.begin([], 0)

    def begin(self, prompts: Sequence[Tensor], new_tokens: int) -> None:
        """Take up prompts, ``[T]`` each; rows without one have ended."""
        for tensor in (self.drafted, self.reached, self.accepted, self.checks):
            tensor.zero_()
        self.length.fill_(1)
        self.ended.fill_(True)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = prompt
            self.length[row], self.ended[row] = len(prompt), False
        self.prompt.copy_(self.length)
        self.limit.copy_(self.length + new_tokens)

    def room(self) -> Tensor:
        """Tokens that each text may still get, ``[B, 1]``; 0 where it has ended."""
        return torch.where(self.ended, 0, self.limit - self.length)

    def at(self, start: Tensor, count: int) -> Tensor:
        """Tokens ``[B, count]`` at positions ``start`` ``[B, 1]`` and after."""
        return self.tokens.gather(1, start + torch.arange(count, device=start.device))

    def put(self, start: Tensor, tokens: Tensor) -> None:
        """Write tokens ``[B, N]`` at positions ``start`` ``[B, 1]`` and after."""
        places = start + torch.arange(tokens.shape[1], device=start.device)
        self.tokens.scatter_(1, places, tokens)

    def settle(self, right: Tensor, written: Tensor, read: Tensor | None = None) -> None:
        """Advance by the guesses that are right, and by the token that comes for the next.

        Args:
            right: ``[B, N]`` bool, which guesses the model agrees to.
            written: ``[B, N]``, what it says in their place: the guesses where they are right.
            read: ``[1]`` int64, how many tokens were read to guess these: the last text's token,
                and all guesses. So there is one guess less. None where nothing was guessed.
        """
        count = written.shape[1]
        places = torch.arange(count, device=written.device)[None]
        agreed = right.long().cumprod(1).sum(1, keepdim=True)
        room, going = self.limit - self.length, (~self.ended).long()
        if read is not None:  # behind them the check read what means nothing
            room = torch.minimum(room, read)
        step = torch.minimum(agreed + 1, room)
        if len(self.ends):
            ends = (written[..., None] == self.ends).any(-1)
            first = torch.where(ends, places, count).amin(1, keepdim=True)
            step = torch.minimum(step, first + 1)
            self.ended.logical_or_(first < step)
        self.put(self.length, written)
        if read is not None:
            guesses = (room - 1) * going
            reached = torch.minimum(step, guesses) * going
            self.drafted.add_(guesses)
            self.reached.add_(reached)
            self.accepted.add_(torch.minimum(agreed, reached))
        self.checks.add_(going)
        self.length.add_(step * going)
        self.ended.logical_or_(self.length >= self.limit)


class Steps:
    """Steps of plain and of drafted greedy decoding.

    Args:
        model: whose ``start`` they move.
        texts: that they write.
        draft_tokens: K, tokens that a check writes at most: one more than are guessed before it.
        processors: what changes the logits, in this order.
        doubting: whether steps note how sure a guess is.
    """

    def __init__(
        self,
        model: StaticModel,
        texts: Texts,
        draft_tokens: int,
        processors: Sequence[StaticProcessor] = (),
        doubting: bool = False,
    ) -> None:
        self.model, self.texts, self.processors = model, texts, processors
        self.doubting = doubting
        self.place = torch.zeros(1, dtype=torch.long, device=model.device)
        model.choose("first")
        logits, stream = model.first(texts.at(model.start, 1))
        self.streams = stream.repeat(1, draft_tokens, 1)  # what the first layers gave for a draft
        self.vocabulary = logits.shape[2]
        self.drafted = torch.zeros_like(self.place)  # tokens that a draft has read
        self.sure = surest(logits)
        self.found = torch.zeros_like(texts.ended)

    def begin(self) -> None:
        """Forget a draft that was interrupted; not part of a step."""
        self.place.zero_()
        self.found.zero_()

    def refresh(self, count: int) -> None:
        """Prepare what the next steps draw so many tokens by; not part of a step."""

    def plain(self) -> None:
        """Write one token with all layers."""
        texts = self.texts
        self.model.start.copy_(texts.length - 1)
        logits = self.model.whole(texts.at(self.model.start, 1))
        token = self.choose(self.scores(logits, texts.length))
        texts.settle(torch.zeros_like(token, dtype=torch.bool), token)

    def guess(self) -> None:
        """Guess one token with the first layers."""
        self.model.start.copy_(self.texts.length - 1 + self.place)
        logits, stream = self.model.first(self.texts.at(self.model.start, 1))
        after = self.model.start + 1
        self.texts.put(after, self.choose(self.scores(logits, after)))
        if self.doubting:
            self.sure.copy_(surest(logits))
        self._keep(stream)

    def follow(self) -> None:
        """Read the last guess with the first layers, for the check: it says what comes next."""
        self.model.start.copy_(self.texts.length - 1 + self.place)
        self._keep(self.model.stream(self.texts.at(self.model.start, 1)))

    def _keep(self, stream: Tensor) -> None:
        self.streams.index_copy_(1, self.place, stream)
        self.place.add_(1).remainder_(self.streams.shape[1])

    def check(self, count: int) -> None:
        """Read so many tokens, all but the first of them guesses, with the other layers."""
        tokens = self._drafted(count)
        self._settle(self.model.rest(tokens, self.streams[:, :count]))

    def look_up(self) -> None:
        """Guess what followed the last tokens where they stood before, all guesses at once."""
        guesses, found = looked_up(self.texts.tokens, self.texts.length, self.streams.shape[1])
        self.texts.put(self.texts.length, guesses)
        self.found.copy_(found)
        self.place.zero_()

    def read(self, count: int) -> None:
        """Read so many tokens likewise that no layer has read, with all layers."""
        tokens = self._drafted(count)
        self._surely_guessed(self.texts.at(self.texts.length, count))
        self._settle(self.model.whole(tokens))

    def _surely_guessed(self, guesses: Tensor) -> None:
        """Note that guesses ``[B, N]`` were not drawn."""

    def _drafted(self, count: int) -> Tensor:
        """The text's last token and the guesses, ``[B, N]``: what the check reads."""
        self.model.start.copy_(self.texts.length - 1)
        # After a full draft the place is the first one again.
        self.drafted.copy_(torch.where(self.place == 0, count, self.place))
        self.place.zero_()
        return self.texts.at(self.model.start, count)

    def _settle(self, logits: Tensor) -> None:
        guesses = self.texts.at(self.texts.length, logits.shape[1])
        right, written = self.judge(guesses, self.scores(logits, self.texts.length))
        self.texts.settle(right, written, self.drafted)

    def scores(self, logits: Tensor, start: Tensor) -> Tensor:
        """What tokens at ``start`` and after are chosen by, ``[B, N, V]``, for logits likewise."""
        if not self.processors:
            return logits
        places = Places(self.texts.tokens, start, self.texts.prompt)
        scores = logits.float()  # as generate does
        for processor in self.processors:
            scores = processor(scores, places)
        return scores

    def choose(self, scores: Tensor) -> Tensor:
        """Tokens ``[B, 1]`` for scores ``[B, 1, V]``."""
        return scores.argmax(-1)

    def judge(self, guesses: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Which guesses are right, ``[B, N]`` bool, and what is written in their places.

        Behind the guesses, where the check writes the model's own token, nothing is asked.
        """
        best = scores.argmax(-1)
        return guesses == best, best


def looked_up(tokens: Tensor, length: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What followed the last tokens of a text where they stood before (prompt lookup).

    Of the places with the longest match, of up to :data:`LONGEST_MATCH` tokens, the last is taken.

    Args:
        tokens: ``[B, C]`` int64.
        length: ``[B, 1]`` int64, how many of them are the text.
        count: N, guesses to make. Where the text ends before, what stands there is repeated.

    Returns:
        Guesses ``[B, N]``, and whether at least two tokens stood before, ``[B, 1]`` bool.
    """
    capacity = tokens.shape[1]
    places = torch.arange(capacity, device=tokens.device)[None]
    alike = places < length - 1
    matched = torch.zeros_like(tokens)
    for back in range(LONGEST_MATCH):
        last = tokens.gather(1, (length - 1 - back).clamp_min(0))
        alike = alike & (tokens.roll(back, 1) == last) & (places >= back)
        matched = matched + alike
    best = (matched * capacity + places).amax(1, keepdim=True)
    found, place = best >= 2 * capacity, best % capacity
    place = torch.where(found, place, (length - 2).clamp_min(0))
    period = (length - 1 - place).clamp_min(1)
    return tokens.gather(1, place + 1 + places[:, :count] % period), found


class Runner:
    """Runs steps: as they are, compiled, or captured in CUDA graphs.

    Args:
        model: that is told which part is run next.
        backend: of ``torch.compile``; None compiles nothing.
        cuda_graphs: capture every step once and replay it.
    """

    def __init__(self, model: StaticModel, backend: str | None, cuda_graphs: bool) -> None:
        self.model, self.backend, self.cuda_graphs = model, backend, cuda_graphs
        self._ready: dict[tuple[Any, ...], Callable[[], Any]] = {}
        self._made_with: tuple[list[int], Hashable] = [], ()

    @property
    def fixed(self) -> bool:
        """Whether a step of other numbers would have to be made ready first."""
        return self.backend is not None or self.cuda_graphs

    def run(self, part: str, step: Callable[..., None], *numbers: int) -> None:
        """Run ``step(*numbers)``; ``part`` is what it runs of the model."""
        self.model.choose(part)
        if self.fixed:
            self._ready[step.__name__, *numbers]()
        else:
            step(*numbers)

    def forget_if_changed(self, model: nn.Module) -> None:
        """Forget what was made ready if weights lie elsewhere now, or adapters were switched.

        A graph reads where weights lay, and runs what was run when it was captured.
        """
        places = [weight.data_ptr() for weight in (*model.parameters(), *model.buffers())]
        now = places, adapters_of(model.modules())
        if now != self._made_with:
            self._ready.clear()
            self._made_with = now

    def make_ready(self, part: str, step: Callable[..., None], *numbers: int) -> None:
        """Compile or capture a step, once. It is run for that, and changes the texts."""
        if not self.fixed or (step.__name__, *numbers) in self._ready:
            return
        self.model.choose(part)
        call: Callable[[], Any] = _own_code(step, numbers)
        if self.backend is not None:
            call = self._compiled(call, self.backend)
        if self.cuda_graphs:
            call = self._captured(call)
        self._ready[step.__name__, *numbers] = call

    def _compiled(self, call: Callable[[], Any], backend: str) -> Callable[[], Any]:
        """Compile a call as one graph."""
        try:
            compiled = torch.compile(call, backend=backend, dynamic=False, fullgraph=True)
            compiled()
        except (TorchDynamoException, InductorError) as error:
            raise UnsupportedModelError(
                f"{type(self.model.model).__name__} is not compiled by {backend!r}: "
                f"{str(error).strip()[:500]}; pass backend=None, which runs the same steps as they "
                "are, or decode with softtrace.decoding.speculate"
            ) from error
        return compiled

    def _captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Capture a call that reads and changes nothing but tensors that stay."""
        stream = torch.cuda.Stream(self.model.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, chooses kernels, allocates workspaces
                call()
        torch.cuda.current_stream(self.model.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with none_collected(), torch.cuda.graph(graph):
            call()
        return graph.replay


def _own_code(step: Callable[..., None], numbers: Sequence[int]) -> Callable[[], None]:
    """``step(*numbers)`` as a function whose code is no other's.

    What is compiled is remembered by the code, few times each: of a ninth decoder nothing would be
    compiled any more.
    """

    def call() -> None:
        step(*numbers)

    return types.FunctionType(
        call.__code__.replace(), call.__globals__, "call", None, call.__closure__
    )
