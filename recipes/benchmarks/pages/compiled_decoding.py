"""What the pages say of drafts beside plain decoding by the same steps of fixed shapes."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from typing import Any

from recipes.benchmarks.pages.comparison import quartiles
from recipes.benchmarks.pages.sources import CARD, read, sources
from softtrace.percent import percent

Row = dict[str, Any]
Found = list[tuple[Row, Row]]
"""Rows, and the record that each is of."""
FILES = ("speed/compiled_decoding.py", "results/compiled_decoding.json")
HOW_TO = "../benchmarks/"
BIG = "Llama-3.2-1B"


def compiled_decoding() -> str:
    """What drafting is worth beside plain decoding by the same steps."""
    found = _found()
    older = any("reached" not in each for _, each in _drafts(found))
    lines = [*_given(found), "", *_trained(found), *_early(found), *_stock_loops(found)]
    lines.append(
        "\nTimes plain decoding by the same steps: on a GPU captured in CUDA graphs, and fused by "
        "inductor before where the table says so; on the CPU not captured, timed by the time of "
        "the one thread, since the machine did other work besides. bfloat16 on a GPU, float32 on a "
        "CPU; medians over prompts (quartiles, or the smallest and largest median of "
        "seeds). A check writes as many tokens as the table says at most, of which all but the "
        "last are guessed before; a wrong guess ends its draft, and right are shares of the "
        "guesses that came after right ones, or first"
        + (
            ". Some rows are of steps that guessed the last token too, in vain, and are a little "
            "slower for it; how many of their guesses are right is what tokens a check come to"
            if older
            else ""
        )
        + f" {sources(CARD, *FILES)}."
    )
    return "\n".join(lines)


def at_that_acceptance() -> str:
    """What the costs of a larger model allow at the acceptance that trained models reach."""
    found = _found()
    own = [pair for pair in _drafts(found) if pair[1]["draft"] == "exit" and _is_own(pair[1])]
    ways: dict[tuple[str, int, int], list[Row]] = {}
    for _, each in own:
        ways.setdefault((_way(each), each["exit_layer"], each["layers"]), []).append(each)
    (name, depth, layers), best = max(
        ways.items(), key=lambda item: statistics.mean(map(_right, item[1]))
    )
    share = statistics.mean(map(_right, best))
    rows: dict[tuple[int, int], dict[int, dict[float, float]]] = {}
    for _, each in _drafts(found):
        if each["model"] == BIG and each["backend"] == "none" and each["batch"] == 1:
            at = rows.setdefault((each["exit_layer"], each["layers"]), {})
            gains = at.setdefault(each["draft_tokens"], {})
            gains[each["given_acceptance"]] = each["speedup"]["median"]
    allowed = {
        where: sorted(_between(gains, share) for gains in at.values()) for where, at in rows.items()
    }
    said = " and ".join(
        f"{gains[0]:.2f} to {gains[-1]:.2f} times plain decoding with an exit after {exit_layer} "
        f"of {count} layers"
        for (exit_layer, count), gains in allowed.items()
    )
    checks = sorted({count for at in rows.values() for count in at})
    pays = max(gains[-1] for gains in allowed.values()) > 1
    return (
        f"Of all trained models the best exit is that of {name}: after {depth} of {layers} layers "
        f"{percent(share, 0)} of the guesses that come after right ones are right. At that "
        f"acceptance the costs of a model of the size of {BIG} allow {said}"
        f"{'' if pays else ': less than plain decoding, at that size too'}. Random weights, one "
        f"text, checks of {' or '.join(map(str, checks))} tokens, on a line between the "
        f"acceptances measured below and above it {sources(HOW_TO, *FILES)}."
    )


def _found() -> Found:
    runs = read("compiled_decoding.json")["measurements"]
    return [(run, each) for run in runs for each in run["found"] if "failed" not in each]


def _drafts(found: Found) -> Found:
    return [pair for pair in found if not {"loop", "agreement_asked"} & {*pair[1]}]


def _is_own(each: Row) -> bool:
    """Whether guesses are right as the model's own exits are, not as was given."""
    return each["given_acceptance"] is None


def _way(each: Row) -> str:
    """How a model was trained: its name in words, without the seed."""
    name = str(each["model"])
    found = re.fullmatch(r"(.+?-.+?)-(.+?)-(.+)-([\d.]+)-full-(\d+)-steps-seed-\d+", name)
    if not found:
        return name
    model, text, method, strength, steps = found.groups()
    how = "plain" if method == "plain" else f"{method.replace('-', ' ')}, strength {strength}"
    return f"{model} on {text}, {int(steps):,} steps ({how})"


def _pair(each: Row) -> tuple[str, ...]:
    """What models share that are compared: where they began, the text, its blocks, the seed."""
    name, _, seed = str(each["model"]).rpartition("-seed-")
    return (*name.split("-")[:3], each.get("blocks", ""), seed)


def _right(each: Row) -> float:
    """Share of right ones of the guesses that came after right ones, or first.

    Where a result does not say it, the share by which so many tokens would come to a check if all
    guesses were alike: (1 - a^K) / (1 - a).
    """
    if "reached" in each:
        return float(each["accepted"] / each["reached"]) if each["reached"] else 0.0
    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        if sum(share**power for power in range(each["draft_tokens"])) < each["tokens_a_check"]:
            low = share
        else:
            high = share
    return low


def _between(gains: dict[float, float], share: float) -> float:
    """Linear between the measured acceptances below and above."""
    below = max((at for at in gains if at <= share), default=min(gains))
    above = min((at for at in gains if at >= share), default=max(gains))
    if below == above:
        return gains[below]
    part = (share - below) / (above - below)
    return gains[below] + part * (gains[above] - gains[below])


def _given(found: Found) -> Iterator[str]:
    """The curve over exit depth and acceptance; on a CPU beside the eager loop too."""
    given = [pair for pair in _drafts(found) if not _is_own(pair[1])]
    shares = sorted({each["given_acceptance"] for _, each in given})
    yield (
        "| random weights of the size of | steps | exit | "
        + " | ".join(f"{percent(share, 0)} right" for share in shares)
        + " | plain tokens/s |"
    )
    yield "|---" * (4 + len(shares)) + "|"
    rows: dict[tuple[str, ...], Found] = {}
    for run, each in given:
        where = f"{each['model']}, {run['hardware']}", _steps_of(run, each), _exit_of(each)
        rows.setdefault(where, []).append((run, each))
    over_eager = []
    for (model, steps, drawn), pairs in rows.items():
        gains = {each["given_acceptance"]: each["speedup"]["median"] for _, each in pairs}
        plain = statistics.median(each["plain_tokens_per_second"]["median"] for _, each in pairs)
        yield _gains(model, steps, drawn, shares, gains, plain)
        run, first = pairs[0]
        eager = [
            row["tokens_per_second"]["median"] for row in run["found"]
            if row.get("loop") == "eager" and row["model"] == first["model"]
        ]  # fmt: skip
        if "CPU" in run["hardware"] and eager:
            gains = {
                each["given_acceptance"]: each["tokens_per_second"]["median"] / eager[0]
                for _, each in pairs
            }
            steps = f"{steps}, over transformers' eager loop"
            over_eager.append(_gains(model, steps, drawn, shares, gains, eager[0]))
    yield from over_eager


def _gains(
    model: str, steps: str, drawn: str, shares: list[float], gains: dict[float, float], plain: float
) -> str:
    cells = (f"{gains[share]:.2f}" if share in gains else "" for share in shares)
    return f"| {' | '.join([model, steps, drawn, *cells, f'{plain:.0f}'])} |"


def _trained(found: Found) -> Iterator[str]:
    """What models reach by their own exits and by lookup."""
    yield (
        "| own weights | held-out loss over plain's | steps | drafts | guesses right | tokens a "
        "check | speed | tokens/s |"
    )
    yield "|---" * 8 + "|"
    ways: dict[tuple[str, ...], list[Row]] = {}
    for run, each in _drafts(found):
        if _is_own(each):
            where = f"{_way(each)}, {run['hardware']}", _steps_of(run, each), _exit_of(each)
            ways.setdefault(where, []).append(each)
    plain = {
        _pair(each): each["held_out_loss"]
        for _, each in _drafts(found)
        if "-plain-" in each["model"] and "held_out_loss" in each
    }
    for (name, steps, drawn), seeds in ways.items():
        # Of lookups that found nothing no guess was made, and tokens a check do not say how many.
        known = [each for each in seeds if "reached" in each or each["draft"] == "exit"]
        right = percent(statistics.mean(map(_right, known)), 0) if known else ""
        a_check = f"{statistics.mean(each['tokens_a_check'] for each in seeds):.2f}"
        speed = statistics.median(each["tokens_per_second"]["median"] for each in seeds)
        losses = [
            each["held_out_loss"] / plain[_pair(each)] - 1
            for each in seeds
            if "held_out_loss" in each and _pair(each) in plain and "-plain-" not in each["model"]
        ]
        loss = percent(statistics.mean(losses), 2, signed=True) if losses else ""
        cells = [name, loss, steps, drawn, right, a_check, _over_seeds(seeds), f"{speed:.0f}"]
        yield f"| {' | '.join(cells)} |"


def _early(found: Found) -> Iterator[str]:
    """Tokens that go out early without a check."""
    rows: dict[tuple[str, ...], list[Row]] = {}
    for run, each in found:
        if "agreement_asked" in each:
            name = f"{_way(each)}, {run['hardware']}"
            where = f"after {each['exit_layer']} of {each['layers']}"
            if each["left_out"]:
                where += ", where no bound reaches it"
            rows.setdefault((name, where, percent(each["agreement_asked"], 0)), []).append(each)
    if not rows:
        return
    yield ""
    yield (
        "| without a check, other prompts | exit | agreement asked | reached | tokens that go out "
        "early | layers saved | speed over the eager loop |"
    )
    yield "|---" * 7 + "|"
    for named, seeds in rows.items():
        cells = [""] * 4
        if not seeds[0]["left_out"]:
            means = (
                statistics.mean(each[what] for each in seeds)
                for what in ("agreement", "early", "layers_saved")
            )
            cells = [*(percent(mean, 1) for mean in means), _over_seeds(seeds)]
        yield f"| {' | '.join([*named, *cells])} |"


def _stock_loops(found: Found) -> Iterator[str]:
    """Tokens a second of transformers' own loops."""
    named: dict[str, dict[str, float]] = {}
    for run, each in found:
        if "loop" in each:
            speeds = named.setdefault(f"{each['model']}, {run['hardware']}", {})
            speeds[each["loop"]] = each["tokens_per_second"]["median"]
    if not named:
        return
    loops = [*dict.fromkeys(loop for speeds in named.values() for loop in speeds)]
    yield ""
    yield f"| transformers' loops, tokens/s | {' | '.join(loops)} |"
    yield "|---" * (1 + len(loops)) + "|"
    for name, speeds in named.items():
        cells = (f"{speeds[loop]:.0f}" if loop in speeds else "" for loop in loops)
        yield f"| {name} | {' | '.join(cells)} |"


def _steps_of(run: Row, each: Row) -> str:
    """How steps are run, and how many texts at once."""
    how = {"none": "not captured" if "CPU" in run["hardware"] else "captured"}
    named = how.get(each["backend"], f"{each['backend']}, captured")
    return named if each["batch"] == 1 else f"{named}, {each['batch']} texts"


def _exit_of(each: Row) -> str:
    """How guesses are made, and how many tokens a check writes at most."""
    after = f"after {each['exit_layer']} of {each['layers']}"
    how = {
        "exit": after,
        "lookup": "lookup",
        "both": f"lookup or {after}",
        "exit without its map": f"{after}, without its map",
        "exit to the first unsure": f"{after}, to the first unsure",
    }[each["draft"]]
    return f"{how}, {each['draft_tokens']} a check"


def _over_seeds(seeds: list[Row]) -> str:
    """Median of the seeds' medians; of one seed, of its prompts."""
    if len(seeds) == 1:
        return quartiles(seeds[0]["speedup"])
    medians = sorted(each["speedup"]["median"] for each in seeds)
    middle = statistics.median(medians)
    return f"{middle:.2f} ({medians[0]:.2f} to {medians[-1]:.2f}, {len(seeds)} seeds)"
