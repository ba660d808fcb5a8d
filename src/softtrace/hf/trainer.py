"""The integration into transformers' ``Trainer`` and its subclasses: ``with_density(Trainer)``.

A Trainer divides its loss by what all accumulated batches of all processes hold together, where the
model takes ``num_items_in_batch``, and by the number of accumulated batches where not; only in the
first case is what ``compute_loss`` returns not divided again. The term is a mean over its own
windows, so it is divided by the number of accumulated batches in both (transformers #48690), and
the processes' gradients are averaged as those of the task are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils.operations import gather_object
from torch import Tensor, nn
from transformers import Trainer

from softtrace.errors import TrainerSetupError
from softtrace.hf.checkpoints import newest_checkpoint, save_maps
from softtrace.hf.density_state import DensityState, check_evaluates
from softtrace.loss.budget import LossBudget
from softtrace.loss.density_loss import DensityLoss
from softtrace.loss.inputs import batch_inputs
from softtrace.loss.integration import ExpectedGradient, TermLog, check_state
from softtrace.loss.options import DensityOptions
from softtrace.loss.reference import EVAL_LOSS
from softtrace.loss.term import DensityTerm
from softtrace.model.engines import Engine, engine, supported
from softtrace.model.exit_maps import load_exit_maps, read_exit_maps
from softtrace.model.wrappers import find_causal_lm

# Stands for the Trainer that the mixin is put before, whose attributes mypy then lets pass.
_Trainer: Any = object


class DensityMixin(_Trainer):  # type: ignore[misc]
    """Adds the density term to the loss of a Trainer; to be named before it among the bases.

    ``class MyTrainer(DensityMixin, SFTTrainer)``, or :func:`with_density`. What is logged has the
    names of :class:`softtrace.lightning.DensityPenalty`, as means since the last log: ``loss/task``
    and ``loss/density`` add up to the Trainer's own ``loss``. With a ``budget`` the strength
    follows what the Trainer's own evaluation gives as ``monitor`` (``eval_loss``).

    Tokens count where the batch has labels for them. A batch without labels may hold a
    ``completion_mask`` (TRL's DPO and KTO: answers count, chosen and rejected alike) or prompts
    and completions apart (GRPO, RLOO, distillation: completions count); otherwise all tokens do.

    Args:
        *args: Arguments of the Trainer.
        density: The term's options, or a mapping of some of them; None for the defaults.
        allow_untested: Run also where weights or sequences are sharded in ways that were never
            tested (tensor, context or sequence parallelism).
        **kwargs: Arguments of the Trainer.

    Raises:
        InvalidInputError: An option is outside its range.
        TrainerSetupError: Before the first step: tensor, context or sequence parallelism, FSDP1
            without ``use_orig_params``. At it: no or several causal language models, several GPUs
            in one process (``DataParallel``), a checkpoint of another seed, a
            ``compute_loss`` of a subclass that leaves the term out or drops it, a
            ``training_step`` that computes its loss without one, a budget without evaluation. At an
            evaluation: it gave no ``monitor``.
        UnsupportedModelError: At the first step; see :func:`softtrace.attach`.
    """

    def __init__(
        self,
        *args: Any,
        density: DensityOptions | Mapping[str, Any] | None = None,
        allow_untested: bool = False,
        **kwargs: Any,
    ) -> None:
        self.density_options = DensityOptions.of(density)
        self.allow_untested = allow_untested
        self._density: DensityLoss | None = None
        self._resumed_from: str | bool | None = None
        self._begun = True
        self._place = (-1, 0)  # global step, and which of its accumulated batches comes next
        self._logged = 0
        self._sums: dict[str, Tensor] = {}  # of each name two numbers: a sum, and of how many
        self._term_log = TermLog(self.density_options)
        self._computed = False  # whether compute_loss of this class ran in the current step
        self._expected: ExpectedGradient | None = None
        super().__init__(*args, **kwargs)
        self.remove_callback(DensityState)  # a user's: transformers keeps two as a list
        self.add_callback(DensityState(self.density_options.seed))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's training; the term begins with its first step.

        ``True`` resumes from the newest checkpoint that is whole; the Trainer, which writes into a
        folder file by file, takes the newest. Where there is none the Trainer says so itself.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir) or True
        self._resumed_from = resume_from_checkpoint
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            if self._density is not None:
                self._density.finish()
            return output
        finally:
            self._forget()
            self._begun = True

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.density_options.strength > 0:
            check_sharding(self, self.allow_untested)  # before anything is sharded or loaded
        # Once a try: with auto_find_batch_size one train() runs several.
        self._forget()
        self._begun = False
        return super()._inner_training_loop(*args, **kwargs)

    def _forget(self) -> None:
        self._density = None
        self._sums.clear()
        self._term_log = TermLog(self.density_options)
        for state in self._states():
            state.log = state.budget = None

    def inputs_of(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the loss reads of a batch; override for batches of other shapes.

        Raises:
            InvalidInputError: There are no ``input_ids`` among the inputs.
        """
        return batch_inputs(inputs, who=None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss, and in training the term."""

        def own() -> Any:
            return super(DensityMixin, self).compute_loss(
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )

        if not model.training:
            return own()
        self._computed = True
        if not self._begun:
            self._begin()
        if self._density is None:
            return own()
        step = self.state.global_step
        micro_step = self._place[1] if self._place[0] == step else 0
        self._place = (step, micro_step + 1)
        read = self.inputs_of(inputs)  # before the Trainer takes the labels out
        types = inputs.get("token_type_ids") if isinstance(inputs, Mapping) else None
        with self._density.watching(model, step, {**read, "token_type_ids": types}) as watched:
            found = own()
        with self.accelerator.autocast():  # the model's forward has it inside, heads of ours not
            term = self._density(**read, step=step, micro_step=micro_step, watched=watched)
        if term.loss.requires_grad:
            self._expected = ExpectedGradient(term.loss)
        batches = self.current_gradient_accumulation_steps
        self._note(term, batches)
        added = term.loss / (batches if self._is_scaled(num_items_in_batch) else 1)
        if return_outputs:
            loss, outputs = found
            return loss + added.to(loss.device), outputs
        return found + added.to(found.device)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's step, and the proof that the term was part of what it differentiated.

        Raises:
            TrainerSetupError: A subclass's ``compute_loss`` leaves this one out, or drops the term;
                a subclass's ``training_step`` calls none.
        """
        self._computed, self._expected = False, None
        found = super().training_step(*args, **kwargs)
        if self.density_options.strength > 0 and not self._computed:
            raise TrainerSetupError(f"{type(self).__name__}.{self._left_out_by()}")
        if self._expected is not None and not self._expected.arrived:
            raise TrainerSetupError(
                f"{type(self).__name__}: the density term was computed but no gradient reached it; "
                "something after compute_loss dropped or replaced the loss it returned; train on it"
            )
        return found

    def _left_out_by(self) -> str:
        """Which method of a subclass went past this class's ``compute_loss``, and the way out."""
        if type(self).compute_loss is DensityMixin.compute_loss:  # nothing stands before it
            return (
                "training_step computes its loss without compute_loss, where the density term is "
                "added (TRL's OnlineDPOTrainer does so). Add softtrace.DensityLoss to that loss "
                "in a training_step of your own, or set strength=0"
            )
        return (
            "compute_loss does not call super().compute_loss, so the density term is not computed. "
            "Call it there, or name DensityMixin before the class that has a loss of its own: "
            "class Mine(DensityMixin, Own)"
        )

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer leaves the loss undivided: its own question, asked once more."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(counted or self.compute_loss_func is not None)

    def _note(self, term: DensityTerm, batches: int) -> None:
        values = self._term_log.of(term)
        values["loss/density"] = values["loss/density"] / batches
        for name, value in values.items():
            known = torch.isfinite(value).float()
            added = torch.stack((value.float().nan_to_num(), torch.ones_like(known)))
            self._sums[name] = self._sums.get(name, 0) + added * known

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log, and what the term was since the last one, over all processes."""
        if "loss" in logs and self._sums:
            steps = self.state.global_step - self._logged
            self._logged = self.state.global_step
            names = list(self._sums)
            own = torch.stack([self._sums[name] for name in names])[None]
            self._sums.clear()
            # Means of each process, and their mean, as the Trainer takes it of its own loss.
            total, count = self.accelerator.gather(own).unbind(-1)
            means = dict(zip(names, (total / count).nanmean(0).tolist(), strict=True))
            means["loss/density"] = float(total[:, names.index("loss/density")].mean()) / max(
                1, steps
            )
            logs |= {"loss/task": logs["loss"] - means["loss/density"], **means}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the maps of exits beside the weights; what they learn on from too."""
        super().save_model(output_dir, *args, **kwargs)
        folder = self.args.output_dir if output_dir is None else output_dir
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)  # which sharded weights come into later
            learned = None if self._density is None else self._density.exit_maps
            save_maps(self.model, learned, folder)

    def _load_best_model(self) -> None:
        """The Trainer's, with the maps that were learned until then."""
        super()._load_best_model()
        if self.density_options.exit_map:
            load_exit_maps(self.model, self.state.best_model_checkpoint)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's checkpoint, with what is logged next."""
        log = self._log_state()
        for state in self._states():
            state.log = log
        return super()._save_checkpoint(*args, **kwargs)

    def _log_state(self) -> list[dict[str, Any]] | None:
        """What the last masked run gave, and what was added up since the last log, by process.

        None where nothing was. The added loss is left out: the Trainer forgets the sum of its own
        loss, and what is logged of both has to add up.
        """
        measured = self._term_log.measured
        if not measured:
            return None
        own = {
            "measured": {name: float(value) for name, value in measured.items()},
            "sums": {
                name: value.tolist() for name, value in self._sums.items() if name != "loss/density"
            },
        }
        # A checkpoint that a signal asked for does not wait for other processes.
        found: list[dict[str, Any]] = gather_object([own]) if self.control.should_save else [own]
        return found

    def _states(self) -> list[DensityState]:
        """The callbacks that write into checkpoints; one, unless a user added more."""
        callbacks = self.callback_handler.callbacks
        return [each for each in callbacks if isinstance(each, DensityState)]

    def _continue_log(self, log: list[dict[str, Any]]) -> None:
        """Log on from what :meth:`_log_state` gave."""
        rank, device = self.args.process_index, self.args.device
        own = log[rank if rank < len(log) else 0]
        measured = {name: torch.tensor(value) for name, value in own["measured"].items()}
        self._term_log.load({"added": [], "measured": measured}, device)
        self._sums = {
            name: torch.tensor(value, device=device) for name, value in own["sums"].items()
        }

    def _begin(self) -> None:
        """Attach to the model that is trained, before anything of it is compiled."""
        self._begun, self._place, self._logged = True, (-1, 0), self.state.global_step
        options = self.density_options
        # Of a checkpoint that was made without the term there is none, and saving would miss it.
        kept = self.state.stateful_callbacks.setdefault(
            DensityState.__name__, DensityState(options.seed).state()
        )["attributes"]
        for state in self._states():
            state.budget = None  # what transformers restores of a checkpoint's
        found = "a density {name} of {value}"
        check_state(kept, options.seed, found=found, resumed="a run")
        if options.strength == 0:
            return
        if self.args.n_gpu > 1:
            raise TrainerSetupError(
                f"found {self.args.n_gpu} GPUs in one process (DataParallel), allowed is one; "
                "start one process a GPU with torchrun or accelerate launch"
            )
        check_sharding(self, self.allow_untested)
        model = find_causal_lm(
            self.model, type(self).__name__,
            "The term compares predictions of next tokens, which classifiers and reward models do "
            "not make; train them without it",
        )  # fmt: skip
        self._density = DensityLoss(model, options)
        learned, folder = self._density.exit_maps, self._resumed_from
        if learned and isinstance(folder, str) and (maps := read_exit_maps(folder)):
            learned.load(maps)
        if (budget := self._density.budget) is not None:
            self._follow(budget, kept.get("budget"))
        if kept.get("log"):
            self._continue_log(kept["log"])

    def _follow(self, budget: LossBudget, kept: Mapping[str, Any] | None) -> None:
        """Let the strength follow the evaluations from now on."""
        monitor = self.density_options.monitor or EVAL_LOSS
        check_evaluates(self, monitor)
        if kept is not None:
            budget.load(kept)
        self._term_log = TermLog(self.density_options, budget=budget)
        for state in self._states():
            state.budget, state.monitor = budget, monitor


def with_density(trainer: type[Trainer] = Trainer) -> type[Any]:
    """A Trainer class with the density term.

    Args:
        trainer: ``Trainer`` or a class made of it (``SFTTrainer``).

    Returns:
        The class; its constructor takes ``density`` besides what it took, see
        :class:`DensityMixin`. One that has the term already is returned as it is.

    Raises:
        TrainerSetupError: A trainer itself, or something else that is no class.
    """
    if not isinstance(trainer, type):
        name = type(trainer).__name__
        raise TrainerSetupError(f"found {name}, expected a class: with_density(Trainer)(model=...)")
    if issubclass(trainer, DensityMixin):
        return trainer
    return type(f"Density{trainer.__name__}", (DensityMixin, trainer), {})


def check_sharding(trainer: Any, allow_untested: bool = False) -> None:
    """Refuse a training by transformers' Trainer whose weights or sequences are sharded.

    Args:
        trainer: of transformers.
        allow_untested: let it pass.

    Raises:
        TrainerSetupError: what shards them, what is supported, and the way past.
    """
    found = _sharding(trainer)
    if found is None or allow_untested:
        return
    raise TrainerSetupError(
        f"found {found.name} ({found.refused}); supported are {supported()}. allow_untested=True "
        "runs it all the same"
    )


def _sharding(trainer: Any) -> Engine | None:
    if trainer.is_fsdp_enabled:
        plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        whole = getattr(plugin, "use_orig_params", False)
        if getattr(plugin, "fsdp_version", 1) != 2 and not whole:
            return engine("FSDP1 without use_orig_params")
    layout = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        if getattr(layout, f"{name}_size", 1) > 1:
            return engine(name.upper())
    return None
