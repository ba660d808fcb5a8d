"""What ``softtrace decode-bench`` measured, as text for a terminal."""

from __future__ import annotations

from typing import Any

from softtrace.percent import percent


def decoding_table(found: dict[str, Any]) -> str:
    """What was measured, for a terminal."""
    exits = found["exits"]
    lines = [
        f"early exits on {found['prompts_chosen_on']} x {found['new_tokens']} tokens that the "
        "model wrote",
        "  layers   agreement   cost of a guess   expected speed-up",
    ]
    lines += _rows("  {:6d}   {:>9s}   {:15.2f}   {:17.2f}", _agreement_in_words(exits))
    checks = found["check_cost"]
    most = min(4, len(checks))
    lines.append(
        f"  a check of 1 token costs {checks[0]:.2f} plain tokens, of {most} {checks[most - 1]:.2f}"
    )
    lines.append("")
    lines.append(
        f"drafting with {found['exit_layer']} layers, {found['draft_tokens']} tokens at most, "
        f"confidence {found['confidence']:g}, timed on {found['prompts']} prompts"
    )
    for name, loop in found["loops"].items():
        gain = loop["speedup"]
        lines.append(
            f"  {name} loop: {loop['plain_tokens_per_second']:.0f} tokens/s plain, "
            f"{loop['tokens_per_second']:.0f} speculative: x{gain['median']:.2f} "
            f"({gain['q25']:.2f} to {gain['q75']:.2f})\n    "
            f"{percent(loop['identical'], 0)} of its texts are plain decoding's"
        )
    direct = found["loops"]["direct"]
    share = f" ({percent(direct['acceptance'], 1)})" if direct["drafted"] else ""
    lines.append(
        f"  {direct['accepted']} of {direct['drafted']} guesses accepted{share}, "
        f"{direct['accepted'] / direct['checks']:.2f} a draft"
    )
    lines += ["", *_race(found["race"])]
    lines += ["", *_early(found["early"])]
    lines += ["", "stopping where the exit is sure (not lossless)"]
    lines.append("  confidence   layers used   agreement")
    lines += _rows("  {:10.2f}   {:11.2f}   {:>9s}", _agreement_in_words(found["gated"]))
    return "\n".join(lines)


def _race(race: dict[str, Any]) -> list[str]:
    """Every way to decode, and which one to use."""
    lines = [
        "all ways: tokens a second (quartiles), texts that are the eager loop's,",
        "  share of right guesses among those that come after right ones",
    ]
    width = max(map(len, race["ways"]))
    for name, way in race["ways"].items():
        speed = way["tokens_per_second"]
        lines.append(
            f"  {name:{width}s} {speed['median']:7.0f} ({speed['q25']:.0f} to {speed['q75']:.0f})"
            f"  {percent(way['identical'], 0)}{_tie(way)}{_accepted(way)}"
        )
    if race["left_out"]:
        lines.append(f"  steps of fixed shapes were left out: {race['left_out']}")
    else:
        drafts = "exit_layer={exit_layer} and draft_tokens={draft_tokens}".format(**race["fixed"])
        lines.append(f"  by fixed shapes with {drafts}")
    if race["backend"] is None and not race["left_out"]:
        lines.append("  nothing was compiled; pass --backend inductor for what compiling is worth")
    gain, draft, plain = race["drafts_over_plain"], race["best_draft"], race["best_plain"]
    said = f"x{gain['median']:.2f} ({gain['q25']:.2f} to {gain['q75']:.2f})"
    if race["use"] == draft:
        lines.append(
            f"use: {draft}. It writes {said} of what\n{plain} does, the fastest way without drafts"
        )
    else:
        lines.append(
            f"use: {plain}. Drafts do not pay here: the fastest,\n{draft}, is {said} of it"
        )
    return lines


def _tie(way: dict[str, Any]) -> str:
    gap = way["largest_tie"]
    return "" if gap is None else f", the others part where two scores are {gap:.1g} apart"


def _accepted(way: dict[str, Any]) -> str:
    share = way["acceptance_each"]
    return "" if share is None else f"  {percent(share, 0)}"


def _early(early: dict[str, Any]) -> list[str]:
    """Early exit without a check."""
    head = (
        f"exit after {early['exit_layer']} layers without a check (not lossless), for an agreement "
        f"of {percent(early['agreement_asked'], 1)}"
    )
    if early["left_out"]:
        return [head, f"  {early['left_out']}"]
    gain = early["speedup"]
    return [
        head,
        f"  confidence {early['confidence']:.3f}: {percent(early['early'], 1)} of tokens go out "
        f"early, {percent(early['layers_saved'], 1)} of layers saved,\n"
        f"  {percent(early['agreement'], 1)} of tokens are the whole model's, "
        f"x{gain['median']:.2f} ({gain['q25']:.2f} to {gain['q75']:.2f}) of the eager loop",
    ]


def _agreement_in_words(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**columns, "agreement": [percent(each, 1) for each in columns["agreement"]]}


def _rows(form: str, columns: dict[str, list[Any]]) -> list[str]:
    return [form.format(*row) for row in zip(*columns.values(), strict=True)]
