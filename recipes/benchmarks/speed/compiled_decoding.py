"""What drafting by early exits is worth against plain decoding that is compiled, on a GPU.

    python -m recipes.benchmarks.speed.compiled_decoding --minutes 9   # what fits; again: the rest
    python -m recipes.benchmarks.speed.compiled_decoding --parts trained --trained DIR --data TEXT

Three parts. ``sizes``: random weights of the sizes that models' cards state. Their exits guess
nothing right, so that how many guesses are right is given (:mod:`given_acceptance
<recipes.benchmarks.speed.given_acceptance>`): the curve over exit depth and acceptance that a model
after fine-tuning has to reach, for steps that are captured in CUDA graphs as they are ("none") and
for steps that inductor has fused before, with several texts at once. ``trained``: every model in a
folder, by its own exits and by lookup, on prompts of a text; folders that end in ``-seed-0``,
``-seed-1`` are one way to train. ``stock``: transformers' own loops on these models.

Plain decoding and drafts take turns, prompt by prompt, over the same cache and by the same steps.
The result file is written anew after every row. Rows that it holds are not measured again, so that
the same command resumes where it was stopped; a row that failed or took too long is tried again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from recipes.benchmarks.places import RESULTS
from recipes.benchmarks.speed.given_acceptance import GivenDecoder
from recipes.benchmarks.speed.steps import CONFIGS, MODELS
from softtrace.data.blocks import evenly, pack
from softtrace.data.text_source import TextSource
from softtrace.decoding import Generation, ProvenExit, StaticDecoder, check_early_exit
from softtrace.decoding.static_decoder import DRAFTS
from softtrace.evaluation.decode_race import quartiles, write_past_ends
from softtrace.evaluation.decode_ways import largest_tie
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.model.devices import device_of
from softtrace.model.loading import load_model, load_tokenizer

Write = Callable[[Sequence[Tensor], int], list[Generation]]
PARTS = ("sizes", "trained", "stock")
FEWEST = 3  # groups of prompts that a median is taken over
LOOPS: dict[str, dict[str, Any]] = {
    "eager": {},
    "static cache, compiled": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 8},
}
"""transformers' own, by options of ``generate``."""
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""The second is the one where a processor is shared with others; take one thread then."""


def built(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model by the name of a size, with random weights, or of a folder."""
    if name not in MODELS:
        model = load_model(name, dtype=str(dtype).removeprefix("torch.")).to(device).eval()
    else:
        stem, numbers = MODELS[name]
        config = getattr(transformers, CONFIGS.get(stem, f"{stem}Config"))(**numbers)
        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(transformers, f"{stem}ForCausalLM")(config)
        model = model.to(dtype).eval()
    write_past_ends(model)
    return model


def prompts_for(name: str, count: int, model: Any, args: argparse.Namespace) -> list[Tensor]:
    """``[T]`` each: blocks of the text, or random tokens where weights are random."""
    device = next(model.parameters()).device
    if name in MODELS:
        draw = torch.Generator().manual_seed(0)
        shape = (count, args.prompt_tokens)
        return [*torch.randint(3, model.config.vocab_size, shape, generator=draw).to(device)]
    documents = TextSource(args.data, args.held_out_share).stream()
    blocks = pack(documents, load_tokenizer(name), args.prompt_tokens)
    return [row.to(device) for row in evenly(blocks, count)]


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
        rows = prompts_for(name, count, self.model, args)
        ends = range(self.batch, len(rows) + 1, self.batch)
        self.groups = [rows[end - self.batch : end] for end in ends]
        self.plain: StaticDecoder | None = None

    def measures(self, row: dict[str, Any]) -> bool:
        """Whether a row is of this model and can be timed beside the same plain decoding."""
        own = self.name, self.batch, self.backend
        return own == (row["model"], row["batch"], row["backend"])

    def drafts(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Drafts by so many of the layers, at each acceptance that was asked for."""
        args, began = self.args, time.perf_counter()
        kind = GivenDecoder if self.given else StaticDecoder
        depth = max(1, round(row["share"] * self.proven.layers))
        drafted = kind(
            self.model, exit_layer=depth, draft=row["draft"], draft_tokens=row["draft_tokens"],
            rows=self.batch, capacity=args.prompt_tokens + args.new_tokens, eos_token_id=-1,
            proven_exit=self.proven, backend=None if self.backend == "none" else self.backend,
        )  # fmt: skip
        self.plain = self.plain or drafted  # one for all depths: it is the same, and compiled once
        for write in (self.plain.plain, drafted.speculate):
            write(self.groups[0], args.new_tokens)
        ready = time.perf_counter() - began
        way = {"layers": self.proven.layers, "exit_layer": depth, "ready_seconds": ready}
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
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                min_new_tokens=count, **LOOPS[row["loop"]],
            )  # fmt: skip
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


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is to be measured, what matters most first."""
    folders = [path.parent for path in Path(args.trained or "").glob("*/config.json")]
    # All ways to train of the first seed before any of the second.
    folders.sort(key=lambda path: (path.name.rpartition("-seed-")[2], path.name))
    named = {
        "sizes": args.models if "sizes" in args.parts else [],
        "trained": [*map(str, folders)] if "trained" in args.parts else [],
    }
    batches = {"sizes": args.batches, "trained": args.trained_batches or args.batches[:1]}
    every = dict.fromkeys([*args.batches, *batches["trained"]])
    for batch, backend, part in itertools.product(every, args.backends, named):
        for name in named[part] if batch in batches[part] else ():
            common = {"model": name, "batch": batch, "backend": backend}
            for draft, guesses in itertools.product(args.drafts, args.draft_tokens):
                if draft != "exit" and part == "sizes":
                    continue  # nothing is found in texts that mean nothing
                for share in args.exits[:1] if draft == "lookup" else args.exits:
                    yield {**common, "draft": draft, "draft_tokens": guesses, "share": share}
    if "stock" in args.parts:
        names = [*args.models, *map(str, folders)] if named["sizes"] else [*map(str, folders)]
        for name, loop in itertools.product(names, LOOPS):
            yield {"model": name, "batch": 1, "backend": "none", "loop": loop}


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as results say it: without the folders of a machine."""
    return {**row, "model": Path(row["model"]).name}


def said(row: dict[str, Any], found: dict[str, Any]) -> str:
    """One line on a measurement."""
    where = ", ".join(f"{name} {value}" for name, value in shown(row).items())
    if "failed" in found:
        return f"{where}: failed, {found['failed'][:300]}"
    if "loop" in row:
        return f"{where}: {found['tokens_per_second']['median']:.0f} tokens a second"
    return (
        f"{where}, exit {found['exit_layer']} of {found['layers']}, acceptance "
        f"{found['given_acceptance']}: {found['speedup']['median']:.2f} times plain decoding's "
        f"{found['plain_tokens_per_second']['median']:.0f} tokens a second"
    )


def record_in(file: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All results, and in them the record of measurements with these settings, new or begun."""
    result = json.loads(file.read_text("utf-8")) if file.exists() else {"measurements": []}
    for record in result["measurements"]:
        if all(record.get(name) == value for name, value in settings.items()):
            return result, record
    record = {**settings, "found": []}
    result["measurements"].append(record)
    return result, record


def is_of(found: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a result is of a row."""
    return all(found.get(name) == value for name, value in shown(row).items()) and (
        ("loop" in found) == ("loop" in row)
    )


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
                found = [*(bench.stock(row) if "loop" in row else bench.drafts(row))]
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
    add("--data", default="", help="text that prompts of trained models are of")
    add("--held-out-share", type=float, default=0.0)
    add("--exits", nargs="+", type=float, default=[0.2, 0.333, 0.5],
        help="share of the layers that draft")  # fmt: skip
    add("--drafts", nargs="+", choices=DRAFTS, default=["exit", "lookup"],
        help="ways to make guesses, for trained models")  # fmt: skip
    add("--draft-tokens", nargs="+", type=int, default=[4], help="guesses before a check")
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
