"""What `mkdocs.yml` needs beside its pages: README, CHANGELOG, notebooks, links out of the site.

MkDocs calls these functions by their names. A link to a file that is no page leads to the
repository where ``repo_url`` says where that is, and is shown as the file's name where it does not.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
from pathlib import Path
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from recipes.benchmarks.pages.notebooks import as_markdown

ROOT = Path(__file__).resolve().parents[3]
#: pages that lie outside of ``docs_dir``, by what they are called on the site
OUTSIDE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
#: pages that MkDocs would put where their folder begins
MOVED = {"README.md": "method-card/index.html"}
COMMANDS = ("fit", "evaluate", "study", "compare", "decode-bench", "card", "inspect")

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]*)(#[^)\s]*)?\)")
_MARKER = re.compile(r"^<!-- /?\w+ -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside and those of notebooks; README.md has the front page."""
    for source, target in MOVED.items():
        file = files.get_file_from_path(source)
        assert file is not None, source
        file.dest_uri = target
    for name, source in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    for file in [each for each in files if each.src_uri.endswith(".ipynb")]:
        files.remove(file)
        text = as_markdown(ROOT / "recipes" / file.src_uri)
        name = file.src_uri.replace(".ipynb", ".md")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page's text with links that hold on the site, and with what the commands say."""
    if page.parent is None:  # alone in its tab: no list of pages beside it
        page.meta["hide"] = ["navigation"]
    if page.file.src_uri == "command-line.md":
        markdown += helps()
    source = source_of(page.file.src_uri)
    pages = {name for name, file in of_site(files).items() if not file.inclusion.is_excluded()}

    def linked(match: re.Match[str]) -> str:
        picture, shown, path, anchor = match.groups()
        if not path:
            return match[0]
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        for name in (found, f"{found}/README.md"):
            if name in pages:
                here = posixpath.dirname(page.file.src_uri)
                target = posixpath.relpath(of_site(files)[name].src_uri, here or ".")
                return f"{picture}[{shown}]({target}{anchor or ''})"
        if not (ROOT / found).exists():
            return match[0]  # for MkDocs to complain of
        if config.repo_url:
            return f"[{shown}]({config.repo_url.rstrip('/')}/blob/main/{found})"
        same = shown.strip("`/") in (found, posixpath.basename(found))
        return f"`{found}`" if same else f"{shown} (`{found}`)"

    parts = re.split(r"(^```.*?^```$)", _MARKER.sub("", markdown), flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(linked, part) for part in parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page with numbers and options whole, without roles (``:func:``), unknown to Markdown."""
    if not any(heading.children for heading in page.toc):
        page.meta.setdefault("hide", []).append("toc")
    html = re.sub(r"<td>([^<\n]{1,10})</td>", r'<td class="whole">\1</td>', html)
    html = re.sub(r"(?<=[\s>])(--\w[\w.]*)", r'<span class="whole">\1</span>', html)
    return re.sub(r":(?:func|class|meth|mod|attr|data|exc):(<code>)~?", r"\1", html)


def source_of(name: str) -> str:
    """Where a file of the site lies in the repository."""
    if name.startswith("notebooks/"):
        name = name.replace(".md", ".ipynb")
    return OUTSIDE.get(name, f"recipes/{name}")


def of_site(files: Files) -> dict[str, File]:
    """Files of the site by where they lie in the repository."""
    return {source_of(file.src_uri): file for file in files}


def helps() -> str:
    """What ``softtrace COMMAND --help`` prints, of each command."""
    from softtrace.cli import main  # takes seconds

    shown: list[str] = []
    for command in COMMANDS:
        out = io.StringIO()
        with (
            patch.dict(os.environ, {"COLUMNS": "78"}),
            contextlib.redirect_stdout(out),
            contextlib.suppress(SystemExit),
        ):
            main([command, "--help"])
        text = out.getvalue().replace("\b", "").rstrip()  # which jsonargparse writes for terminals
        shown.append(f"\n## {command}\n\n```text\n{text}\n```\n")
    return "".join(shown)
