"""``softtrace card``: put what was measured into a model's README.md."""

from __future__ import annotations

from pathlib import Path

from softtrace.cli.hub import make_repository, upload
from softtrace.errors import ModelDirectoryError
from softtrace.evaluation.density_file import check_comparable, load_density
from softtrace.files import claimed
from softtrace.report.model_card import write_density

#: of which a model's directory holds one, and a folder of runs or of a project none
_CONFIGS = ("config.json", "adapter_config.json")


def card(model: str, density: str, base: str | None = None, push_to_hub: str | None = None) -> None:
    """Put the numbers of density.json into the README.md of a model; the rest of it stays.

    The section links to the report.html beside density.json where both are inside of the model's
    directory.

    Args:
        model: Directory of the model.
        density: The density.json of this model, or its folder.
        base: The density.json of the model that it was fine-tuned from, or its folder. It has to be
            measured on the same text.
        push_to_hub: Upload the model, its tokenizer, the card and the report to this repository of
            the Hugging Face hub (OWNER/NAME, or NAME for one of yours). A new one is private.

    Raises:
        ModelDirectoryError: no such directory, or one without a config.
        DataError: a file cannot be read.
        InvalidInputError: the two were measured on other tokens, or the hub refuses the upload.
        OutputExistsError: a fit is writing to the model.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise ModelDirectoryError(f"{model}: no such directory; expected a model directory")
    if not any((folder / name).is_file() for name in _CONFIGS):
        raise ModelDirectoryError(
            f"{model}: found no config.json in it; expected a model directory, whose README.md is "
            "its card"
        )
    own, other = load_density(density), None if base is None else load_density(base)
    if other is not None:
        check_comparable([str(density), str(base)], [own, other])
    place = Path(density)
    page = (place if place.is_dir() else place.parent) / "report.html"
    inside = page.is_file() and page.resolve().is_relative_to(folder.resolve())
    repository = None if push_to_hub is None else make_repository(push_to_hub)
    with claimed(folder):
        write_density(folder, own, other, page if inside else None)
    print(f"written to {folder / 'README.md'}")
    if repository is not None:
        upload(folder.resolve(), repository, *([page.resolve()] if inside else []))
