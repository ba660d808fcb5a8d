"""What every mode of ``softtrace study`` does alike: measure model after model, write results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from tqdm import tqdm

from softtrace.cli.study_models import check_alike, described
from softtrace.data.documents import Document
from softtrace.evaluation.bootstrap import CONFIDENCE
from softtrace.evaluation.measure import Progress
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.run_options import RunOptions
from softtrace.files import prepare_output, write_json, write_text
from softtrace.model.devices import device_of
from softtrace.model.loading import placed_model
from softtrace.report.study_plots import Draw, write_page
from softtrace.tracing.masking import AttentionKind

R = TypeVar("R")
Found = dict[str, Any]
"""The content of a result file."""


@dataclass(frozen=True)
class StudyTask:
    """Models, a text and how they are measured, all of it checked.

    Attributes:
        models: label to path.
        blocks: ``[N, T]`` ids of held-out text, by the first model's tokenizer.
        first: the first position of a block that is explained.
        training: documents of the other side of the split.
        tokenizers: of the models, in their order; the first one's where another reads alike.
        data: what result files say of the blocks.
        out, batch_size, resamples, seed, attention, run, device_map, max_memory: see ``softtrace
            study``.
        began: seconds on the clock when the command did.
    """

    models: Mapping[str, str]
    blocks: Tensor
    first: int
    training: Sequence[Document]
    tokenizers: Sequence[Any]
    data: Found
    out: str
    batch_size: int
    resamples: int
    seed: int
    attention: AttentionKind
    run: RunOptions
    device_map: str | None
    max_memory: Mapping[str, str] | None
    began: float

    @property
    def one_tokenizer(self) -> bool:
        """Whether all models read the same tokens."""
        return all(each is self.tokenizers[0] for each in self.tokenizers)

    def measure(
        self, read: Callable[[Any, Found, Progress], R], total: int, unit: str = "sequence"
    ) -> tuple[list[Found], list[R]]:
        """Load each model, call ``read`` with it, and let it go: one is in memory at a time.

        Args:
            read: given the model, what result files say of it, and what to call with the number of
                units that were measured.
            total: units that one model takes.
            unit: what they are.

        Returns:
            What result files say of each model, and what ``read`` returned.

        Raises:
            InvalidInputError: models of several number formats, or of one tokenizer that predict
                different numbers of tokens.
        """
        where = device_of(self.run.device)
        models: list[Found] = []
        found: list[R] = []
        for label, path in self.models.items():
            placed = placed_model(path, self.run.dtype, where, self.device_map, self.max_memory)
            with placed as network:
                models.append({"label": label, **described(network, path)})
                check_alike(models, self.one_tokenizer)
                with tqdm(total=total, desc=f"measuring {label}", unit=unit) as bar:
                    found.append(read(network, models[-1], bar.update))
            del network, placed  # the next one is loaded into the room that it had
        return models, found

    def settings(self) -> Found:
        """The settings that all modes have which let attention be chosen and give intervals."""
        return {
            "attention": self.attention,
            "resamples": self.resamples,
            "seed": self.seed,
            "confidence": CONFIDENCE,
        }

    def write(
        self,
        name: str,
        result: Found,
        table: Callable[[Found], str],
        draw: Draw | None = None,
    ) -> Found:
        """Write NAME.json, NAME.txt and, where it is drawn, NAME.png to OUT, and print the table.

        Args:
            name: of the files.
            result: content of the JSON file, to which is added how it was made.
            table: makes the text of it.
            draw: makes the page of plots of it; None for no NAME.png.

        Returns:
            All of the JSON file.
        """
        seconds = round(time.perf_counter() - self.began, 1)
        result = {**result, **provenance(device_of(self.run.device)), "seconds": seconds}
        folder = prepare_output(self.out, self.run.overwrite)
        text = table(result)
        write_json(folder / f"{name}.json", result)
        write_text(folder / f"{name}.txt", text)
        if draw is not None:
            write_page(draw, result, folder / f"{name}.png")
        files = [f"{name}.{kind}" for kind in ("json", "txt", *(["png"] if draw else []))]
        print(text)
        print(f"\nwritten to {folder}/: {', '.join(files[:-1])} and {files[-1]}")
        return result
