"""What the pages say of real pretrained models: presets, ways to train, a step's cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recipes.benchmarks.comparison.equal_loss import PEERS
from recipes.benchmarks.comparison.real_tasks import TASKS
from recipes.benchmarks.comparison.real_texts import has_copies
from recipes.benchmarks.pages.sources import CARD, README, read, sources
from softtrace.loss.options import PRESETS

_HEAD = (
    "| {first} | held-out loss | area, easy, 256 tokens | at 1,024 | size, easy, 256 | at 1,024 | "
    "area and entropy, 256 | at 1,024 | exits agree, easy, 256 | at 1,024 |\n" + "|---" * 10 + "|"
)
_SOURCES = ("comparison/on_real_models.py", "results/on_real_models.json")
_STAR = "\\*"
_SHORT = "\u2020"  # a dagger
_SEARCH = 1000  # runs of fewer steps were the search
_OVERFITTED = 0.005  # share of plain fine-tuning's lowest loss; one measurement differs by 0.003
Rows = list[dict[str, Any]]


def _tables(chosen: Callable[[dict[str, Any]], bool]) -> dict[tuple[Any, ...], Rows]:
    """Rows by model, text, kind of training and steps, each by held-out loss; copies come last."""
    found: dict[tuple[Any, ...], Rows] = {}
    for row in sorted(read("on_real_models.json")["table"], key=lambda row: row["loss"]["mean"]):
        if chosen(row):
            key = row["model"], row["text"], row["lora"], row["steps"], has_copies(row)
            found.setdefault(key, []).append(row)

    def place(item: tuple[tuple[Any, ...], Rows]) -> tuple[bool, bool, int]:
        (_, _, lora, _, copies), rows = item
        return copies, lora, -len(rows)

    tables = sorted(found.items(), key=place)
    return {key: rows for key, rows in tables if any(row["method"] != "plain" for row in rows)}


def _title(model: str, text: str, lora: bool, steps: int, copies: bool) -> str:
    kind = "adapters of rank 16" if lora else "all weights"
    return f"{model} on {text}{_STAR * copies}, {kind}, {steps:,} steps"


def _row(name: str, row: dict[str, Any]) -> str:
    at = row["256 recomputed"], row["1024 recomputed"]
    low, high = (100 * (row["loss"][end] - 1) for end in ("min", "max"))
    spread = f" ({low:+.2f} to {high:+.2f})" if row["seeds"] > 1 and high > low else ""
    cells = [
        f"{_more(row['loss']['mean'])}{spread}",
        *(f"{each['area_easy']['mean']:.3f}" for each in at),
        *(f"{100 * each['size_easy']['mean']:.2g} %" for each in at),
        *(f"{each['spearman']['mean']:+.2f}" for each in at),
        *(f"{100 * each['exit_easy']['mean']:.0f} %" for each in at),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _table(key: tuple[Any, ...], rows: Rows, names: dict[str, str]) -> list[str]:
    """Lines of one table; methods by these names, or their own."""
    shown = [
        _row(f"{names.get(row['method'], row['method'])}, {row['seeds']} seed"
             + "s" * (row["seeds"] > 1), row)
        for row in rows
    ]  # fmt: skip
    return [_HEAD.format(first=_title(*key)), *shown, "", *_past_lowest(rows, names)]


def _past_lowest(rows: Rows, names: dict[str, str]) -> list[str]:
    """What rows cost over the best of plain fine-tuning, where that ends above it; else nothing."""
    over = {row["method"]: row.get("loss over lowest", {"mean": 1.0})["mean"] for row in rows}
    if over["plain"] < 1 + _OVERFITTED:
        return []
    others = [
        f"`{names.get(method, method)}` {_more(loss)}"
        for method, loss in over.items() if method != "plain"
    ]  # fmt: skip
    return [
        f"Plain fine-tuning ends at {_more(over['plain'])} over the lowest held-out loss that was "
        f"measured in its run; over that: {', '.join(others)}.",
        "",
    ]


def _more(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"


def _said(page: str, starred: bool = True) -> str:
    run = read("on_real_models.json")["runs"][0]
    star = f" {_STAR} Training saw other versions of 61 documents with most of the held-out prose"
    return (
        "16 x 512 tokens a step, bfloat16. Attention recomputed, easy quarter of the tokens, "
        "median size at TV 0.2, rank correlation of area and entropy, exits at half depth; loss "
        f"over plain fine-tuning's of as many steps and the same seed (range); {run['hardware']}"
        f"{'.' + star if starred else ''} {sources(page, *_SOURCES)}."
    )


def presets() -> str:
    """The presets, plain fine-tuning and the better baseline, on one real model."""
    names = {"plain": "plain", **{name: f"`{name}`" for name in PRESETS}}
    names |= {
        "balanced, budget 0.01": "`balanced`, `budget=0.01`",
        "exit distillation, 0.03": "distilled exits",
    }
    del names["soft"]  # of prose with copies, and in the method card
    model, text, steps, longer = "smollm2-135m", "prose", 1000, 2000
    found = {
        (row["lora"], row["steps"], row["method"]): row
        for row in read("on_real_models.json")["table"]
        if (row["model"], row["text"]) == (model, text) and not has_copies(row)
    }
    lines = [_HEAD.format(first=f"{model} on {text}: trained with (seeds)")]
    later = [(False, longer, "balanced"), (True, longer, "balanced")]
    for key in [*((False, steps, name) for name in names), *later]:
        row = found[key]
        after = ", adapters" * row["lora"] + f", {longer:,} steps" * (row["steps"] == longer)
        lines.append(_row(f"{names[row['method']]}{after} ({row['seeds']})", row))
    past = _more(found[later[0]]["loss over lowest"]["mean"])
    return "\n".join([
        *lines,
        "",
        f"{steps:,} steps of all weights. {_said(README, starred=False)} In {longer:,} steps "
        f"plain fine-tuning passes its lowest loss; over that, `balanced` costs {past}.",
    ])  # fmt: skip


def on_real_models() -> str:
    """Every way that was tried, by held-out loss."""
    lines = []
    for search in (False, True):
        tables = _tables(lambda row, search=search: (row["steps"] < _SEARCH) == search)  # type: ignore[misc]
        for key, rows in tables.items():
            lines += _table(key, rows, {})
    named = (
        "In the names a number alone is the strength, *windows of* is `crop`, *a fifth* one exit "
        "after a fifth of the layers; *by distortion* the strength falls with the distortion; "
        "*exits tamed* takes the logarithm of their distances; *maps at* is their maps' rate, "
        "*averaged* over some fifty steps; *every* is of masked runs. "
    )
    return "\n".join([*lines, named + _said(CARD)])


def real_at_budget() -> str:
    """Other projects' losses and the presets where they cost one per cent."""
    result = read("on_real_models.json")
    kinds = ("model", "text", "lora", "steps", "blocks")
    tables: dict[tuple[Any, ...], Rows] = {}
    for row in result["at_budget"]:
        tables.setdefault(tuple(row[kind] for kind in kinds), []).append(row)
    lines = []
    for row in (row for row in sorted(result["table"], key=has_copies) if row["method"] == "plain"):
        rows = tables.get(tuple(row[kind] for kind in kinds), [])
        if not any(each["method"] in PEERS for each in rows):
            continue
        title = _title(*(row[kind] for kind in kinds[:-1]), has_copies(row))
        head, rule = _HEAD.format(first=f"{title} (seeds)").split("\n")
        lines += [f"{head} read between |", f"{rule}---|"]
        lines.append(f"{_row('plain ({seeds})'.format(**row), row)} |")
        for each in sorted(rows, key=lambda each: -each["256 recomputed"]["area_easy"]["mean"]):
            name = each["method"] if each["method"] in PEERS else f"`{each['method']}`"
            short = _SHORT * (each["reached"] < each["seeds"])
            cells = _row(f"{name}{short} ({each['seeds']})", each)
            lines.append(f"{cells} {'; '.join(each['between'])} |")
        lines.append("")
    return "\n".join([
        *lines,
        "Every method where it costs +1 % of plain fine-tuning's held-out loss: in each seed on "
        "the straight line between the way that costs least above that and the one that costs "
        "most below, which may be plain fine-tuning itself; then means over seeds. "
        f"{_SHORT} Too weak for +1 % in at least one seed, which stands with its own values. "
        f"{_said(CARD)}",
    ])  # fmt: skip


def real_side_effects() -> str:
    """What each way does to what nobody trained it for."""
    names = {
        "loss_rare": "loss of rare tokens", "loss_elsewhere": "loss on other text",
        "calibration_error": "calibration error",
    }  # fmt: skip
    hard = (
        ("area_hard", "256 recomputed"),
        ("area_hard", "1024 recomputed"),
        ("size_hard", "256 recomputed"),
        ("size_hard", "1024 recomputed"),
    )
    lines = [
        f"| over plain fine-tuning's | {' | '.join(names.values())} | area, hard, 256 tokens "
        "| at 1,024 | size, hard, 256 | at 1,024 |",
        "|---" * 8 + "|",
    ]
    for key, rows in _tables(lambda row: bool(row["side_effects"])).items():
        for row in rows:
            if row["method"] != "plain":
                found = [
                    *(row["side_effects"][name] for name in names),
                    *(row["hard_over_plain"][place][name] for name, place in hard),
                ]
                shown = " | ".join(f"x{each['mean']:.3f}" for each in found)
                lines.append(f"| {_title(*key)}: {row['method']} | {shown} |")
    return "\n".join([
        *lines,
        "",
        "Hard: the quarter of the tokens with the highest entropy; attention recomputed, median "
        f"size at TV 0.2; means of paired seeds {sources(CARD, *_SOURCES)}.",
    ])  # fmt: skip


def real_tasks() -> str:
    """Tasks made of held-out text: share right after plain fine-tuning, and this way."""
    lines = [f"| right, plain / this way | {' | '.join(TASKS)} |", "|---" * 4 + "|"]
    for key, rows in _tables(lambda row: bool(row["tasks"])).items():
        for row in (row for row in rows if row["method"] != "plain"):
            cells = []
            for name in TASKS:
                cell = "none"
                if name in row["tasks"]:
                    right, over = (row["tasks"][name][each] for each in ("right", "over plain"))
                    plain = 100 * (right["mean"] - over["mean"])
                    low, high = (100 * over[end] for end in ("min", "max"))
                    cell = f"{plain:.1f} / {100 * right['mean']:.1f} % ({low:+.1f} to {high:+.1f})"
                cells.append(cell)
            seeds = f"{row['seeds']} seed" + "s" * (row["seeds"] > 1)
            lines.append(f"| {_title(*key)}: {row['method']}, {seeds} | {' | '.join(cells)} |")
    script = ("comparison/real_tasks.py", "results/on_real_models.json")
    return "\n".join([
        *lines,
        "",
        "Answers that greedy decoding gives whole: words of the passage that come back (cloze), "
        "second halves of lines of code (completion), the end of an answer in the chat's format "
        "(chat, where the tokenizer has a template; only the model that was trained on chats knows "
        "this one). In brackets the smallest and the largest difference of a paired seed, in "
        f"points {sources(CARD, *script)}.",
    ])  # fmt: skip


def _kinds(found: dict[str, Any]) -> list[str]:
    """Kinds of a model whose steps were measured."""
    return [kind for kind in found if not kind.startswith("replay")]


def replays() -> str:
    """What fusing is worth to a replay."""
    said = [
        f"At the size of {model} a replay of "
        + " and one of ".join(
            f"the {part} takes {fused[part]:.1f} ms instead of {as_it_is[part]:.1f}"
            for part in fused
        )
        + "."
        for model, found in read("steps.json")["models"].items()
        if "replays, milliseconds" in found
        for as_it_is, fused in [found["replays, milliseconds"].values()]
    ]
    return " ".join([*said, f"{sources(CARD, 'speed/steps.py', 'results/steps.json')}"])


def steps() -> str:
    """What a step costs at the sizes of real models."""
    result = read("steps.json")
    lines = ["| random weights of the size of | step | time | memory |", "|---|---|---|---|"]
    for model, found in result["models"].items():
        for kind in _kinds(found):
            for way, row in found[kind].items():
                time = row["time"]
                lines.append(
                    f"| {model}, {kind} | {way} | {time['median']:.2f} ({time['q25']:.2f} to "
                    f"{time['q75']:.2f}) | {row['memory']:.2f} |"
                )
    turns = [
        row["rounds"]
        for found in result["models"].values()
        for kind in _kinds(found)
        for row in found[kind].values()
    ]
    errors = [found["replayed, float32"] for found in result["models"].values()]
    error = {name: max(each[name] for each in errors) for name in ("term", "gradients")}
    return "\n".join([
        *lines,
        "",
        f"Over a plain step (quartiles of {min(turns)} to {max(turns)} interleaved turns of "
        f"{result['steps_a_turn']} steps), {result['batch'][0]} x {result['batch'][1]} tokens, "
        f"{result['precision']}, {result['hardware']}, torch {result['versions']['torch']}. A "
        "replayed term equals the same term run as it is (largest relative difference "
        f"{error['term']:.0e}), its gradients to {error['gradients']:.0e} in float32 "
        f"{sources(CARD, 'speed/steps.py', 'results/steps.json')}.",
    ])  # fmt: skip
