"""The notebooks run from their first cell to their last, and hold what they show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recipes.benchmarks.pages.notebooks import as_markdown, code_of
from tests.support.corpus import write_model, write_tree
from tests.support.notebooks import FOLDER, run

NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def test_there_are_two() -> None:
    assert NOTEBOOKS == ["presets.ipynb", "trace_one_token.ipynb"]


@pytest.mark.thorough
def test_one_token_is_traced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the model and the text that it comes with, and as what is stored says."""
    found = run("trace_one_token.ipynb", monkeypatch)
    assert len(found["trace"].edges) == 64
    page = as_markdown(FOLDER / "trace_one_token.ipynb")
    said = [line for line in capsys.readouterr().out.splitlines() if "tokens, " in line]
    assert said[0] in page
    assert f"follows {found['words'][found['position']]!r} at position {found['position']}" in page


@pytest.mark.thorough
def test_presets_are_compared_on_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=2)
    text = write_tree(tmp_path / "text", files=20)
    found = run("presets.ipynb", monkeypatch, MODEL=model, TEXT=text, STEPS=2, HELD_OUT=2)
    assert list(found["measured"]) == ["plain", "sparse", "balanced", "decode"]
    for row in found["measured"].values():
        assert 0 < row["area_easy"] < 1
        assert len(row["exits"]) == 2
    assert capsys.readouterr().out.count("same text: True") == 4


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stored_and_are_no_errors(name: str) -> None:
    whole = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert whole["nbformat"] == 4
    cells = [cell for cell in whole["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert {output.get("name") for output in outputs} <= {None, "stdout"}  # no progress bars
    shown = "".join("".join(output.get("text", "")) for output in outputs)
    assert re.findall(r"/(?:home|tmp|root|work|usr)/", shown) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_pages_show_text_code_and_outputs(name: str) -> None:
    page = as_markdown(FOLDER / name)
    assert page.startswith("# ")
    assert page.count("```python\n") == len(code_of(FOLDER / name))
    assert "](data:image/png;base64,iVBOR" in page
    assert "```text\n" in page
