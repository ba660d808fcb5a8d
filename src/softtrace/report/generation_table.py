"""What ``generation.json`` says, as a plain-text table."""

from __future__ import annotations

from collections.abc import Iterator

from softtrace.report.study_tables import Row, Study, filled, section_lines
from softtrace.report.tables import wrapped

_WRITERS = {"text": "the text", "greedy": "greedy", "sampled": "sampled"}
_LEGEND = (
    "In brackets: {confidence} percentile intervals, bootstrap over sequences ({resamples:,} "
    "resamples, seed {seed}).\n"
    "The prompt is the first {prompt} tokens of each sequence. The next {new} are the text's own, "
    "or what the model writes in their place: greedily, its most likely token each time, or "
    "sampled at temperature 1.\n"
    "All are measured at the same places of sequences of one length, so that sizes compare."
)


def generation_table(found: Study) -> str:
    """The numbers of every model by who wrote: a row a model, and of two the change.

    Args:
        found: the content of a ``generation.json``.
    """
    settings = found["settings"]
    header = (
        f"{', '.join(model['path'] for model in found['models'])}\n"
        f"{found['sequences']:,} prompts of {found['prompt']} tokens, {found['data']['split']}; "
        f"attention of masked runs {settings['attention']}"
    )
    legend = filled(_LEGEND, settings, prompt=found["prompt"], new=found["new"])
    lines = section_lines(found, _sections(found))
    return "\n".join([wrapped(header), "", *lines, wrapped(legend)])


def _sections(found: Study) -> Iterator[tuple[str, list[Row]]]:
    results, axes = found["results"], found["axes"]
    overall = [key for key in results if key.startswith("overall/") and "_change" not in key]
    for key in [*overall, "order/neighbours", "order/position"]:
        name = results[key]["name"]
        rows: list[Row] = [
            (_WRITERS[writer], key, (at,)) for at, writer in enumerate(axes["writers"])
        ]
        rows += [
            (f"   {_WRITERS[writer]} less the text", f"{key}_change", (at,))
            for at, writer in enumerate(axes["others"])
        ]
        yield name[0].upper() + name[1:], rows
    for key in ("area", "size"):
        yield (
            f"Along the new tokens: {results[f'overall/{key}']['name']}",
            [
                (f"{_WRITERS[writer]}, tokens {first} to {last}", f"along/{key}", (place, at))
                for at, writer in enumerate(axes["writers"])
                for place, (first, last) in enumerate(axes["bins"])
                if place in (0, len(axes["bins"]) // 2, len(axes["bins"]) - 1)
            ],
        )
