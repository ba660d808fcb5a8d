"""``--push_to_hub``: what is uploaded, and what the hub refuses; nothing leaves this machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from softtrace.cli import main
from softtrace.cli.card import card
from softtrace.cli.fit import FitCLI, fit
from softtrace.errors import InvalidInputError
from softtrace.files import write_json
from tests.cli.test_fit import arguments
from tests.support.corpus import write_model, write_tree
from tests.support.densities import synthetic_density


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The two calls that would use the network."""
    created = SimpleNamespace(repo_id="me/model")
    made = SimpleNamespace(created=Mock(return_value=created), sent=Mock())
    monkeypatch.setattr(HfApi, "create_repo", made.created)
    monkeypatch.setattr(HfApi, "upload_folder", made.sent)
    return made


def uploaded(hub: Any) -> set[str]:
    """Files that the library chooses for what it was asked."""
    hub.sent.assert_called_once()
    asked = hub.sent.call_args.kwargs
    assert asked["repo_id"] == "me/model"
    folder = Path(asked["folder_path"])
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return set(filter_repo_objects(files, allow_patterns=asked["allow_patterns"]))


def measured(folder: Path) -> Path:
    """A folder with what evaluate writes."""
    folder.mkdir(parents=True)
    write_json(folder / "density.json", synthetic_density())
    (folder / "report.html").write_text("<p>a report</p>")
    return folder


@pytest.mark.thorough
def test_fit_uploads_model_tokenizer_and_card(
    tmp_path: Path, hub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = write_model(tmp_path / "base"), write_tree(tmp_path / "text")
    out = fit(arguments(sources, tmp_path / "out", "--push_to_hub", "model", "--card_blocks", 0))
    hub.created.assert_called_once_with("model", private=True, exist_ok=True)
    found = uploaded(hub)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= found
    assert found < {path.name for path in out.iterdir()}  # nothing of a folder below
    assert "fit.yaml" not in found  # which has paths in it
    assert "uploaded to https://huggingface.co/me/model" in capsys.readouterr().out


def test_nothing_is_uploaded_unasked(tmp_path: Path, hub: Any) -> None:
    write_model(tmp_path / "model")
    card(str(tmp_path / "model"), str(measured(tmp_path / "density")))
    hub.created.assert_not_called()
    hub.sent.assert_not_called()


def test_card_links_the_report_and_uploads_it(tmp_path: Path, hub: Any) -> None:
    model = write_model(tmp_path / "model")
    density = measured(model / "a density")
    card(str(model), str(density / "density.json"), push_to_hub="me/model")
    page = (model / "README.md").read_text(encoding="utf-8")
    assert "\n[Report](a%20density/report.html): curves, and the text token by token.\n" in page
    found = uploaded(hub)
    assert {"model.safetensors", "README.md", "a density/report.html"} <= found
    assert "a density/density.json" not in found


def test_a_report_elsewhere_is_neither_linked_nor_uploaded(tmp_path: Path, hub: Any) -> None:
    """The card would name a path of this machine."""
    model, density = write_model(tmp_path / "model"), measured(tmp_path / "density")
    card(str(model), str(density), push_to_hub="me/model")
    assert "[Report]" not in (model / "README.md").read_text(encoding="utf-8")
    assert not [name for name in uploaded(hub) if name.endswith(".html")]


def test_a_hub_that_refuses_is_met_before_a_model_is_loaded(
    tmp_path: Path, hub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.created.side_effect = [LocalTokenNotFoundError("Token is required") for _ in range(2)]
    sources = tmp_path / "no-model", write_tree(tmp_path / "text")
    words = arguments(sources, tmp_path / "out", "--push_to_hub", "model")
    with pytest.raises(InvalidInputError, match="push_to_hub: found 'model': Token is required; "):
        FitCLI(words)
    assert main(["fit", *words]) == 1
    assert "log in by `hf auth login`" in capsys.readouterr().err


def test_a_name_that_is_none_is_refused_by_the_library_itself(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with pytest.raises(InvalidInputError, match="push_to_hub: found 'a//b': "):
        card(str(model), str(measured(tmp_path / "density")), push_to_hub="a//b")
    assert not (model / "README.md").exists()


@pytest.mark.thorough
def test_an_upload_that_fails_costs_no_weights(tmp_path: Path, hub: Any) -> None:
    hub.sent.side_effect = OSError("no route to host")
    sources = write_model(tmp_path / "base"), write_tree(tmp_path / "text")
    words = arguments(sources, tmp_path / "out", "--push_to_hub", "model", "--card_blocks", 0)
    with pytest.raises(InvalidInputError, match="no route to host; allowed is"):
        fit(words)
    assert (tmp_path / "out" / "model.safetensors").is_file()
