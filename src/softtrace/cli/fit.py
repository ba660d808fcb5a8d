"""``softtrace fit``: Lightning's command line around the module, the data and the penalty."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from softtrace.anatomy.discovery import learned_positions, vocabulary_of
from softtrace.checks import check_least, check_range
from softtrace.cli.fit_options import DESCRIPTION, add_own_options, advice, as_list, tidy_help
from softtrace.cli.hub import make_repository, upload
from softtrace.cli.presets import fill_preset
from softtrace.data.blocks import evenly
from softtrace.data.split_record import read_records, write_records
from softtrace.decoding.recommend import recommend_exit
from softtrace.errors import CheckpointError, InvalidInputError, OutputExistsError, SofttraceError
from softtrace.evaluation.held_out import measured
from softtrace.files import atomic_path, check_output, claimed, sync
from softtrace.graph.batch import check_length
from softtrace.libraries import refusals
from softtrace.lightning.after_training import on_training_device
from softtrace.lightning.checkpoint_io import AtomicCheckpointIO
from softtrace.lightning.datamodule import PackedDataModule
from softtrace.lightning.failed_process import end_with_starter, ending_alone, undisturbed
from softtrace.lightning.folders import LastCheckpoint, check_resumes, newest, sweep
from softtrace.lightning.lora import merged
from softtrace.lightning.module import CausalLM
from softtrace.lightning.monitor import DensityMonitor
from softtrace.lightning.penalty import DensityPenalty
from softtrace.lightning.progress import progress_of
from softtrace.lightning.sharded import check_sharding, say_batch_size, whole_weights
from softtrace.lightning.sigterm import EndTogether
from softtrace.lightning.step_seed import StepSeed
from softtrace.model.exit_maps import save_exit_maps
from softtrace.model.loading import load_model, load_tokenizer
from softtrace.model.wrappers import unwrapped
from softtrace.report.model_card import write_density, write_settings

logger = logging.getLogger(__name__)

_EXIT_READ, _EXIT_TOKENS = 2048, 256  # tokens to judge exits by, half of them guessed; of a row
_MONITOR_BLOCKS = 16
_MEASURED = 64  # tokens of a block, as evaluate's: importances grow with the square


class _Failed(BaseException):
    """What the class that an option names raised: jsonargparse buries every ``Exception``."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _made(kind: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return kind(*args, **kwargs)
    except Exception as error:
        raise _Failed(error) from error


class FitCLI(LightningCLI):
    """LightningCLI with an output folder, the penalty, and runs that can be resumed."""

    config_init: Any
    monitor: DensityMonitor | None = None
    repository: str | None = None

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            CausalLM,
            PackedDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={
                "gradient_clip_val": 1.0,
                "log_every_n_steps": 10,
                "enable_model_summary": False,
            },
            parser_kwargs={
                "prog": "softtrace fit",
                "usage": "softtrace fit --model.path MODEL --data.path TEXT --out OUT [options]",
                "description": DESCRIPTION,
            },
            args=None if args is None else list(args),
            run=False,
            auto_configure_optimizers=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; without Lightning's warning that arguments were passed by a program."""
        tidy_help(parser, sys.argv[1:] if args is None else args)
        self.config = parser.parse_args(args)
        check_range("seed_everything", int(self.config["seed_everything"]), 0, 2**32 - 1)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The penalty's dials and the run's own."""
        parser.add_lightning_class_args(DensityPenalty, "penalty")
        add_own_options(parser)

    @property
    def out(self) -> Path:
        """Folder of this run."""
        return Path(self.config["out"])

    @property
    def last_checkpoint(self) -> Path:
        """Where the newest checkpoint of this run is, if there is one."""
        return self.out / "checkpoints" / "last.ckpt"

    def before_instantiate_classes(self) -> None:
        """Refuse what is wrong with options and output folder before a model is loaded."""
        with warnings.catch_warnings():  # as the names that Lightning itself uses for it
            warnings.simplefilter("ignore", DeprecationWarning)
            self.parser.add_instantiator(_made, object)
        for name in ("checkpoint_every", "monitor_every", "card_blocks"):
            check_least(name, self.config[name], 0)
        chosen = DensityPenalty(**self.config["penalty"].as_dict()).options
        said = fill_preset(self.config["penalty"], chosen)  # fit.yaml and the card say numbers
        PackedDataModule(**self.config["data"].as_dict())
        # The other processes of a distributed run start when the first has written to the folder.
        if getattr(rank_zero_only, "rank", 0):
            return
        if said:
            logger.warning(said)
        check_sharding(self.config["trainer"]["strategy"], lora=bool(self.config["model"]["lora"]))
        if self.config["resume"] and not self.out.is_dir():
            raise InvalidInputError(
                f"resume: found no folder {self.out} to resume from; leave --resume out to start"
            )
        with self._claimed():
            pass
        if name := self.config["push_to_hub"]:  # what the hub refuses shows before the training
            self.repository = make_repository(name)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """OUT as the folder of this run alone.

        Raises:
            OutputExistsError: another run writes to it, or it holds one that is not resumed, or a
                model that was trained and nothing to resume from.
        """
        with claimed(self.config["out"]):
            if not self.config["resume"]:
                check_output(self.out, False, "--resume true to resume from its last checkpoint")
            elif newest(self.last_checkpoint) is None and any(self.out.glob("model*.safetensors")):
                raise OutputExistsError(
                    f"{self.out}: holds a trained model and no checkpoint to resume from, so that "
                    "the model would be trained anew and written over; give another --out, or move "
                    "the model away"
                )
            yield

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; an error of a class that an option names stays its own."""
        failed = None
        try:
            super().instantiate_classes()
        except _Failed as found:
            failed = found.error
        if failed is not None:
            with self._refusals():
                raise failed

    def _refusals(self) -> AbstractContextManager[None]:
        """What a library refuses of the trainer that the options ask for, in one line."""
        usual = self.parser.get_defaults()["trainer"]
        return refusals(InvalidInputError, "trainer", advice(self.config["trainer"], usual))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that logs and saves to OUT, unless the options say otherwise."""
        options = self.config_init["trainer"]
        if options.get("logger") in (None, True):
            kwargs["logger"] = CSVLogger(self.out, name="logs")
        if options.get("default_root_dir") is None:
            kwargs["default_root_dir"] = str(self.out)
        if options.get("max_epochs") is None and options.get("max_steps", -1) == -1:
            kwargs["max_epochs"] = -1 if options.get("max_time") else 1
        callbacks = as_list(options.get("callbacks"))
        callbacks += progress_of(options, callbacks)
        # By now True has become the number that was chosen; False asks for no seeding at all.
        if (seed := self.config["seed_everything"]) is not False:
            callbacks.append(StepSeed(seed))
        callbacks.append(EndTogether())
        if every := self.config["monitor_every"]:
            self.monitor = DensityMonitor(every=every)
            callbacks.append(self.monitor)
            if options.get("val_check_interval") is None:
                # counted in batches, across epochs
                kwargs["val_check_interval"] = every * options.get("accumulate_grad_batches", 1)
                kwargs["check_val_every_n_epoch"] = None
        every, enabled = self.config["checkpoint_every"], options.get("enable_checkpointing")
        if every and enabled is not False and not options.get("fast_dev_run"):
            checkpoint = LastCheckpoint(
                self.last_checkpoint.parent,
                filename="last",
                every_n_train_steps=every,
                enable_version_counter=False,
            )
            callbacks.append(checkpoint)
        else:
            kwargs["enable_checkpointing"] = False
        kwargs["callbacks"] = callbacks
        plugins = as_list(options.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        with self._refusals():
            return super().instantiate_trainer(**kwargs)

    def fit(self) -> Path:
        """Train, save model and tokenizer to OUT, and return OUT."""
        with self._claimed() if self.trainer.is_global_zero else nullcontext():
            self._fit()
        return self.out

    def _fit(self) -> None:
        model = unwrapped(self.model.model)
        check_length(self.datamodule.block_size, learned_positions(model), "data.block_size")
        self.datamodule.tokenizer = self.datamodule.tokenizer or self.model.path
        # Text that cannot be read shows before anything is written to the folder.
        self.datamodule.setup("fit")
        self.datamodule.check_ids(vocabulary_of(model))
        if self.monitor is not None:
            held_out = self.datamodule.held_out_blocks
            if held_out is None:
                raise InvalidInputError(
                    "monitor_every: found no held-out blocks to measure (data.held_out_share is "
                    "0); hold some out, or leave monitor_every out"
                )
            self.monitor.blocks = evenly(held_out, _MONITOR_BLOCKS)[:, :_MEASURED]
        checkpoint = None
        if self.config["resume"]:
            self._sweep()
            if (found := newest(self.last_checkpoint)) is None:
                logger.warning("%s holds no checkpoint yet; starting anew", self.out)
            else:
                if self.trainer.is_global_zero:
                    check_resumes(found, self.trainer.strategy, self.trainer.world_size)
                checkpoint = str(found)
        if self.trainer.is_global_zero:
            self.out.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.out / "fit.yaml") as temporary:
                self.parser.save(self.config, temporary, overwrite=True)
        say_batch_size(self.trainer.strategy, self.datamodule.batch_size)
        self._train(checkpoint)
        if not self.config["trainer"]["fast_dev_run"]:
            with ending_alone(self.trainer):  # gathered from all processes
                weights = whole_weights(self.model.model, self.trainer.strategy)
            if self.trainer.is_global_zero:
                with undisturbed(self.trainer):
                    self._save(weights)
                if self.repository is not None:
                    upload(self.out, self.repository)

    def _sweep(self) -> None:
        """Remove what processes left behind that were killed while they wrote."""
        if self.trainer.is_global_zero:
            sweep(self.last_checkpoint)
            for half in self.out.glob(".model-*"):
                shutil.rmtree(half, ignore_errors=True)

    def _train(self, checkpoint: str | None) -> None:
        """Fit; a run that was stopped from outside ends as its signal says, not as a success."""
        try:
            with ending_alone(self.trainer):
                self.trainer.fit(
                    self.model, self.datamodule, ckpt_path=checkpoint, weights_only=True
                )
        except SIGTERMException:  # a SystemExit of Lightning's, with status 0
            logger.warning("terminated; --resume true resumes from the last checkpoint")
            raise SystemExit(128 + signal.SIGTERM) from None
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # what Lightning makes of one
                raise KeyboardInterrupt from None
            raise
        except BaseException:
            # Until the first batch Lightning sets up what the options ask for.
            asked = self.trainer.fit_loop.total_batch_idx < 0
            with self._refusals() if asked else nullcontext():
                raise

    def _save(self, weights: dict[str, Tensor] | None) -> None:
        """Model and tokenizer as safetensors and JSON; the weights appear last, all at once.

        Adapters are added into the weights, so that what OUT holds is a model like any other. Of a
        model that is sharded the whole ``weights`` are given.

        Raises:
            CheckpointError: they could not be written, as on a full disk.
        """
        fresh = self.out / f".model-{os.getpid()}"
        model = merged(self.model.model) if weights is None else self.model.again(weights)
        try:
            model.save_pretrained(fresh)
            save_exit_maps(model, fresh)
            load_tokenizer(self.datamodule.tokenizer).save_pretrained(fresh)
            write_records(fresh, [*read_records(self.model.path), self.datamodule.split])
            readable = (fresh / "config.json").stat().st_mode  # safetensors: for the owner alone
            for file in sorted(fresh.iterdir(), key=lambda file: file.suffix == ".safetensors"):
                file.chmod(readable)
                sync(file)
                os.replace(file, self.out / file.name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.out}: the model could not be written ({type(error).__name__}: {error}). "
                "Make room; --resume true resumes from the last checkpoint"
            ) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        try:  # minutes on a CPU, in which the weights are safe
            self._recommend_exit(model)
            self._write_card(model)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the trained model is in {self.out}") from None

    def _write_card(self, model: PreTrainedModel) -> None:
        """Say in README.md how the model was made, and how dense it was and is."""
        try:
            options = yaml.safe_load((self.out / "fit.yaml").read_text(encoding="utf-8"))
            write_settings(self.out, options)
            held_out, wanted = self.datamodule.held_out_blocks, self.config["card_blocks"]
            if held_out is None or not wanted:
                return
            blocks = evenly(held_out, wanted)[:, :_MEASURED]
            split = f"held out, share {self.datamodule.held_out_share:g}"
            logger.info("measuring densities for the model card on %d held-out blocks", len(blocks))
            with on_training_device(model, self.model, self.trainer.strategy):
                own = measured(model, blocks, split)
            base = load_model(self.model.path, dtype=self.config["model"]["dtype"])
            with on_training_device(base, self.model, self.trainer.strategy):
                write_density(self.out, own, measured(base, blocks, split))
        # The weights are safe already. A MemoryError says nothing but its name.
        except (SofttraceError, RuntimeError, OSError, ValueError, MemoryError) as reason:
            kind = type(reason).__name__
            logger.warning("the model card lacks what could not be measured: %s: %s", kind, reason)

    def _recommend_exit(self, model: PreTrainedModel) -> None:
        """Write into OUT's config.json which early exit should decode the model fastest."""
        held_out = self.datamodule.held_out_blocks
        blocks = self.datamodule.train_blocks if held_out is None else held_out
        if blocks is None:
            return
        try:
            rows = blocks[:, :_EXIT_TOKENS]
            read = evenly(rows, max(1, _EXIT_READ // rows.shape[1]))
            logger.info(
                "looking for the early exit that decodes fastest, on %d x %d tokens", *read.shape
            )
            with on_training_device(model, self.model, self.trainer.strategy):
                recommend_exit(model, read)
            with atomic_path(self.out / "config.json") as temporary:
                model.config.to_json_file(temporary)
        except Exception as reason:  # whatever it is, the model is of use without
            logger.info("no early exit is recommended: %s", reason)


def fit(args: Sequence[str] | None = None) -> Path:
    """Run ``softtrace fit`` with command-line arguments and return the output folder.

    Args:
        args: as on the command line; None takes the process's own.

    Raises:
        SofttraceError: bad input, named.
        SystemExit: arguments that do not parse, or ``--help``.
    """
    advert = logging.Filter()
    advert.filter = lambda record: "litlogger" not in record.getMessage()  # type: ignore[method-assign]
    lightning_logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning_logger.addFilter(advert)
    end_with_starter()
    try:
        with warnings.catch_warnings():
            # lightning 2.6.6 asks torch 2.13 for a name that it is about to lose, at every fit
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            # resuming means that there are checkpoints; DeepSpeed clips by the trainer's own option
            for said in ("Checkpoint directory .* is not empty", "Since DeepSpeed handles"):
                warnings.filterwarnings("ignore", message=said)
            return FitCLI(args).fit()
    finally:
        lightning_logger.removeFilter(advert)
