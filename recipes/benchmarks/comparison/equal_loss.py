"""Methods on real models where they cost one per cent of plain fine-tuning's held-out loss.

A way's loss moves from seed to seed, and strengths cannot be found that cost the same. So every
method is read between two of its own runs of a seed, on a straight line: the one that costs least
above the budget, and the one that costs most below it, which may be plain fine-tuning itself.
"""

from __future__ import annotations

import statistics
from typing import Any

from recipes.benchmarks.comparison.peers import BUDGET

#: other projects' losses, and the presets of the term
PEERS = (
    *("layerskip", "layerskip, no dropout", "exit distillation", "activation L1"),
    *("attention entropy", "attention connectivity"),
)
TERM = ("balanced", "sparse", "decode", "soft")
READ = "recomputed"  # attention
#: named as a strength, but it has other exits
_OTHER = ("balanced, 1",)
Run = dict[str, Any]


def spread(values: list[float]) -> dict[str, float]:
    """Mean, smallest and largest."""
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values)}


def method_of(way: str) -> str:
    """A way's name without its strength: ``layerskip, no dropout`` of that with 0.05 inside."""
    if way in _OTHER:
        return way
    return ", ".join(part for part in way.split(", ") if not _is_number(part))


def at_budget(runs: list[Run], kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every method of a kind of run at the budget.

    Seeds in which a method was too weak for the budget stand with what was nearest to it. Seeds in
    which fewer of the ways were run that a method is read between are left out, for a longer line
    says something else.

    Args:
        runs: as ``on_real_models.py`` leaves them.
        kinds: keys of a run; those of plain fine-tuning and a method have to be equal in them.

    Returns:
        A row for every kind and method, with ``seeds``, in how many of them the budget was
        ``reached``, the ways it was read ``between``, ``loss`` over plain fine-tuning's, and the
        measures at every length.
    """
    points = _points(runs, kinds)
    rows = []
    for key in dict.fromkeys((kind, method) for kind, _, method in points):
        kind, method = key
        seeds = {
            seed: [*points.get((kind, seed, "plain"), []), *found]
            for (k, seed, m), found in points.items()
            if (k, m) == key and (kind, seed, "plain") in points
        }
        if method not in (*PEERS, *TERM) or not seeds:
            continue
        read = {seed: _read(found) for seed, found in seeds.items()}
        used = {way for each in read.values() for way in each["ways"]}
        had = {seed: len(used & {way for way, _ in seeds[seed]}) for seed in seeds}
        kept = [each for seed, each in read.items() if had[seed] == max(had.values())]
        rows.append({
            **dict(zip(kinds, kind, strict=True)),
            "method": method,
            "seeds": len(kept),
            "reached": sum(each["reached"] for each in kept),
            "between": sorted({way for each in kept for way in each["ways"]}),
            **{
                place: {
                    name: spread([each["measures"][place][name] for each in kept])
                    for name in kept[0]["measures"][place]
                }
                for place in kept[0]["measures"]
                if all(place in each["measures"] for each in kept) and place != "loss"
            },
            "loss": spread([each["measures"]["loss"]["over plain"] for each in kept]),
        })  # fmt: skip
    return rows


def _points(runs: list[Run], kinds: tuple[str, ...]) -> dict[tuple[Any, Any, str], Any]:
    """By kind, seed and method: ways and their measures, means over runs that repeat each other."""
    found: dict[tuple[Any, Any, str], dict[str, list[Run]]] = {}
    for run in runs:
        key = tuple(run.get(kind) for kind in kinds), run["seed"], method_of(run["method"])
        way = run["method"]
        if way == key[2] and way in PEERS:  # of peers.py, whose strengths stand beside the name
            way = f"{way}, {run['strength']:g}"
        found.setdefault(key, {}).setdefault(way, []).append(run)
    plain = {
        (kind, seed): statistics.mean(run["loss"] for run in ways["plain"])
        for (kind, seed, method), ways in found.items()
        if method == "plain"
    }
    return {
        key: [(way, _means(each, plain[key[:2]])) for way, each in ways.items()]
        for key, ways in found.items()
        if key[:2] in plain
    }


def _means(runs: list[Run], plain: float) -> dict[str, dict[str, float]]:
    places = [
        place for place in runs[0] if place.endswith(READ) and all(place in run for run in runs)
    ]
    return {
        "loss": {"over plain": statistics.mean(run["loss"] for run in runs) / plain},
        **{
            place: {
                name: statistics.mean(run[place][name] for run in runs) for name in runs[0][place]
            }
            for place in places
        },
    }


def _read(points: list[tuple[str, dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """One seed of a method at the budget, of its points and plain fine-tuning's, which is first."""
    points = sorted(points, key=lambda point: point[1]["loss"]["over plain"])
    above = [point for point in points if point[1]["loss"]["over plain"] > BUDGET]
    below = [point for point in points if point[1]["loss"]["over plain"] <= BUDGET]
    if not above:
        way, measures = next(point for point in reversed(below) if point[0] != "plain")
        return {"reached": False, "ways": [way], "measures": measures}
    (low, less), (high, more) = below[-1], above[0]
    start, end = less["loss"]["over plain"], more["loss"]["over plain"]
    share = (BUDGET - start) / (end - start)
    measures = {
        place: {name: less[place][name] + share * (value - less[place][name])
                for name, value in found.items()}
        for place, found in more.items()
        if place in less
    }  # fmt: skip
    return {"reached": True, "ways": [low, high], "measures": measures}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
