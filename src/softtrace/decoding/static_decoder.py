"""Decoding with fixed shapes, plain and drafted, that can be compiled: the fast loops.

Where the host says every step anew, most of a small model's time on a GPU goes into saying it.
Here a model drafts with its first layers and checks with the others over one cache of fixed size
(:mod:`softtrace.decoding.static_cache`), and the host waits once a check. Plain decoding by the
same code is what drafting has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.anatomy.refusals import running
from softtrace.anatomy.tolerances import cache_tolerance, typical_mismatch
from softtrace.checks import check_choice, check_least, check_range
from softtrace.decoding.exit_checks import (
    ProvenExit,
    check_early_exit,
    check_exit_layer,
    decoder_layers,
    exit_layer_of,
    refuse_moving_rotations,
    some_ids,
)
from softtrace.decoding.greedy_choice import greedy_choice
from softtrace.decoding.sampling import SampledSteps, Sampling
from softtrace.decoding.speculative import Ends, Generation, check_decoding, ends_of
from softtrace.decoding.split_model import counter
from softtrace.decoding.static_cache import IMPLEMENTATIONS
from softtrace.decoding.static_model import StaticModel
from softtrace.decoding.static_processors import StaticProcessor, static_processors
from softtrace.decoding.static_steps import Runner, Steps, Texts
from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.graph.batch import check_is_tensor
from softtrace.model.exit_maps import exit_maps_of

DRAFTS = ("exit", "lookup", "both")
"""Ways to make guesses."""
_GLANCE = 8  # plain tokens between two looks at how far the texts are


class StaticDecoder:
    """Writes texts with one model, several at once, by steps that are compiled once.

    While it writes, the model's layers are told what to do: no other thread may use the model.
    Between texts weights may be changed and adapters switched; where weights lie elsewhere then, or
    adapters were switched, steps are made ready anew. Modules may not be replaced.

    Args:
        model: A causal language model of transformers, in eval mode, with "sdpa" or "eager"
            attention.
        exit_layer: Layers that draft, 1 to L - 1; None takes the one that the config recommends.
        draft_tokens: Tokens that a check writes at most, >= 1; one less is guessed before it.
        draft: How guesses are made: "exit", by the first layers; "lookup", by what followed the
            same two or three tokens earlier in the text; "both", by lookup where all texts have
            such a place, else by the first layers.
        confidence: Guesses of an exit end where all of a step's have less probability than this, in
            [0, 1]. Above 0 the host waits for every guess;
            :func:`softtrace.decoding.calibrated_confidence` chooses one on held-out text.
        rows: Texts that are written at once, >= 1.
        capacity: Tokens that a text may have, prompt and new ones; attention reads room for as
            many whatever the text's length.
        backend: Of ``torch.compile``; None runs the same steps uncompiled.
        cuda_graphs: Capture every step in a CUDA graph; None does so on CUDA.
        eos_token_id: One or several that end a text; None takes the generation config's.
        proven_exit: What :func:`softtrace.decoding.check_early_exit` returned for the model; None
            proves it here.
        exit_map: Maps the residual stream ``[B, N, D]`` at the exit before the model's norm and
            head read it; None takes the map that the model has for this exit, if it has one.
        sampling: How tokens are drawn; None writes the most likely ones.

    Raises:
        UnsupportedModelError: No exits, another attention than these, or a model that says
            something else over a cache of fixed size.
        InvalidInputError: A number outside its range, a model in train mode, ``cuda_graphs``
            without CUDA, a ``proven_exit`` of another model, or a generation config that asks for
            what these steps do not apply.
    """

    # Tensors that are made in inference mode could not be changed outside of it, and in it steps
    # would be compiled again.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        *,
        exit_layer: int | None = None,
        draft_tokens: int = 6,
        draft: str = "exit",
        confidence: float = 0.0,
        rows: int = 1,
        capacity: int = 1024,
        backend: str | None = "inductor",
        cuda_graphs: bool | None = None,
        eos_token_id: Ends = None,
        proven_exit: ProvenExit | None = None,
        exit_map: Callable[[Tensor], Tensor] | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        check_least("draft_tokens", draft_tokens, 1)
        check_range("confidence", confidence, 0, 1)
        check_choice("draft", draft, DRAFTS)
        check_least("rows", rows, 1)
        check_least("capacity", capacity, 8)
        check_decoding(model, 1)
        if proven_exit is None:
            proven_exit = check_early_exit(model)
        proven_exit.check_model(model)
        self.proven_exit = proven_exit
        depth = exit_layer_of(model) if exit_layer is None else exit_layer
        check_exit_layer(depth, proven_exit.layers)
        _check_attention(model)
        device = next(model.parameters()).device
        _check_no_autocast(device)
        if cuda_graphs and device.type != "cuda":
            raise InvalidInputError(
                f"cuda_graphs: found True with the model on {device}, allowed on CUDA alone; pass "
                "None, which captures where that is possible"
            )
        self.model, self.draft_tokens = model, draft_tokens
        self.rows, self.capacity = rows, capacity
        self.ends, self.sampling = ends_of(model, eos_token_id), sampling
        self._weights = _kind_of_weights(model)
        self._processors, self._config = self._processors_of(device), _generation_config(model)
        self.draft, self.confidence = draft, confidence
        if exit_map is None and (maps := exit_maps_of(model)) is not None:
            exit_map = partial(maps, depth=depth)
        # Behind the longest text there is room for a draft that no one will read.
        room = capacity + draft_tokens
        self._parts = StaticModel(
            model, decoder_layers(proven_exit.instrument), depth, rows, room, exit_map
        )
        self._texts = Texts(rows, room + 1, sorted(self.ends), device)
        self._check_parts(some_ids(proven_exit.instrument, model))
        with self._parts.prepared():
            self._steps = self._make_steps()
        graphs = device.type == "cuda" if cuda_graphs is None else cuda_graphs
        self._runner = Runner(self._parts, backend, graphs)

    def _make_steps(self) -> Steps:
        given = (
            self._parts, self._texts, self.draft_tokens, self._processors, self.confidence > 0
        )  # fmt: skip
        return Steps(*given) if self.sampling is None else SampledSteps(*given, self.sampling)

    def plain(self, prompts: Sequence[Tensor], max_new_tokens: int) -> list[Generation]:
        """Decoding with all layers, a token a step.

        Args:
            prompts: ``[T]`` or ``[1, T]`` int64 each, T from 1, ``rows`` of them at most.
            max_new_tokens: How many to write at most, >= 1.

        Returns:
            What was written for each, in order.

        Raises:
            UnsupportedModelError: Texts over which, or between which, rotary frequencies change.
            InvalidInputError: A number outside its range, too many prompts, prompts that do not fit
                ``capacity``, or a generation config that was changed since the decoder was made.
        """
        return self._write(prompts, max_new_tokens, drafting=False)

    def speculate(self, prompts: Sequence[Tensor], max_new_tokens: int) -> list[Generation]:
        """The same texts, drafted by the first layers and checked by the others.

        Texts that are drawn (``sampling``) are other draws with the same distribution. Each text
        advances by its own accepted guesses.

        Args, returns, raises: see :meth:`plain`.
        """
        return self._write(prompts, max_new_tokens, drafting=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _write(
        self, prompts: Sequence[Tensor], max_new_tokens: int, drafting: bool
    ) -> list[Generation]:
        check_decoding(self.model, max_new_tokens)
        self.proven_exit.check_model(self.model)
        rows = self._checked(prompts, max_new_tokens, drafting)
        longest = max(map(len, rows))
        with self._parts.prepared():
            self._make_ready(drafting)
            self._texts.begin(rows, max_new_tokens)
            self._steps.begin()
            if longest > 1:
                self._parts.start.zero_()
                self._parts.choose("whole")
                self._parts.read(self._texts.tokens[:, : longest - 1])
            if drafting:
                self._draft_on()
            else:
                while room := int(self._texts.room().amax()):
                    self._plain(min(room, _GLANCE))
        return self._generations(rows)

    def _plain(self, count: int) -> None:
        for _ in range(count):
            self._steps.refresh(1)
            self._runner.run("whole", self._steps.plain)

    def _draft_on(self) -> None:
        """Draft and check until all texts have ended."""
        steps, run = self._steps, self._runner.run
        while True:
            if self.draft != "exit":
                run("whole", steps.look_up)
            # The one place where the host waits.
            room, matched, unmatched = self._glance()
            if not room:
                return
            count = min(room, self.draft_tokens)
            if self.draft == "lookup" and not matched:
                self._plain(1)
                continue
            steps.refresh(count)
            if self.draft == "exit" or (self.draft == "both" and unmatched):
                run("rest", steps.check, self._at_once(self._guess(count)))
            else:
                run("whole", steps.read, self._at_once(count))

    def _glance(self) -> tuple[int, int, int]:
        """Most room of a text; how many unfinished ones have a place to look up, and have none."""
        room, found, going = self._texts.room(), self._steps.found, ~self._texts.ended
        seen = (room.amax(), (found & going).sum(), (~found & going).sum())
        most, matched, unmatched = torch.stack(seen).tolist()
        return most, matched, unmatched

    def _guess(self, count: int) -> int:
        """Read so many tokens by the first layers, each of which the one before says.

        Fewer where no text's guess is sure: the check says what comes instead. How many.
        """
        for read in range(1, count):
            self._runner.run("first", self._steps.guess)
            if self.confidence:
                sure = torch.where(self._texts.ended, 0, self._steps.sure)
                if not float(sure.amax()) >= self.confidence:
                    return read
        self._runner.run("first", self._steps.follow)
        return count

    def _at_once(self, count: int) -> int:
        """How many tokens a check reads of so many: always as many where that is compiled."""
        return self.draft_tokens if self._runner.fixed else count

    def _make_ready(self, drafting: bool) -> None:
        """Compile and capture what is needed, before any text is begun."""
        self._texts.begin([], 0)
        self._runner.forget_if_changed(self.model)
        make_ready, steps = self._runner.make_ready, self._steps
        if not drafting or self.draft == "lookup":
            make_ready("whole", steps.plain)
        if drafting and self.draft != "lookup":
            if self.draft_tokens > 1:
                make_ready("first", steps.guess)
            make_ready("first", steps.follow)
            make_ready("rest", steps.check, self.draft_tokens)
        if drafting and self.draft != "exit":
            make_ready("whole", steps.look_up)
            make_ready("whole", steps.read, self.draft_tokens)

    def _generations(self, rows: Sequence[Tensor]) -> list[Generation]:
        texts = self._texts
        counts = (texts.length, texts.drafted, texts.accepted, texts.checks, texts.reached)
        numbers = torch.cat(counts, dim=1).tolist()
        return [
            Generation(texts.tokens[row, len(prompt) : length].clone(), *others)
            for row, (prompt, (length, *others)) in enumerate(zip(rows, numbers, strict=False))
        ]

    def _checked(
        self, prompts: Sequence[Tensor], max_new_tokens: int, drafting: bool
    ) -> list[Tensor]:
        """Prompts as ``[T]`` each."""
        for prompt in [prompts] if isinstance(prompts, Mapping) else prompts:
            check_is_tensor(prompt)
        rows = [
            prompt[0] if prompt.dim() == 2 and len(prompt) == 1 else prompt for prompt in prompts
        ]
        if not 1 <= len(rows) <= self.rows or any(row.dim() != 1 or not len(row) for row in rows):
            found = [tuple(prompt.shape) for prompt in prompts]
            raise InvalidInputError(
                f"prompts: found {found}, allowed are 1 to {self.rows} of [T] or [1, T] tokens; "
                "make a decoder with more rows for more of them"
            )
        for row in rows:  # an id that is none would end a process's use of CUDA
            self.proven_exit.instrument.batch(row[None])
        _check_no_autocast(self._parts.device)
        if (weights := _kind_of_weights(self.model)) != self._weights:
            raise InvalidInputError(
                f"model: found weights in {weights}, allowed are those in {self._weights} as they "
                "were when the decoder was made, as what it holds of a text is; make a new decoder"
            )
        longest = max(map(len, rows)) + max_new_tokens
        if longest > self.capacity:
            raise InvalidInputError(
                f"prompts: found one that comes to {longest} tokens with {max_new_tokens} new "
                f"ones, allowed are {self.capacity}; make a decoder of that capacity"
            )
        # All rows share one run, and its frequencies are those of the furthest position in it; the
        # last token of a prompt is read by itself, and some rows read guesses beyond their end.
        shortest, beyond = min(min(map(len, rows)), max(map(len, rows)) - 1), 0
        if drafting and (self.rows > 1 or self._runner.fixed):
            beyond = self.draft_tokens
        refuse_moving_rotations(self.model, shortest, longest + beyond - shortest)
        if _generation_config(self.model) != self._config:
            raise InvalidInputError(
                "model.generation_config: found one that was changed since the decoder was made, "
                "and its steps were compiled with the old one; make a new decoder"
            )
        return rows

    def _processors_of(self, device: torch.device) -> list[StaticProcessor]:
        """What the generation config and ``sampling`` do to logits."""
        prompt = torch.zeros(1, 1, dtype=torch.long, device=device)
        options = None if self.sampling is None else self.sampling.options()
        # With one new token at most, generate would leave out what keeps a text from its end.
        choice = greedy_choice(self.model, prompt, self.capacity, self.ends, options)
        other = "softtrace.decoding.speculate" if self.sampling is None else "model.generate"
        return static_processors(choice.processors, other)

    def _check_parts(self, ids: Tensor) -> None:
        """Prove that the model says over this cache what it says without one, a cut included."""
        model, parts, name = self.model, self._parts, type(self.model).__name__
        wanted = model(input_ids=ids, use_cache=False).logits
        ids = ids.expand(self.rows, -1)
        with running(f"{name} does not run over a cache of fixed size"), parts.prepared():
            parts.choose("whole")
            parts.read(ids[:, :2])
            parts.choose("first")
            streams = {}
            for start, place in ((2, 2), (3, 5), (3, 3), (4, 4), (5, 5)):  # one is taken back
                parts.start.fill_(start)
                token = ids[:, place : place + 1]
                streams[start] = parts.stream(token) if start == 5 else parts.first(token)[1]
            parts.start.fill_(2)
            parts.choose("rest")
            found = parts.rest(ids[:, 2:], torch.cat([*streams.values()], dim=1))
            parts.start.zero_()
        error = typical_mismatch(found, wanted[:, 2:].expand_as(found))
        allowed = cache_tolerance(wanted.dtype)
        if error > allowed:
            raise UnsupportedModelError(
                f"{name} says something else over a cache of fixed size (mismatch {error:.2g}, "
                f"allowed {allowed:.2g}); decode it with softtrace.decoding.speculate"
            )


def _kind_of_weights(model: nn.Module) -> str:
    weight = next(model.parameters())
    return f"{weight.dtype} on {weight.device}"


def _generation_config(model: Any) -> dict[str, Any] | None:
    config = getattr(model, "generation_config", None)
    return None if config is None else dict(config.to_dict())


def _check_no_autocast(device: torch.device) -> None:
    """What is held of a text has one dtype, and so have the steps that are compiled."""
    if torch.is_autocast_enabled(device.type):
        raise InvalidInputError(
            f"autocast: found it on for {device.type}, allowed is off; load the model in the dtype "
            "to decode in"
        )


def _check_attention(model: nn.Module) -> None:
    config: Any = counter(model)
    found = getattr(config, "_attn_implementation", None)
    if found not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{type(model).__name__}: found {found!r} attention, allowed over a cache of fixed "
            f"size are {' and '.join(IMPLEMENTATIONS)}; load the model with "
            "attn_implementation='sdpa'"
        )
