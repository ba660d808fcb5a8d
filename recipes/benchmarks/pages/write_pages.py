"""The figures of README.md and of the pages in recipes/, from the files of ``results/``.

python -m recipes.benchmarks.pages.write_pages            # print them
python -m recipes.benchmarks.pages.write_pages --write    # put them between the pages' markers
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from recipes.benchmarks.pages.comparison import at_budget, points, search
from recipes.benchmarks.pages.compiled_decoding import at_that_acceptance, compiled_decoding
from recipes.benchmarks.pages.cost import cost, fitted, operations, sharded
from recipes.benchmarks.pages.decoding import (
    decoding,
    decoding_157m,
    decoding_157m_before,
    exits_by_layer,
)
from recipes.benchmarks.pages.definitions import sensitivity, thresholds
from recipes.benchmarks.pages.effect import (
    effect,
    side_effects,
    side_effects_157m,
    side_effects_first,
)
from recipes.benchmarks.pages.lengths import lengths
from recipes.benchmarks.pages.real_models import (
    on_real_models,
    presets,
    real_at_budget,
    real_side_effects,
    real_tasks,
    replays,
    steps,
)
from recipes.benchmarks.pages.sources import CARD, LOG, link, read, sources
from recipes.benchmarks.places import RESULTS, ROOT
from softtrace import DensityOptions
from softtrace.files import atomic_path
from softtrace.percent import percent
from softtrace.report.sections import with_section

#: shown first as examples of a pattern
KNOWN = (
    *("llama", "qwen3", "mistral", "gpt2", "phi3", "gpt_oss", "gemma2", "gemma3_text", "glm4"),
    *("olmo2", "exaone4", "gpt_neox", "falcon", "gptj", "cohere", "phi", "bloom", "mpt", "opt"),
    *("granite", "minicpm3"),
)


def quickstart() -> str:
    """The table that the quickstart prints."""
    table = (RESULTS / "quickstart" / "compare.txt").read_text(encoding="utf-8").rstrip()
    lines = "\n".join(line.rstrip() for line in table.splitlines())
    return f"```\n{lines}\n```"


def dials() -> str:
    """The options that matter, with the defaults that ship."""
    rows = (
        ("strength", "**the first dial**: density against held-out loss"),
        ("share", "**the second dial**: of the batch's windows; time against noise, which costs "
         "held-out loss too"),
        ("every", "masked runs at every k-th step, k times as strong"),
        ("crop", "tokens of a window"),
        ("thresholds", "which edges are masked: higher, sparser"),
        ("depths", "where tokens are read, as shares of the layers: lower, earlier exits"),
        ("easy_quantile", "share of the tokens that count, the surest first"),
        ("exits", "weight of early exits, times `strength`: lower and better exits"),
        ("exit_tokens", "share of the batch's tokens that are looked at for them"),
        ("exit_quantile", "share of those, the easiest, at which they are read"),
        ("exit_every", "read them at every k-th step only, between masked runs, k times as strong"),
        ("exit_map", "read them through a linear map, learned beside the model"),
        ("exit_depths", "where, as shares of the layers"),
    )  # fmt: skip
    cpu, gpu = (vars(DensityOptions().on(torch.device(name))) for name in ("cpu", "cuda"))
    lines = ["| option | default | what it does |", "|---|---|---|"]
    for name, what in rows:
        value = f"{cpu[name]}" + (f", on a GPU {gpu[name]}" if gpu[name] != cpu[name] else "")
        lines.append(f"| `{name}` | {value} | {what} |")
    return "\n".join(lines)


def tracing() -> str:
    """Speed, memory, precision and the cost of a step."""
    result = read("tracing.json")
    speed, cost, precision = result["speed"], result["cost"], result["precision"]
    sizes_of = list(result["memory"]["lengths"].items())
    peaks = " and ".join(
        f"{row['peak_bytes'] / 1e6:.0f} MB at {length} tokens ("
        f"{row['peak_over_importance']:.1f} times the importances themselves; one layer's edge "
        f"vectors would be {row['edge_vectors_of_one_layer_bytes'] / 1e6:,.0f} MB)"
        for length, row in sizes_of
    )
    times = speed["times_faster"]
    ratio = cost["ratio"]
    return "\n".join(
        (
            f"- **Cost**: a training step takes {ratio['median']:.2f} times a plain one "
            f"({ratio['min']:.2f} to {ratio['max']:.2f}, {ratio['n']} interleaved pairs, "
            f"{cost['threads']} threads). The penalty looks at {percent(cost['share'], 0)} of each "
            f"batch, in windows of {cost['crop']} tokens.",
            f"- **Speed**: a density curve takes "
            f"{speed['seconds_per_position']['median'] * 1e3:.1f} ms per explained position on one "
            f"thread, {times['median']:,.0f} times less ({times['min']:,.0f} to "
            f"{times['max']:,.0f}, {times['n']} interleaved rounds) than the literal oracle of the "
            "tests takes, averaged over the positions of a prompt.",
            f"- **Memory**: `edge_importance` adds {peaks}.",
            f"- **Precision**: curves are read between {precision['thresholds']} thresholds. "
            f"Against {precision['reference_thresholds']} of them the area of a token differs by "
            f"{precision['area_mean_absolute_difference']:.3f} on average (bias "
            f"{precision['area_mean_difference']:+.3f}), TV by "
            f"{precision['total_variation_mean_absolute_difference']:.3f}, and the median size at "
            f"TV 0.2 is {precision['median_size_ratio']['easy']:.2f} times as large on easy "
            f"tokens and {precision['median_size_ratio']['all']:.2f} times on all.",
            "",
            sources(CARD, "speed/tracing.py", "results/tracing.json"),
        )
    )


def families() -> str:
    """How many types are verified, by pattern."""
    result = read("families.json")
    patterns: dict[str, list[str]] = {}
    for row in result["verified"]:
        cases = patterns.setdefault(row["pattern"], [])
        if row["type"] not in cases:
            cases.append(row["type"])
    largest = max(row["importance"] for row in result["verified"])
    half = {
        dtype: statistics.median(row[dtype] for row in result["verified"])
        for dtype in ("bfloat16", "float16")
    }
    lines = [
        f"**{result['types_verified']}** of the {result['types_of_transformers']} causal-LM types "
        f"of transformers {result['versions']['transformers']} are verified: as tiny models, "
        "against their own logits and a literal reference that materialises every edge (largest "
        f"difference of an importance: {largest:.0e}). In bfloat16 importances differ from "
        f"float32's by {half['bfloat16']:.0e} on average, in float16 by {half['float16']:.0e} "
        "(medians over the types). "
        f"{len(result['refused'])} cases are refused, each with its reason, and "
        f"{len(result['untried'])} types were not tried: no tiny model is made of them here. The "
        "whole table: "
        f"{link(CARD, 'results/families.md')}, made by `make families`.",
        "",
        "| residual pattern | types | for example |",
        "|---|---|---|",
    ]
    for pattern, types in sorted(patterns.items(), key=lambda each: -len(each[1])):
        known = [name for name in KNOWN if name in types]
        shown = ", ".join((known + [t for t in types if t not in known])[:6])
        lines.append(f"| {pattern} | {len(types)} | {shown} |")
    return "\n".join(lines)


def sizes() -> str:
    """Attaching and tracing at the sizes of real models."""
    result = read("sizes.json")
    lines = [
        "| random weights of the size of | pattern | attach | `edge_importance` / forward | "
        "memory beyond the weights |",
        "|---|---|---|---|---|",
    ]
    for row in result["models"]:
        middle, low, high = row["ratio"]
        lines.append(
            f"| {row['model']} | {row['pattern']} | {row['attach_seconds']:.1f} s "
            f"| {middle:.1f} ({low:.1f} to {high:.1f}) "
            f"| {row['edge_importance_peak_gib']:.1f} GiB (forward: "
            f"{row['forward_peak_gib']:.1f}) |"
        )
    lines.append(
        f"\nTime as a ratio, median of {result['rounds']} interleaved rounds; {result['rows']} x "
        f"{result['length']} tokens, {result['dtype']}, {result['hardware']}, torch "
        f"{result['versions']['torch']} "
        f"{sources(CARD, 'speed/sizes.py', 'results/sizes.json')}."
    )
    return "\n".join(lines)


def exactness() -> str:
    """What was measured of trainers, processes and interruptions."""
    result = read("exactness.json")
    ways, across = result["inert"], {**result["parallel"], **result["sharded"]}
    killed, held = result["kills"], result["memory"]["bytes"]
    silent = max(way["strength 0"] for way in ways.values())
    guards = result["mutations"]
    red = sum(each["red"] for each in guards.values())
    lines = [
        "| check | found |",
        "|---|---|",
        f"| strength 0 against none, {len(ways)} ways to fit ([Lightning's]"
        f"(../src/softtrace/lightning/support.py), transformers' Trainer), "
        f"{ways['32-true']['steps']} steps: "
        f"largest difference of a weight | {silent:g} "
        f"(at strength 0.6 at least {min(way['strength 0.6'] for way in ways.values()):.0e}) |",
    ]
    for name, shown in (("Lightning", "Lightning"), ("Trainer", "transformers' Trainer")):
        row = result["resumed"][name]
        lines.append(
            f"| {shown}, resumed at each of {row['steps']} steps, against a straight run | "
            f"{row['largest']:g} (another strength from there: {row['control']:.0e}) |"
        )
    for engine in ("FSDP2", "FSDP1", "ZeRO 1", "ZeRO 2", "ZeRO 3"):
        row = result["resumed"][engine]
        lines.append(
            f"| {engine} in Lightning, two processes, resumed after half of {row['steps']} "
            f"steps, against a straight run | {row['largest']:g} (another strength from there: "
            f"{row['control']:.0e}) |"
        )
    for engine, row in result["cuts"].items():
        lines.append(
            f"| `softtrace fit` by {engine}, two processes, cut by {' and by '.join(row['cuts'])} "
            f"and resumed, against a straight run of {row['steps']} steps | {row['largest']:g} "
            f"(training itself: {row['trained']:.0e}) |"
        )
    lines += [
        f"| `softtrace fit` killed {killed['kills']} times at random moments: runs that resumed "
        f"and ended, their largest difference from a straight one | {killed['resumed']} of "
        f"{killed['runs']}, {killed['largest']:g} |",
        *(
            f"| {name}: largest relative difference | {f'{value:.0e}' if value else 0} |"
            for name, value in across.items()
        ),
        f"| bytes of all tensors alive after 20 and 200 steps | {held['after 20 steps']:,} and "
        f"{held['after 200 steps']:,} |",
        f"| guards taken out of the source one at a time: tests that turned red | {red} of "
        f"{len(guards)} ([mutations.py](../tests/support/mutations.py)) |",
        "\nTiny models on one thread of a CPU, float64 where nothing else is said "
        f"{sources(CARD, 'correctness/exactness.py', 'results/exactness.json')}.",
    ]
    return "\n".join(lines)


def evaluating() -> str:
    """How fast evaluate is, how much of that is the model's own forward, and what the rest is."""
    files = "evaluating.json", "evaluating-smollm2.json"
    result, real = map(read, files)
    bare, whole = result["measure"], result["whole_command"]
    count = bare["runs_per_block"]

    def of(row: dict[str, Any], form: Callable[[float], str] = "{:.0f}".format) -> str:
        shown = (form(row[key]) for key in ("median", "min", "max"))
        return "{} ({} to {})".format(*shown)

    whole_percent = partial(percent, decimals=0)

    own = real["measure"]
    parts = ", ".join(f"{name} {share:.2f}" for name, share in list(own["parts"].items())[2:])
    return (
        f"`softtrace evaluate` explains {of(bare['tokens_per_second'])} tokens a second of the "
        f"shipped model, baselines and nuclei left out; the whole command with them "
        f"{of(whole['tokens_per_second'])}. The first is {of(bare['share'], whole_percent)} of "
        f"the speed of {count:g} plain forwards, for a recording and {count - 1:g} masked runs, "
        f"and {of(bare['share_of_26_masked'], whole_percent)} of that of 27, for a recording and "
        f"a masked run at each size that is reported. {result['blocks']} blocks of "
        f"{result['block_size']} tokens, {bare['seconds']['n']} interleaved rounds; "
        f"{result['hardware']}. Of {real['blocks']} x {real['block_size']} tokens of SmolLM2-135M "
        f"it takes {of(own['over_masked_runs'], '{:.2f}'.format)} times as long as its masked "
        f"runs and their logits (besides: {parts}); {own['seconds']['n']} rounds, "
        f"{real['hardware']}, seconds in which a thread ran, at a load of {real['load']} "
        f"{sources(CARD, 'speed/evaluating.py', *(f'results/{name}' for name in files))}."
    )


def metric_parity() -> str:
    """Whether metrics depend on how their data come."""
    result = read("metric_parity.json")
    single, double = (
        max(gap for way in result["largest_difference"][dtype].values() for gap in way.values())
        for dtype in ("float32", "float64")
    )
    ways = result["largest_difference"]["float32"]
    return (
        f"Largest difference of any number of any metric between one batch and "
        f"{', '.join(ways)} (unequal shares, one of three processes has none): {single:.0e} in "
        f"float32, {double:.0e} in float64; {result['sequences']} sequences of 20 to 40 tokens on "
        "the shipped model "
        f"{sources(CARD, 'correctness/metric_parity.py', 'results/metric_parity.json')}."
    )


#: what stands between the markers of each page, by their name
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"presets": presets},
    "recipes/results.md": {
        "quickstart": quickstart,
        "effect": effect,
        "tracing": tracing,
        "evaluating": evaluating,
        "decoding": decoding,
        "compiled_decoding": compiled_decoding,
        "sharded": sharded,
        "fitted": fitted,
        "lengths": lengths,
        "metric_parity": metric_parity,
    },
    "recipes/how-to/decoding.md": {"at_that_acceptance": at_that_acceptance},
    "recipes/models.md": {"families": families, "sizes": sizes},
    "recipes/README.md": {
        "cost": cost,
        "operations": operations,
        "dials": dials,
        "side_effects": side_effects,
        "side_effects_first": side_effects_first,
        "side_effects_157m": side_effects_157m,
        "sensitivity": sensitivity,
        "on_real_models": on_real_models,
        "real_at_budget": real_at_budget,
        "real_side_effects": real_side_effects,
        "real_tasks": real_tasks,
        "replays": replays,
        "steps": steps,
        "thresholds": thresholds,
        "exactness": exactness,
        "peers": partial(at_budget, CARD, "peers"),
        "peers_107m": partial(points, CARD, "peers-107m"),
        "peers_157m": partial(points, CARD, "peers-157m"),
        "peers_157m_layerskip": partial(points, CARD, "peers-157m-layerskip"),
        "decoding_157m": decoding_157m,
    },
    "recipes/benchmarks/LOG.md": {
        "search": partial(search, "log/search"),
        "search_exits": partial(search, "log/search-exits"),
        "search_seldom": partial(search, "log/search-seldom"),
        "search_judged": partial(search, "log/search-judged"),
        "search_shapes": partial(search, "log/search-shapes"),
        "search_windows": partial(search, "log/search-windows"),
        "decoding_157m_before": decoding_157m_before,
        "peers_large": partial(at_budget, LOG, "log/peers-large"),
        "drafting_depths": partial(points, LOG, "log/drafting-depths-107m"),
        "exits_by_layer": exits_by_layer,
    },
}


def filled(page: str) -> str:
    """A page with every block between ``<!-- name -->`` and ``<!-- /name -->`` made anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        text = with_section(text, name, make(), add=False)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="change the pages")
    args = parser.parse_args()
    for page, makers in PAGES.items():
        if args.write:
            text = filled(page)
            with atomic_path(ROOT / page) as path:
                path.write_text(text, encoding="utf-8")
            continue
        for make in makers.values():
            print(make(), end="\n\n")


if __name__ == "__main__":
    main()
