"""The site's pages and their links; `make docs` builds it, with warnings as errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from mkdocs.config import load_config
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

from recipes.benchmarks.pages import drawings, site
from softtrace.cli.main import _COMMANDS
from tests.docs.pages import PAGES, ROOT, text_of

#: files that people read; a model's tokenizer holds words of other people's texts
READ = (".py", ".md", ".j2", ".js", ".css", ".ipynb")
LINKED = (*PAGES, "CHANGELOG.md", "CONTRIBUTING.md", "recipes/benchmarks/LOG.md")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text("utf-8")), re.MULTILINE)
    return {slugify(case="lower")(re.sub(r"[`*]", "", each), "-") for each in headings}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_to_files_and_headings(page: str) -> None:
    found = re.findall(r"\]\(([^)\s#:]*)(?:#([^)\s]+))?\)", without_code(text_of(page)))
    for target, anchor in found:
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


def test_the_readme_is_a_tour() -> None:
    """What takes longer to say has a page of its own."""
    assert len(text_of("README.md").split()) <= 1900


def test_the_terms_of_the_field_are_used() -> None:
    """Integration, interleaved, resumes, verbatim and baselines are what these words meant."""
    home_grown = (
        r"\bdoors?\b|\b(?:timed|prompts?) in turns\b|\bgo(?:es|ing)? on\b|to the letter"
        r"|other people's losses"
    )
    folders = [ROOT / name for name in ("src", "recipes", "tests")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in READ]
    assert len(files) > 400
    for path in (*files, *(ROOT / page for page in LINKED)):
        if path != Path(__file__):
            found = re.findall(home_grown, path.read_text(encoding="utf-8"), re.IGNORECASE)
            assert found == [], path


def navigation(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for each in (entry if isinstance(entry, list) else entry.values())
            for page in navigation(each)]  # fmt: skip


def test_every_page_is_in_the_navigation() -> None:
    text = re.sub(r"!!python\S+ .*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = navigation(yaml.safe_load(text)["nav"])
    assert len(set(named)) == len(named)
    shown = {site.source_of(page) for page in named}
    assert set(PAGES) <= shown
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("recipes/notebooks/*.ipynb")} <= shown
    for page in shown:
        assert (ROOT / page).is_file()


def on_the_site(page: str, text: str, repo_url: str | None = None) -> str:
    """A page's text as the site is made of it."""
    config = load_config(str(ROOT / "mkdocs.yml"))
    config["repo_url"] = repo_url
    config.plugins._current_plugin = "hooks"  # as while MkDocs calls one
    names = ("README.md", "TUTORIAL.md", "how-to/lora.md", "models/pystdlib-4m/README.md",
             "notebooks/presets.ipynb")  # fmt: skip
    files = Files([File(name, config["docs_dir"], "", True) for name in names])
    site.on_files(files, config)
    file = files.get_file_from_path(page)
    assert file is not None
    return site.on_page_markdown(text, Page(None, file, config), config, files)


@pytest.mark.parametrize(
    ("page", "text", "shown"),
    [
        ("index.md", "[card](recipes/README.md#what-it-costs)", "[card](README.md#what-it-costs)"),
        ("index.md", "[4m](recipes/models/pystdlib-4m)", "[4m](models/pystdlib-4m/README.md)"),
        ("README.md", "[start](../README.md#install)", "[start](index.md#install)"),
        ("how-to/lora.md", "[t](../TUTORIAL.md)", "[t](../TUTORIAL.md)"),
        ("how-to/lora.md", "[configs/](../../configs)", "`configs`"),
        ("index.md", "[rules](CONTRIBUTING.md)", "rules (`CONTRIBUTING.md`)"),
        ("index.md", "[n](recipes/notebooks/presets.ipynb)", "[n](notebooks/presets.md)"),
        ("notebooks/presets.md", "[c](../how-to/lora.md)", "[c](../how-to/lora.md)"),
        ("index.md", "[gone](recipes/gone.md)", "[gone](recipes/gone.md)"),  # strict: an error
        ("index.md", "[a](https://arxiv.org/a)", "[a](https://arxiv.org/a)"),
        ("index.md", "```python\na[0](recipes/README.md)\n```", None),
    ],
)
def test_links_hold_on_the_site(page: str, text: str, shown: str | None) -> None:
    assert on_the_site(page, text) == (text if shown is None else shown)


def test_links_out_of_the_site_lead_to_the_repository_where_one_is_known() -> None:
    made = on_the_site("index.md", "[rules](CONTRIBUTING.md)", "https://example.org/softtrace/")
    assert made == "[rules](https://example.org/softtrace/blob/main/CONTRIBUTING.md)"


@pytest.mark.thorough
def test_the_command_line_is_shown_as_it_is() -> None:
    assert set(site.COMMANDS) == set(_COMMANDS)
    text = site.helps()
    for command in _COMMANDS:
        assert f"\n## {command}\n\n```text\nusage: softtrace {command} " in text


@pytest.mark.thorough
def test_drawings_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["drawings", "--out", str(tmp_path)])
    drawings.main()
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in drawings.FOLDER.iterdir())
    for name in made:
        assert f"concepts/{name}" in text_of("recipes/concepts.md")
