"""What ``figures.py`` says of decoding."""

from __future__ import annotations

import statistics
from typing import Any

from comparison_figures import quartiles, ratios, read
from exit_variants import EVERY


def decoding() -> str:
    """Exits and the speed of self-speculation, after plain fine-tuning and the penalty's."""
    result = read("decoding.json")
    plain, penalty = result["plain"], result["penalty"]
    lines = ["| | plain | penalty |", "|---|---|---|"]
    layers = plain["exits"]["layers"]
    for layer in layers[len(layers) // 4 :: 2]:
        cells = (f"{run['exits']['agreement'][layer - 1]:.1%}" for run in (plain, penalty))
        lines.append(
            f"| exit after {layer} of {len(layers) + 1} layers agrees, text of its own | "
            + " | ".join(cells)
            + " |"
        )
    for name, loop in (
        ("direct", "`softtrace.decoding.speculate`"),
        ("transformers", "`generate`"),
    ):
        cells = (quartiles(run["loops"][name]["speedup"]) for run in (plain, penalty))
        lines.append(f"| speed-up by {loop} over plain greedy decoding | {' | '.join(cells)} |")
    shares = [
        f"{run['loops']['direct']['acceptance']:.1%} of guesses by {run['exit_layer']} layers"
        for run in (plain, penalty)
    ]
    lines.append(f"| accepted | {' | '.join(shares)} |")
    same = min(loop["identical"] for run in (plain, penalty) for loop in run["loops"].values())
    lines.append(
        f"\nThe models of the quickstart, {plain['prompts']} prompts of {plain['prompt_tokens']} "
        f"held-out tokens, {plain['new_tokens']} written for each, exits and the way to draft from "
        f"{plain['prompts_chosen_on']} others; medians and quartiles; "
        f"{same:.0%} of the texts are identical to plain decoding's; {result['hardware']} "
        "([decoding.py](recipes/benchmarks/decoding.py), "
        "[decoding.json](recipes/benchmarks/decoding.json))."
    )
    return "\n".join(lines)


#: name in a race, then what the model was fine-tuned with: method, strength, file, and its title
Raced = dict[str, tuple[str, float, str, str]]
RACED_107M: Raced = {
    "plain": ("plain", 0.0, "peers-107m", "nothing added"),
    "default": ("softtrace", 0.35, "peers-107m", "softtrace, default"),
    "more": ("softtrace, more exits", 0.35, "peers-107m", "softtrace, more exits"),
    "third": (
        "drafting after 0.31, exits 1", 0.35, "drafting-depths-107m", "one exit, after 5 layers"
    ),
    "quarter": (
        "drafting after 0.25, exits 0.5", 0.35, "drafting-depths-107m", "one exit, after 4 layers"
    ),
}  # fmt: skip
ONE_EXIT = "drafting after 0.21, exits 1.5"
RACED_157M: Raced = {
    "plain": ("plain", 0.0, "peers-157m", "nothing added"),
    "default": ("softtrace", 0.35, "peers-157m", "softtrace, default"),
    "first": ("softtrace, exits first", 0.15, "peers-157m", "softtrace, exits first, 0.15"),
    "x10": (ONE_EXIT, 0.1, "peers-157m", "one exit, after 5 layers, 0.1"),
    "x15": (ONE_EXIT, 0.15, "peers-157m", "one exit, after 5 layers, 0.15"),
}
RACED_157M_AGAIN: Raced = {
    "plain": ("plain", 0.0, "peers-157m-again", "nothing added"),
    "first": ("softtrace, exits first", 0.15, "peers-157m-again", "softtrace, exits first, 0.15"),
    "fifth": (
        "drafting after 0.21, exits 2", 0.15, "peers-157m-again", "one exit, after 5 layers, 0.15"
    ),
}  # fmt: skip
#: on "gpu" and "cpu", for each seed, what ``decode_bench`` found of each model
Races = dict[str, list[dict[str, Any]]]


def _races(which: Raced, races: Races) -> list[str]:
    """A table of self-speculation, by what the models were fine-tuned with."""
    lines = [
        "| fine-tuned with | held-out loss | exits agree, easy | exit layers, GPU | CPU "
        "| tokens a check, GPU | CPU | tokens/s over plain decoding, GPU | CPU "
        "| plain tokens/s, GPU | CPU | seeds |",
        "|---" * 12 + "|",
    ]
    for name, (method, strength, file, title) in which.items():
        every = {kind: [each[name] for each in of if name in each] for kind, of in races.items()}
        counts = [len(of) for of in every.values()]
        runs = read(f"{file}.json")["runs"]
        rows = [
            run for run in runs
            if (run["method"], run["strength"]) == (method, strength) and run["seed"] < max(counts)
        ]  # fmt: skip
        layers, tokens, speeds, plain = [], [], [], []
        for of in every.values():
            layers.append(", ".join(str(each["exit_layer"]) for each in of))
            direct = [each["loops"]["direct"] for each in of]
            assert all(each["identical"] == 1.0 for each in direct)
            checks = sum(each["checks"] for each in direct)
            # The first token of a text comes with its prompt.
            written = sum(each["prompts"] * (each["new_tokens"] - 1) for each in of)
            tokens.append(f"{written / checks:.2f}" if of else "")
            medians = [each["speedup"]["median"] for each in direct]
            spread = f" ({min(medians):.2f} to {max(medians):.2f})" if medians[1:] else ""
            speeds.append(f"{statistics.mean(medians):.2f}{spread}" if of else "")
            plain.append(", ".join(f"{each['plain_tokens_per_second']:.0f}" for each in direct))
        lines.append(
            f"| {title} | {statistics.mean(ratios(runs, rows, 'loss')) - 1:+.2%} | "
            f"{statistics.mean(row['exit_easy'] for row in rows):.1%} | {' | '.join(layers)} | "
            f"{' | '.join(tokens)} | {' | '.join(speeds)} | {' | '.join(plain)} | "
            f"{max(counts) if len({*counts} - {0}) == 1 else 'GPU {}, CPU {}'.format(*counts)} |"
        )
    return lines


def _raced(first: dict[str, Any], where: str) -> str:
    """How it was measured."""
    return (
        f"a seed's figure is the median of {first['prompts']} prompts, {first['new_tokens']} "
        f"tokens written for each, and layer, draft length and confidence were chosen on "
        f"{first['prompts_chosen_on']} others; means over seeds (smallest to largest); "
        f"`softtrace.decoding.speculate`, float32; all texts are identical to plain decoding's; "
        f"{where}"
    )


def decoding_107m() -> str:
    """Self-speculation at a larger size."""
    races = {
        kind: [read(f"decoding-107m-{kind}-{seed}.json") for seed in range(3)]
        for kind in ("gpu", "cpu")
    }
    places = [of[0]["hardware"] for of in races.values()]
    where = f"{' and '.join(places)}, six such measurements at a time; checks ran all layers"
    return "\n".join(
        [
            *_races(RACED_107M, races),
            "\nThe models of the table above (107 M parameters, 16 layers); "
            f"{_raced(races['gpu'][0]['plain'], where)} ([decoding.py](benchmarks/decoding.py), "
            "decoding-107m-gpu-\\*.json, decoding-107m-cpu-\\*.json).",
        ]
    )


def _of_file(name: str) -> tuple[dict[str, Any], Races]:
    """What ``at_size.py`` gathered, and its races by device and seed."""
    races: Races = {"gpu": [{} for _ in range(3)], "cpu": [{} for _ in range(3)]}
    result = read(f"{name}.json")
    for race in result["races"]:
        races[race["kind"]][race["seed"]][race["name"]] = race[race["name"]]
    return result, races


def decoding_157m() -> str:
    """Self-speculation of a deeper model."""
    result, races = _of_file("decoding-157m-again")
    stock = {
        kind: [of["fifth"]["loops"]["transformers"] for of in each] for kind, each in races.items()
    }
    assert all(each["identical"] == 1.0 for of in stock.values() for each in of)
    own = " and ".join(
        f"{statistics.mean(each['speedup']['median'] for each in of):.2f} on the {kind.upper()}"
        for kind, of in stock.items()
    )
    where = (
        f"{result['hardware']}; on the CPU three at a time, beside fine-tuning on the GPUs (exits "
        "first: after it), on the GPUs two at a time with nothing else at work"
    )
    return "\n".join(
        [
            *_races(RACED_157M_AGAIN, races),
            "\nThe deeper models of the second start (157 M parameters, 24 layers), by loss and "
            f"strength; {_raced(races['cpu'][0]['plain'], where)}. By transformers' own loop "
            f"(`generate`) the models of the last row gain {own} "
            "([decoding.py](benchmarks/decoding.py), "
            "[decoding-157m-again.json](benchmarks/decoding-157m-again.json)).",
        ]
    )


def decoding_157m_before() -> str:
    """The same by the loop whose checks ran all layers, from another start."""
    result, races = _of_file("decoding-157m")
    where = (
        f"{result['hardware']}; the GPUs' four at a time on cards of their own, beside six on the "
        "CPU where plain tokens/s are low; checks ran all layers"
    )
    return "\n".join(
        [
            *_races(RACED_157M, races),
            f"\nBy loss and strength; {_raced(races['gpu'][0]['plain'], where)} "
            "([decoding.py](decoding.py), [decoding-157m.json](decoding-157m.json)).",
        ]
    )


def decoding_large() -> str:
    """Self-speculation of a larger model, by what it was fine-tuned with."""
    trained = read("drafting-107m.json")
    runs = {run["method"]: run for run in trained["runs"]}
    names = {"8th": "softtrace, default", **{name: name for name in runs if "drafting" in name}}
    lines = [
        "| fine-tuned with | held-out loss | size, easy | exits agree, easy | exit layer, "
        "draft tokens | accepted | tokens/s over plain decoding, GPU | CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    files = {
        name: {
            kind: read(f"decoding-107m-{name.replace(' ', '-')}-{kind}.json")
            for kind in ("gpu", "cpu")
        }
        for name in names
    }
    first = next(iter(names))
    rows = [("plain", "plain", first), *((name, "penalty", name) for name in names)]
    for name, arm, source in rows:
        run, plain = runs[name], runs["plain"]
        found = {kind: files[source][kind][arm] for kind in ("gpu", "cpu")}
        gains = {kind: each["loops"]["direct"] for kind, each in found.items()}
        speeds = (quartiles(gains[kind]["speedup"]) for kind in ("gpu", "cpu"))
        lines.append(
            f"| {names.get(name, 'nothing added')} | {run['loss'] / plain['loss'] - 1:+.2%} | "
            f"{run['size_easy']:.3%} | {run['exit_easy']:.1%} | {found['gpu']['exit_layer']}, "
            f"{found['gpu']['draft_tokens']} | {gains['gpu']['acceptance']:.1%} | "
            f"{' | '.join(speeds)} |"
        )
    every = [each[arm] for of in files.values() for each in of.values() for arm in each
             if arm in ("plain", "penalty")]  # fmt: skip
    same = min(loop["identical"] for arm in every for loop in arm["loops"].values())
    settings, gpu = trained["settings"], files[first]["gpu"]
    lines.append(
        f"\n{settings['model']} (16 layers) on {settings['data']}'s source, one seed, "
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['block_size']} tokens; "
        f"{gpu['plain']['prompts']} prompts, {gpu['plain']['new_tokens']} tokens written for each; "
        f"`softtrace.decoding.speculate`, float32, prompt by prompt in turns, medians and "
        f"quartiles; {same:.0%} of the texts are identical to plain decoding's; {gpu['hardware']} "
        f"and {files[first]['cpu']['hardware']}, six such measurements at a time "
        "([decoding.py](decoding.py), [drafting-107m.json](drafting-107m.json), "
        "decoding-107m-8th-\\*.json, decoding-107m-drafting-\\*.json)."
    )
    return "\n".join(lines)


def exits_by_layer() -> str:
    """What exits say whose weight lies on one depth, in models of different depth."""
    trained = (
        ("drafting-depths-107m", 16, "drafting after 0.25, exits 1", 0.35),
        ("drafting-depths-107m", 16, "drafting after 0.31, exits 1", 0.35),
        ("drafting-157m", 24, "drafting after 0.21, exits 1", 0.25),
        ("drafting-157m", 24, "drafting after 0.25, exits 1", 0.25),
    )
    after = range(3, 9)
    lines = [
        f"| layers | weight on the exit after | {' | '.join(f'after {n}' for n in after)} |",
        "|---" * (2 + len(after)) + "|",
    ]
    for file, layers, method, strength in trained:
        (run,) = (
            run for run in read(f"{file}.json")["runs"]
            if (run["method"], run["strength"], run["seed"]) == (method, strength, 0)
        )  # fmt: skip
        cells = (f"{run['exits_all'][n - 1]:.0%}" for n in after)
        (low, high) = EVERY[method].options["exit_depths"]
        assert low == high
        lines.append(f"| {layers} | {round(low * layers)} | {' | '.join(cells)} |")
    lines.append(
        "\nAgreement with the full model on all held-out tokens, one seed each "
        "([drafting-depths-107m.json](drafting-depths-107m.json), "
        "[drafting-157m.json](drafting-157m.json))."
    )
    return "\n".join(lines)
