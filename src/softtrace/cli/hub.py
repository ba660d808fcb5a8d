"""``--push_to_hub``: a model directory as a repository of the Hugging Face hub."""

from __future__ import annotations

from contextlib import AbstractContextManager
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi

from softtrace.errors import InvalidInputError
from softtrace.libraries import refusals

#: a model and its tokenizer; folders (checkpoints, logs) and fit.yaml, which has paths in it, stay
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model")
_NAMES = ("README.md", "merges.txt", "vocab.txt")


def make_repository(name: str) -> str:
    """Make a private repository where there is none yet.

    Args:
        name: ``OWNER/NAME``, or ``NAME`` for one of the user who is logged in.

    Returns:
        ``OWNER/NAME``.

    Raises:
        InvalidInputError: the hub refuses it, or cannot be reached.
    """
    with _refusals(name):
        return str(HfApi().create_repo(name, private=True, exist_ok=True).repo_id)


def upload(folder: Path, repository: str, *others: Path) -> None:
    """Upload the model, tokenizer and card of a directory, and print where they are then.

    Args:
        folder: the model's directory.
        repository: of :func:`make_repository`.
        others: files below ``folder`` that are uploaded too.

    Raises:
        InvalidInputError: the hub refuses it, or cannot be reached.
    """
    own = (path for path in folder.iterdir() if path.is_file())
    files = [path for path in own if path.suffix in _SUFFIXES or path.name in _NAMES]
    names = [path.relative_to(folder).as_posix() for path in (*files, *others)]
    with _refusals(repository):
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[escape(name) for name in names],
            commit_message="Upload model (softtrace)",
        )
    print(f"uploaded to https://huggingface.co/{repository}")


def _refusals(name: str) -> AbstractContextManager[None]:
    advice = (
        "; allowed is OWNER/NAME of a repository that you may write to: log in by `hf auth login`, "
        "or leave --push_to_hub out and upload the folder later by `hf upload`"
    )
    return refusals(InvalidInputError, f"push_to_hub: found {name!r}", advice)
