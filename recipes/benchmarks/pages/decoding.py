"""What the pages say of decoding."""

from __future__ import annotations

import statistics
from typing import Any

from recipes.benchmarks.comparison.exit_variants import EVERY
from recipes.benchmarks.pages.comparison import quartiles, ratios
from recipes.benchmarks.pages.sources import CARD, LOG, read, sources
from softtrace.percent import percent


def decoding() -> str:
    """Exits and the speed of self-speculation, after plain fine-tuning and the penalty's."""
    result = read("decoding.json")
    plain, penalty = result["plain"], result["penalty"]
    lines = ["| fine-tuned | plain | penalty |", "|---|---|---|"]
    layers = plain["exits"]["layers"]
    for layer in layers[len(layers) // 4 :: 2]:
        cells = (percent(run["exits"]["agreement"][layer - 1], 1) for run in (plain, penalty))
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
        f"{percent(run['loops']['direct']['acceptance'], 1)} of guesses "
        f"by {run['exit_layer']} layers"
        for run in (plain, penalty)
    ]
    lines.append(f"| accepted | {' | '.join(shares)} |")
    same = min(loop["identical"] for run in (plain, penalty) for loop in run["loops"].values())
    lines.append(
        f"\nThe models of the quickstart, {plain['prompts']} prompts of {plain['prompt_tokens']} "
        f"held-out tokens, {plain['new_tokens']} written for each, exits and the way to draft from "
        f"{plain['prompts_chosen_on']} others; medians and quartiles; "
        f"{percent(same, 0)} of the texts are identical to plain decoding's; {result['hardware']} "
        f"{sources(CARD, 'speed/decoding.py', 'results/decoding.json')}."
    )
    return "\n".join(lines)


#: name in a race, then what the model was fine-tuned with: method, strength, and its title
Raced = dict[str, tuple[str, float, str]]
ONE_EXIT = "drafting after 0.21, exits 1.5"
RACED_FROM_START_0: Raced = {
    "plain": ("plain", 0.0, "nothing added"),
    "default": ("softtrace", 0.35, "softtrace, default"),
    "first": ("softtrace, exits first", 0.15, "softtrace, exits first, 0.15"),
    "x10": (ONE_EXIT, 0.1, "one exit, after 5 layers, 0.1"),
    "x15": (ONE_EXIT, 0.15, "one exit, after 5 layers, 0.15"),
}
RACED_FROM_START_1: Raced = {
    "plain": ("plain", 0.0, "nothing added"),
    "first": ("softtrace, exits first", 0.15, "softtrace, exits first, 0.15"),
    "fifth": ("drafting after 0.21, exits 2", 0.15, "one exit, after 5 layers, 0.15"),
}
#: on "gpu" and "cpu", for each seed, what ``decode_bench`` found of each model
Races = dict[str, list[dict[str, Any]]]


def _races(which: Raced, comparison: str, races: Races) -> list[str]:
    """A table of self-speculation, by what the models of a comparison were fine-tuned with."""
    lines = [
        "| fine-tuned with | held-out loss | exits agree, easy | exit layers, GPU | CPU "
        "| tokens a check, GPU | CPU | tokens/s over plain decoding, GPU | CPU "
        "| plain tokens/s, GPU | CPU | seeds |",
        "|---" * 12 + "|",
    ]
    runs = read(f"{comparison}.json")["runs"]
    for name, (method, strength, title) in which.items():
        every = {kind: [each[name] for each in of if name in each] for kind, of in races.items()}
        counts = [len(of) for of in every.values()]
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
        loss = percent(statistics.mean(ratios(runs, rows, "loss")) - 1, 2, signed=True)
        exits = percent(statistics.mean(row["exit_easy"] for row in rows), 1)
        lines.append(
            f"| {title} | {loss} | {exits} | {' | '.join(layers)} | "
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


def _of_file(name: str) -> tuple[dict[str, Any], Races]:
    """What ``at_size.py`` gathered, and its races by device and seed."""
    races: Races = {"gpu": [{} for _ in range(3)], "cpu": [{} for _ in range(3)]}
    result = read(f"{name}.json")
    for race in result["races"]:
        races[race["kind"]][race["seed"]][race["name"]] = race[race["name"]]
    return result, races


def decoding_157m() -> str:
    """Self-speculation of a deeper model."""
    result, races = _of_file("decoding-157m")
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
            *_races(RACED_FROM_START_1, "peers-157m-layerskip", races),
            "\nThe deeper models of the second start (157 M parameters, 24 layers), by loss and "
            f"strength; {_raced(races['cpu'][0]['plain'], where)}. By transformers' own loop "
            f"(`generate`) the models of the last row gain {own} "
            f"{sources(CARD, 'speed/decoding.py', 'results/decoding-157m.json')}.",
        ]
    )


OLDER = "log/decoding-157m-checks-run-all-layers"


def decoding_157m_before() -> str:
    """The same by the loop whose checks ran all layers, from another start."""
    result, races = _of_file(OLDER)
    where = (
        f"{result['hardware']}; the GPUs' four at a time on cards of their own, beside six on the "
        "CPU where plain tokens/s are low; checks ran all layers"
    )
    return "\n".join(
        [
            *_races(RACED_FROM_START_0, "peers-157m", races),
            f"\nBy loss and strength; {_raced(races['gpu'][0]['plain'], where)} "
            f"{sources(LOG, 'speed/decoding.py', f'results/{OLDER}.json')}.",
        ]
    )


def exits_by_layer() -> str:
    """What exits say whose weight lies on one depth, in models of different depth."""
    trained = (
        ("log/drafting-depths-107m", 16, "drafting after 0.25, exits 1", 0.35),
        ("log/drafting-depths-107m", 16, "drafting after 0.31, exits 1", 0.35),
        ("log/drafting-157m", 24, "drafting after 0.21, exits 1", 0.25),
        ("log/drafting-157m", 24, "drafting after 0.25, exits 1", 0.25),
    )
    files = [file for file, *_ in trained]
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
        cells = (percent(run["exits_all"][n - 1], 0) for n in after)
        (low, high) = EVERY[method].options["exit_depths"]
        assert low == high
        lines.append(f"| {layers} | {round(low * layers)} | {' | '.join(cells)} |")
    lines.append(
        "\nAgreement with the full model on all held-out tokens, one seed each "
        f"{sources(LOG, *(f'results/{file}.json' for file in dict.fromkeys(files)))}."
    )
    return "\n".join(lines)
