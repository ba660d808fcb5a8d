"""The README.md of a fine-tuned model: sections of ours, and everything else as it was."""

from __future__ import annotations

import gc
import re
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from softtrace.cli.fit import FitCLI, fit
from softtrace.errors import DataError
from softtrace.report.model_card import write_density, write_settings
from softtrace.report.tables import MEASURES
from tests.cli.test_fit import arguments as without_density
from tests.support.corpus import write_model, write_tree
from tests.support.densities import synthetic_density

METADATA = """---
license: mit # chosen with care
version: 1.10
tags:
  - 'code'   # not "coding"
model_name: "mine"

# what it is for
description: >-
  folded over
  two lines
"""
BODY = """---
# My model

Do not touch *this*.
"""
OPTIONS: dict[str, Any] = {
    "model": {"path": "owner/base", "learning_rate": 1e-3, "lora": None},
    "data": {"path": "/home/me/text", "block_size": 16},
    "trainer": {"max_steps": 6, "precision": None},
    "penalty": {"strength": 0.35, "depths": [0.5, 1.0]},
}


def arguments(sources: tuple[Path, Path], out: Path, *more: object) -> list[str]:
    """A short fit that measures for its card, as one does unless told otherwise."""
    return without_density(sources, out, "--card_blocks", 16, *more)


def write_both(folder: Path) -> bytes:
    """Both sections; the page with them."""
    write_settings(folder, OPTIONS)
    write_density(folder, synthetic_density())
    return (folder / "README.md").read_bytes()


@pytest.mark.parametrize("kind", ["recorded", "recomputed", "kept"])
def test_the_kind_of_attention_is_named(tmp_path: Path, kind: str) -> None:
    write_density(tmp_path, synthetic_density() | {"attention": kind})
    assert f"attention of masked runs {kind}. " in (tmp_path / "README.md").read_text("utf-8")


@pytest.mark.parametrize("line", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["---", "..."])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_what_people_wrote_stays(tmp_path: Path, line: str, end: str, mark: str) -> None:
    page = tmp_path / "README.md"
    body = BODY.replace("---", end)
    page.write_bytes((mark + METADATA + body).replace("\n", line).encode())
    once = write_both(tmp_path)
    text = once.decode().replace(line, "\n")
    before, after = METADATA.split("model_name")
    keys = "library_name: transformers\npipeline_tag: text-generation\nbase_model: owner/base\n"
    own = f"{mark}{before}  - softtrace\nmodel_name{after}{keys}{body}"
    assert text.startswith(f"{own}\n<!-- softtrace-fit -->\n")
    assert once.count(line.encode()) == once.count(b"\n")
    assert write_both(tmp_path) == once
    if end == "---":
        # without the mark, behind which older releases of the hub's package see no front matter
        data: Any = ModelCard(once.decode().removeprefix(mark)).data
        assert (data.license, data.model_name, data.tags) == ("mit", "mine", ["code", "softtrace"])
        assert (data.library_name, data.base_model) == ("transformers", "owner/base")


def test_a_section_is_replaced_and_not_repeated(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(METADATA + BODY, encoding="utf-8")
    once = write_both(tmp_path).decode()
    page.write_text(once + "\nThe end.\n")
    write_settings(tmp_path, {**OPTIONS, "penalty": {"strength": 0.5}})
    write_density(tmp_path, synthetic_density(factor=0.5), synthetic_density())
    again = page.read_text(encoding="utf-8")
    assert again.count("## Fine-tuned with softtrace") == 1
    assert again.count("## Computation density") == 1
    assert "strength: 0.5" in again
    assert "strength: 0.35" not in again
    strip = re.compile(r"<!-- (softtrace-\w+) -->.*?<!-- /\1 -->", re.DOTALL)
    assert strip.sub("", again) == strip.sub("", once) + "\nThe end.\n"


def test_metadata_that_is_there_is_not_overruled(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nbase_model: other/one\nlibrary_name: peft\npipeline_tag: text2text-generation\n"
        "tags: [softtrace]\n---\n"
    )
    write_settings(tmp_path, OPTIONS)
    data: Any = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "other/one"
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text2text-generation"
    assert data.tags == ["softtrace"]


def test_paths_of_this_machine_stay_private(tmp_path: Path) -> None:
    base = tmp_path / "secret" / "base"
    base.mkdir(parents=True)
    write_settings(tmp_path, {**OPTIONS, "model": {"path": str(base)}})
    page = (tmp_path / "README.md").read_text()
    assert "From `base`" in page
    assert "secret" not in page
    assert "/home/me" not in page
    assert "base_model" not in page


def test_a_base_in_the_working_directory_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path / "base")
    write_settings(tmp_path, {**OPTIONS, "model": {"path": "."}})
    assert "From `base`, with" in (tmp_path / "README.md").read_text()


def test_settings_can_be_read_back(tmp_path: Path) -> None:
    write_settings(tmp_path, OPTIONS)
    page = (tmp_path / "README.md").read_text()
    settings = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    assert settings["penalty"] == OPTIONS["penalty"]
    assert settings["model"] == {"learning_rate": 1e-3}
    assert settings["trainer"] == {"max_steps": 6}


def test_numbers_are_those_of_the_table_with_their_intervals(tmp_path: Path) -> None:
    density = {**synthetic_density(factor=0.5), "intervals": {"area_easy": (0.125, 0.175)}}
    write_density(tmp_path, density, synthetic_density())
    page = (tmp_path / "README.md").read_text()
    assert "| area under distortion, easy tokens | lower | 0.300 | 0.150 (0.125 to 0.175) |" in page
    assert "in brackets 95 % of 1,000 bootstrap samples of the blocks, in all of which" in page
    shown = [measure for measure in MEASURES if f"| {measure.name} |" in page]
    assert len(shown) == 7
    for measure in shown:
        assert f" {measure.format(measure.read(density))} " in page


@pytest.mark.parametrize(
    "bounds", [{}, {"area_easy": [None, 0.2]}, {"area_easy": [nan, nan]}, None]
)
def test_no_brackets_without_both_bounds(tmp_path: Path, bounds: dict[str, Any] | None) -> None:
    write_density(tmp_path, {**synthetic_density(), "intervals": bounds})
    page = (tmp_path / "README.md").read_text()
    assert "| area under distortion, easy tokens | lower | 0.300 |" in page
    assert "in brackets" not in page


@pytest.mark.thorough
def test_fit_writes_a_card_and_a_second_fit_does_not_repeat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softtrace.cli.fit._MEASURED", 10)
    sources = write_model(tmp_path / "base"), write_tree(tmp_path / "text")
    out = fit(arguments(sources, tmp_path / "out"))
    page = (out / "README.md").read_text(encoding="utf-8")
    assert page.startswith("---\n")
    assert "# out\n" in page
    assert "From `base`, with the density penalty (strength 0.35)" in page
    assert "assistant_early_exit=" in page
    assert "softtrace.load_exit_maps(model, folder)" in page
    assert str(tmp_path) not in page
    assert re.search(r"\(held out, share 0.05\) in \d+ blocks of 10; in brackets", page)
    row = re.search(r"\| loss \(nats/token\) \| lower \| (\S+) \(.* to .*\) \| (\S+) \(", page)
    assert row is not None
    assert float(row[2]) < float(row[1])  # it has learnt
    (out / "README.md").write_text(page.replace("# out\n", "# out\n\nMine.\n"), encoding="utf-8")
    fit(arguments(sources, tmp_path / "out", "--resume", "true"))
    again = (out / "README.md").read_text(encoding="utf-8")
    assert again == page.replace("# out\n", "# out\n\nMine.\n")
    bare = fit(arguments(sources, tmp_path / "bare", "--card_blocks", 0))
    page = (bare / "README.md").read_text(encoding="utf-8")
    assert "## Fine-tuned with softtrace" in page
    assert "## Computation density" not in page


def test_a_card_that_cannot_be_written_costs_no_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = write_model(tmp_path / "base"), write_tree(tmp_path / "text")
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("<!-- softtrace-fit -->\n")
    fit(arguments(sources, out, "--resume", "true"))
    assert (out / "model.safetensors").is_file()
    assert "found 1 of <!-- softtrace-fit --> and 0 of" in caplog.text


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("no room"), "OutOfMemoryError: no room"),
        (MemoryError(), "MemoryErr"),
    ],
)
def test_nothing_of_the_training_is_held_when_the_base_comes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    reason: str,
) -> None:
    sources = write_model(tmp_path / "base"), write_tree(tmp_path / "text")
    cli = FitCLI(arguments(sources, tmp_path / "out"))
    held: list[object] = []

    def load(*_: object, **__: object) -> None:
        own = {id(parameter) for parameter in cli.model.parameters()}
        for found in gc.get_objects():
            if issubclass(type(found), torch.optim.Optimizer):
                first = found.param_groups[0]["params"][0]
                held.extend([found] if id(first) in own else [])
        held.extend(p.grad for p in cli.model.parameters() if p.grad is not None)
        raise error

    monkeypatch.setattr("softtrace.cli.fit.load_model", load)
    out = cli.fit()
    assert not held
    assert f"the model card lacks what could not be measured: {reason}" in caplog.text
    assert (out / "model.safetensors").is_file()
    assert "## Fine-tuned with softtrace" in (out / "README.md").read_text()


@pytest.mark.parametrize("content", [b"\xff\xfe\xfd", b"---\n- a list\n---\n", b"---\na: [\n---\n"])
def test_a_readme_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(DataError, match=r"README.md: [\s\S]*; (save it as UTF-8|repair it)"):
        write_density(tmp_path, synthetic_density())
    assert (tmp_path / "README.md").read_bytes() == content
