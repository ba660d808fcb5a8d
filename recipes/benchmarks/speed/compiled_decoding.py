"""What drafting by early exits is worth against plain decoding that is compiled, on a GPU.

    python -m recipes.benchmarks.speed.compiled_decoding --minutes 9   # what fits; again: the rest
    python -m recipes.benchmarks.speed.compiled_decoding --parts trained early \
        --trained DIR --seeds 0 --data TEXT --out OF_SEED_0
    python -m recipes.benchmarks.speed.merge_decoding OF_SEED_0 OF_SEED_1   # into the results

Four parts. ``sizes``: random weights of the sizes that models' cards state. Their exits guess
nothing right, so that how many guesses are right is given (:mod:`given_acceptance
<recipes.benchmarks.speed.given_acceptance>`): the curve over exit depth and acceptance that a model
after fine-tuning has to reach, for steps that are captured in CUDA graphs as they are ("none") and
for steps that inductor has fused before, with several texts at once. ``trained``: every model in a
folder, by the exits it was trained for and by lookup, on prompts of a text; folders that end in
``-seed-0``, ``-seed-1`` are one way to train. ``early``: the same without a check, for an agreement
that is named. ``stock``: transformers' own loops on these models.

Plain decoding and drafts take turns, prompt by prompt, over the same cache and by the same steps.
The result file is written anew after every row. Rows that it holds are not measured again, so that
the same command resumes where it was stopped; a row that failed or took too long is tried again.
"""

from __future__ import annotations

import argparse
import gc
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.benchmarks.places import RESULTS
from recipes.benchmarks.speed.decoded_models import (
    DRAFTS,
    built,
    loss_beside,
    options_of,
    prompts_of,
    random_prompts,
)
from recipes.benchmarks.speed.decoding_rows import (
    LOOPS,
    is_of,
    record_in,
    rows_of,
    said,
    shown,
)
from recipes.benchmarks.speed.given_acceptance import GivenDecoder
from recipes.benchmarks.speed.steps import MODELS
from softtrace.decoding import (
    Generation,
    ProvenExit,
    StaticDecoder,
    check_cache,
    check_early_exit,
    generate,
)
from softtrace.evaluation.decode_race import guesses_on, quartiles
from softtrace.evaluation.decode_ways import largest_tie
from softtrace.evaluation.early_race import race_early
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.model.devices import device_of

Write = Callable[[Sequence[Tensor], int], list[Generation]]
PARTS = ("sizes", "trained", "early", "stock")
FEWEST = 3  # groups of prompts that a median is taken over
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""The second is the one where a processor is shared with others; take one thread then."""


def seconds(
    write: Write, rows: Sequence[Tensor], new: int, clock: str
) -> tuple[float, list[Generation]]:
    """Of one call, an accelerator's queue included."""
    if rows[0].is_cuda:
        torch.cuda.synchronize()
    began = CLOCKS[clock]()
    found = write(rows, new)
    if rows[0].is_cuda:
        torch.cuda.synchronize()
    return CLOCKS[clock]() - began, found


def in_turns(
    plain: Write,
    drafted: StaticDecoder,
    groups: Sequence[Sequence[Tensor]],
    new: int,
    shares: Sequence[float | None],
    clock: str,
) -> Iterator[dict[str, Any]]:
    """Plain decoding, then drafts at each acceptance, on one group of prompts after another."""
    before, wanted = [], []
    after: dict[float | None, list[float]] = {share: [] for share in shares}
    texts: dict[float | None, list[Generation]] = {share: [] for share in shares}
    for number, group in enumerate(groups):
        took, found = seconds(plain, group, new, clock)
        before.append(took)
        wanted += found
        for share in shares:
            if isinstance(drafted, GivenDecoder) and share is not None:
                drafted.accept(share, seed=number)
            took, found = seconds(drafted.speculate, group, new, clock)
            after[share].append(took)
            texts[share] += found
    written = len(groups[0]) * new
    prompts = [row[None] for group in groups for row in group]
    for share, found in texts.items():
        checks = sum(each.checks for each in found)
        same = sum(torch.equal(a.tokens, b.tokens) for a, b in zip(wanted, found, strict=True))
        yield {
            "given_acceptance": share,
            "plain_tokens_per_second": quartiles([written / each for each in before]),
            "tokens_per_second": quartiles([written / each for each in after[share]]),
            "speedup": quartiles([a / b for a, b in zip(before, after[share], strict=True)]),
            "tokens_a_check": len(found) * new / checks if checks else None,
            "drafted": sum(each.drafted for each in found),
            "reached": sum(each.reached for each in found),
            "accepted": sum(each.accepted for each in found),
            # Of given acceptance no text is what the model says.
            "identical": same / len(found) if share is None else None,
            "largest_tie": largest_tie(drafted.model, prompts, wanted, found)
            if share is None
            else None,
        }


class Bench:
    """One model, and how it decodes by one backend, several texts at once.

    Args:
        row: that is measured first; see :func:`rows_of`.
        args: of the command.
        device: that it runs on.
    """

    def __init__(self, row: dict[str, Any], args: argparse.Namespace, device: torch.device) -> None:
        name, self.batch, self.backend = row["model"], row["batch"], row["backend"]
        self.name, self.args, self.given = name, args, name in MODELS
        self.model = built(name, device, getattr(torch, args.dtype))
        self.proven: ProvenExit = check_early_exit(self.model)
        prompts = args.given_prompts if self.given else args.prompts
        count = max(FEWEST, prompts // self.batch) * self.batch
        if self.given:
            rows = random_prompts(count, args.prompt_tokens, self.model)
        else:
            found = prompts_of(name, count, args.prompt_tokens, args.data, args.held_out_share)
            rows, self.others = [*found[0].to(device)], found[1].to(device)
        ends = range(self.batch, len(rows) + 1, self.batch)
        self.groups = [rows[end - self.batch : end] for end in ends]
        self.plain: StaticDecoder | None = None

    def measures(self, row: dict[str, Any]) -> bool:
        """Whether a row is of this model and can be timed beside the same plain decoding."""
        own = self.name, self.batch, self.backend
        return own == (row["model"], row["batch"], row["backend"])

    def depth(self, row: dict[str, Any]) -> int:
        """Layers that draft."""
        return max(1, round(row["share"] * self.proven.layers))

    def found(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a row comes to."""
        kind = (
            self.stock if "loop" in row else self.early if "agreement_asked" in row else self.drafts
        )
        return kind(row)

    def early(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Tokens that go out without a check, by a bound that was chosen on other prompts."""
        new, proven = self.args.new_tokens, check_cache(self.proven, (self.depth(row),))
        texts = guesses_on(self.model, [ids[None] for ids in self.others], new)
        prompts = [ids[None] for group in self.groups for ids in group]
        yield {
            "layers": proven.layers, **loss_beside(self.name),
            **race_early(
                self.model, proven, texts, prompts, self.depth(row), new, row["agreement_asked"]
            ),
        }  # fmt: skip

    def drafts(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Drafts by so many of the layers, at each acceptance that was asked for."""
        args, began = self.args, time.perf_counter()
        kind = GivenDecoder if self.given else StaticDecoder
        depth = self.depth(row)
        options = {} if self.given else options_of(
            row["draft"], self.model, depth, self.proven, self.others
        )  # fmt: skip
        drafted = kind(
            self.model, exit_layer=depth, draft_tokens=row["draft_tokens"], rows=self.batch,
            capacity=args.prompt_tokens + args.new_tokens, eos_token_id=-1, **options,
            proven_exit=self.proven, backend=None if self.backend == "none" else self.backend,
        )  # fmt: skip
        self.plain = self.plain or drafted  # one for all depths: it is the same, and compiled once
        for write in (self.plain.plain, drafted.speculate):
            write(self.groups[0], args.new_tokens)
        ready = time.perf_counter() - began
        way = {
            "layers": self.proven.layers, "exit_layer": depth, "ready_seconds": ready,
            "confidence": drafted.confidence, **loss_beside(self.name),
        }  # fmt: skip
        shares = args.acceptance if self.given else [None]
        for found in in_turns(
            self.plain.plain, drafted, self.groups, args.new_tokens, shares, args.clock
        ):
            yield {**way, **found}

    def stock(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Tokens a second of one of transformers' own loops."""
        new = self.args.new_tokens

        def write(group: Sequence[Tensor], count: int) -> list[Generation]:
            ids = group[0][None]
            options = {"max_new_tokens": count, "min_new_tokens": count, **LOOPS[row["loop"]]}
            if row["loop"] == "assisted":
                generate(self.model, ids, self.depth(row), proven_exit=self.proven, **options)
            else:
                mask = torch.ones_like(ids)
                self.model.generate(ids, attention_mask=mask, do_sample=False, **options)
            return []

        groups = self.groups[: self.args.stock_prompts]
        for group in groups[:2]:  # compiles, and warms up
            write(group, new)
        speeds = [new / seconds(write, group, new, self.args.clock)[0] for group in groups]
        yield {"tokens_per_second": quartiles(speeds)}


@contextmanager
def limited(limit: float) -> Iterator[None]:
    """Raise :class:`TimeoutError` in what takes longer than so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit, 5)  # again, if a compiler caught the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(args: argparse.Namespace) -> None:
    """Measure what the file does not hold, row by row."""
    device, ends = device_of(args.device), time.monotonic() + 60 * args.minutes
    names = (
        "prompts",
        "given_prompts",
        "prompt_tokens",
        "new_tokens",
        "dtype",
        "acceptance",
        "clock",
    )
    about = provenance(device)
    settings = {name: about[name] for name in ("hardware", "versions")}
    settings |= {name: getattr(args, name) for name in names}
    result, record = record_in(args.out, settings)
    # No folder of the machine goes into a result.
    command = " ".join(Path(word).name for word in about["command"].split())
    record |= {"created": about["created"], "command": command}
    done = [each for each in record["found"] if "failed" not in each]
    rows = [row for row in rows_of(args) if not any(is_of(each, row) for each in done)]
    bench = None
    for place, row in enumerate(rows):
        left = ends - time.monotonic()
        try:
            with limited(min(left, args.row_seconds)):
                if bench is None or not bench.measures(row):
                    bench = None
                    free(device)
                    bench = Bench(row, args, device)
                found = [*bench.found(row)]
        except Exception as error:  # the others are measured all the same
            found, bench = [{"failed": f"{type(error).__name__}: {error}"[:2000]}], None
        if time.monotonic() >= ends:
            print(f"{len(rows) - place} rows are left for the same command")
            return
        record["found"] = [each for each in record["found"] if not is_of(each, row)]
        record["found"] += [{**shown(row), **each} for each in found]
        write_json(args.out, result)
        for each in found:
            print(said(row, each), flush=True)
        if bench is None:
            free(device)  # raises where the row has left the device broken


def free(device: torch.device) -> None:
    """Forget what was compiled and captured."""
    torch._dynamo.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main(given: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="what is measured")
    add("--models", nargs="+", choices=[*MODELS], default=[*MODELS], help="sizes")
    add("--trained", help="folder of folders of models with weights of their own")
    add("--data", default="",
        help="text that prompts of trained models are of, or on_real_models.py's blocks of it"
    )  # fmt: skip
    add("--held-out-share", type=float, default=0.0)
    add("--names", nargs="+", default=[], help="parts of the names of trained models")
    add("--seeds", nargs="+", type=int, default=[], help="of trained models; all by default")
    add("--exits", nargs="+", type=float, default=[0.2, 0.333, 0.5],
        help="share of the layers that draft, where no exit maps say what was trained")  # fmt: skip
    add("--drafts", nargs="+", choices=DRAFTS, default=["exit", "lookup"],
        help="ways to make guesses, for trained models")  # fmt: skip
    add("--draft-tokens", nargs="+", type=int, default=[4],
        help="that a check writes at most: one more than are guessed")  # fmt: skip
    add("--agreements", nargs="+", type=float, default=[0.95],
        help="asked of tokens that go out early without a check")  # fmt: skip
    add("--loops", nargs="+", choices=[*LOOPS], default=[*LOOPS], help="transformers' own")
    add("--acceptance", nargs="+", type=float, default=[0.5, 0.7, 0.8, 0.9, 0.95],
        help="of each guess, where weights are random")  # fmt: skip
    add("--batches", nargs="+", type=int, default=[1, 4, 16],
        help="texts that are written at once")  # fmt: skip
    add("--trained-batches", nargs="+", type=int,
        help="the same for trained models; by default the first of the others")  # fmt: skip
    add("--backends", nargs="+", default=["none", "inductor"],
        help="of torch.compile; with none CUDA graphs alone")  # fmt: skip
    add("--prompts", type=int, default=30, help="of trained models")
    add("--given-prompts", type=int, default=8, help="where weights are random")
    add("--stock-prompts", type=int, default=5, help="for transformers' own loops")
    add("--prompt-tokens", type=int, default=64)
    add("--new-tokens", type=int, default=128)
    add("--row-seconds", type=float, default=240.0, help="a row that takes longer is given up")
    add("--minutes", type=float, default=600.0, help="when to stop; the same command resumes")
    add("--clock", choices=[*CLOCKS], default="wall", help="processor: this process's time alone")
    add("--dtype", default="bfloat16")
    add("--device", default="auto")
    add("--out", type=Path, default=RESULTS / "compiled_decoding.json")
    run(parser.parse_args(given))


if __name__ == "__main__":
    main()
