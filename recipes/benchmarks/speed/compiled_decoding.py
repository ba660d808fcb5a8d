"""What drafting by early exits is worth against plain decoding that is compiled, on a GPU.

    python -m recipes.benchmarks.speed.compiled_decoding                  # sizes of real models
    python -m recipes.benchmarks.speed.compiled_decoding --backends none  # in a tenth of the time
    python -m recipes.benchmarks.speed.compiled_decoding --models DIR ... --data TEXT

A name of a size stands for random weights of the size that the model's card states. Their exits
guess nothing right, so that how many guesses are right is given: each with the same probability,
by chance, whatever the model says. That costs what it would cost, and is the curve over exit depth
and acceptance that a model after fine-tuning has to reach. Models in folders are read with their
own weights, prompts are blocks of the text, and acceptance is what it is.

Plain decoding and drafting take turns, prompt by prompt, over the same cache and by the same steps;
transformers' own loops on the first prompts besides. Writes the result file anew after every
measurement; what other commands measured stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from recipes.benchmarks.places import RESULTS
from recipes.benchmarks.speed.steps import CONFIGS, MODELS
from softtrace.data.blocks import evenly, pack
from softtrace.data.text_source import TextSource
from softtrace.decoding import Generation, ProvenExit, StaticDecoder, check_early_exit
from softtrace.decoding.static_steps import Steps
from softtrace.evaluation.decode_race import quartiles, write_past_ends
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.model.devices import device_of
from softtrace.model.loading import load_model, load_tokenizer

Write = Callable[[Sequence[Tensor], int], list[Generation]]


class GivenSteps(Steps):
    """Steps whose guesses are right by chance.

    Attributes:
        chance: ``[1]``, the probability, which a captured step reads anew.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.chance = torch.ones(1, device=self.place.device)

    def judge(self, guesses: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """As the model's agreement would be used."""
        best = scores.argmax(-1)
        return torch.rand(best.shape, device=best.device) < self.chance, best


class GivenDecoder(StaticDecoder):
    """A decoder whose acceptance is given; what it writes means nothing."""

    def _make_steps(self) -> Steps:
        return GivenSteps(self._parts, self._texts, self.draft_tokens, self._processors)

    def accept(self, share: float) -> None:
        """Let so many guesses be right from now on."""
        steps: Any = self._steps
        steps.chance.fill_(share)


def shown(name: str) -> str:
    """A model's name in results."""
    return Path(name).name


def built(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model by the name of a size, with random weights, or of a folder."""
    if name not in MODELS:
        return load_model(name, dtype=str(dtype).removeprefix("torch.")).to(device).eval()
    stem, numbers = MODELS[name]
    config = getattr(transformers, CONFIGS.get(stem, f"{stem}Config"))(**numbers)
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, f"{stem}ForCausalLM")(config)
    return model.to(dtype).eval()


def prompts_for(name: str, args: argparse.Namespace, model: Any) -> list[Tensor]:
    """``[T]`` each: blocks of the text, or random tokens where weights are random."""
    if name in MODELS:
        draw = torch.Generator().manual_seed(0)
        return [
            torch.randint(1000, model.config.vocab_size, (args.prompt_tokens,), generator=draw)
            for _ in range(args.prompts)
        ]
    documents = TextSource(args.data, args.held_out_share).stream()
    return evenly(pack(documents, load_tokenizer(name), args.prompt_tokens), args.prompts)


def seconds(write: Write, rows: Sequence[Tensor], new: int) -> tuple[float, list[Generation]]:
    """Of one call, an accelerator's queue included."""
    if rows[0].is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = write(rows, new)
    if rows[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def in_turns(
    plain: Write, drafted: Write, rows: Sequence[Tensor], batch: int, new: int
) -> dict[str, Any]:
    """Both on the same prompts: medians and quartiles of what each prompt gives."""
    ratios, plain_speed, speed, found, same = [], [], [], [], 0
    for place in range(0, len(rows) - batch + 1, batch):
        group = rows[place : place + batch]
        before, wanted = seconds(plain, group, new)
        after, texts = seconds(drafted, group, new)
        ratios.append(before / after)
        plain_speed.append(batch * new / before)
        speed.append(batch * new / after)
        found += texts
        same += sum(torch.equal(a.tokens, b.tokens) for a, b in zip(wanted, texts, strict=True))
    checks = sum(each.checks for each in found)
    return {
        "plain_tokens_per_second": quartiles(plain_speed),
        "tokens_per_second": quartiles(speed),
        "speedup": quartiles(ratios),
        "tokens_a_check": batch * len(ratios) * new / checks if checks else None,
        "drafted": sum(each.drafted for each in found),
        "accepted": sum(each.accepted for each in found),
        "identical": same / len(found),  # of given acceptance: no text is what the model says
    }


def stock(model: Any, rows: Sequence[Tensor], new: int) -> dict[str, float]:
    """Tokens a second of transformers' own loops, medians."""
    loops: dict[str, dict[str, Any]] = {
        "eager": {},
        "static cache, compiled": {"cache_implementation": "static"},
        "prompt lookup": {"prompt_lookup_num_tokens": 8},
    }
    found = {}
    for name, options in loops.items():

        def write(group: Sequence[Tensor], count: int, options: Any = options) -> list[Generation]:
            row = group[0][None]
            model.generate(
                row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=count,
                min_new_tokens=count, **options,
            )  # fmt: skip
            return []

        for row in rows[:2]:  # compiles, and warms up
            write([row], new)
        found[name] = statistics.median(new / seconds(write, [row], new)[0] for row in rows)
    return found


def measure(
    name: str, model: Any, rows: Sequence[Tensor], proven: ProvenExit, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Results of one model, one by one; of what fails, why."""
    depths = sorted({max(1, round(share * proven.layers)) for share in args.exits})
    for backend, depth, draft in itertools.product(args.backends, depths, args.draft_tokens):
        way = {
            "model": shown(name), "layers": proven.layers, "backend": backend, "exit_layer": depth,
            "draft_tokens": draft,
        }  # fmt: skip
        try:
            static = (GivenDecoder if name in MODELS else StaticDecoder)(
                model, exit_layer=depth, draft_tokens=draft, rows=args.batch, eos_token_id=-1,
                capacity=args.prompt_tokens + args.new_tokens, proven_exit=proven,
                backend=None if backend == "none" else backend,
            )  # fmt: skip
            began = time.perf_counter()
            for write in (static.plain, static.speculate):
                write(rows[: args.batch], args.new_tokens)
            way["ready_seconds"] = time.perf_counter() - began
            for share in args.acceptance if isinstance(static, GivenDecoder) else [None]:
                if isinstance(static, GivenDecoder):
                    static.accept(share)
                found = in_turns(static.plain, static.speculate, rows, args.batch, args.new_tokens)
                yield {**way, "given_acceptance": share, **found}
        except Exception as error:  # the others are measured all the same
            yield {**way, "failed": f"{type(error).__name__}: {error}"[:2000]}


def said(found: dict[str, Any]) -> str:
    """One line on a measurement."""
    where = (
        f"{found['model']}, {found['backend']}: exit {found['exit_layer']} of {found['layers']}, "
        f"{found['draft_tokens']} guesses"
    )
    if "failed" in found:
        return f"{where}: failed, {found['failed'][:300]}"
    return (
        f"{where}, acceptance {found['given_acceptance']}: {found['speedup']['median']:.2f} times "
        f"plain decoding's {found['plain_tokens_per_second']['median']:.0f} tokens a second"
    )


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and write the result file anew after every measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sizes = ["SmolLM2-135M", "Llama-3.2-1B"]
    parser.add_argument("--models", nargs="+", default=sizes, help="names of sizes, or folders")
    parser.add_argument("--data", default="", help="text that prompts of models in folders are of")
    parser.add_argument("--held-out-share", type=float, default=0.0)
    parser.add_argument("--exits", nargs="+", type=float, default=[0.2, 0.35, 0.5, 0.65],
                        help="share of the layers that draft")  # fmt: skip
    parser.add_argument("--draft-tokens", nargs="+", type=int, default=[4])
    parser.add_argument("--acceptance", nargs="+", type=float, default=[0.5, 0.7, 0.8, 0.9, 0.95],
                        help="of each guess, where weights are random")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="prompts that are written at once")
    parser.add_argument("--backends", nargs="+", default=["none", "inductor"],
                        help="of torch.compile; with none CUDA graphs alone")  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-stock", action="store_true", help="leave transformers' loops out")
    parser.add_argument("--out", type=Path, default=RESULTS / "compiled_decoding.json")
    args = parser.parse_args(given)
    device = device_of(args.device)
    names = ("prompts", "prompt_tokens", "new_tokens", "batch", "dtype")
    run: dict[str, Any] = {
        **provenance(device), **{name: getattr(args, name) for name in names},
        "stock": {}, "found": [],
    }  # fmt: skip
    others = json.loads(args.out.read_text("utf-8"))["measurements"] if args.out.exists() else []
    result = {
        "measurements": [each for each in others if each["command"] != run["command"]] + [run]
    }
    for name in args.models:
        model = built(name, device, getattr(torch, args.dtype))
        rows = [row.to(device) for row in prompts_for(name, args, model)]
        write_past_ends(model)
        proven = check_early_exit(model)
        for found in measure(name, model, rows, proven, args):
            run["found"].append(found)
            write_json(args.out, result)
            print(said(found), flush=True)
        if not args.no_stock:
            run["stock"][shown(name)] = stock(model, rows, args.new_tokens)
            write_json(args.out, result)
        del model


if __name__ == "__main__":
    main()
