"""``softtrace compare``: several ``density.json`` of the same text side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softtrace.evaluation.density_file import Density, check_comparable, load_density, run_labels
from softtrace.files import claims_out, prepare_output, write_json, write_text
from softtrace.report.drawing import check_count
from softtrace.report.html_page import write_report
from softtrace.report.plots import write_plots
from softtrace.report.tables import MEASURES, comparison_table, ratio

COMPARISON_VERSION = 1


@claims_out
def compare(paths: Sequence[Path | str], out: str, overwrite: bool = False) -> str:
    """Compare runs that were measured on the same tokens; write numbers, table, plots and
    report.html to OUT.

    Args:
        paths: 2 to 8 files density.json, or the folders they are in. The others are compared to the
            first.
        out: Folder that results are written to. It must be new or empty.
        overwrite: Write into a folder that holds files, and replace those of the same name.

    Returns:
        The comparison as a table in plain text.

    Raises:
        InvalidInputError: too few or too many runs, or runs measured on other tokens.
        DataError: a file is missing or is no density.json.
        OutputExistsError: OUT is not empty, or another run writes to it.
    """
    check_count(paths, least=2)
    densities = [load_density(path) for path in paths]
    check_comparable([str(path) for path in paths], densities)
    labels = run_labels([Path(path) for path in paths], densities)
    runs = list(zip(labels, densities, strict=True))
    folder = prepare_output(out, overwrite)
    table = comparison_table(runs)
    write_json(folder / "compare.json", _comparison(runs, paths))
    write_text(folder / "compare.txt", table)
    write_plots(runs, folder)
    write_report(runs, folder)
    print(table)
    print(f"\nwritten to {folder}/: compare.json, compare.txt, plots and report.html")
    return table


def _comparison(runs: Sequence[tuple[str, Density]], paths: Sequence[Path | str]) -> dict[str, Any]:
    first = runs[0][1]
    measures = {}
    for measure in MEASURES:
        base = measure.read(first)
        values = [(label, measure.read(density)) for label, density in runs]
        measures[measure.key] = {
            "name": measure.name,
            "unit": measure.unit,
            "better": measure.better,
            "runs": {
                label: {"value": value, "ratio": ratio(value, base)} for label, value in values
            },
        }
    return {
        "version": COMPARISON_VERSION,
        "first": runs[0][0],
        "runs": [
            {
                "label": label,
                "path": str(path),
                "model": density["model"],
                **{key: density.get(key) for key in ("created", "versions", "hardware")},
            }
            for (label, density), path in zip(runs, paths, strict=True)
        ],
        "data": first["data"],
        "tokens": first["tokens"],
        "attention": first["attention"],
        "dtype": first["dtype"],
        "min_context": first["min_context"],
        "measures": measures,
    }
