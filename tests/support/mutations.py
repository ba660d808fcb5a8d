"""Guards taken out of the source one at a time, and the tests that have to notice.

``python -m recipes.benchmarks.correctness.exactness --parts mutations`` runs them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """One guard.

    Attributes:
        name: what is done to it.
        file: below ``src/softtrace``.
        changes: texts, each there exactly once, and what replaces them.
        test: that has to turn red, as pytest names it.
    """

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    test: str


_ACROSS = "tests/lightning/test_penalty_runs.py::test_processes_equal_the_loop_by_hand"
_HF_ACROSS = "tests/hf/test_trainer_processes.py::test_two_processes_equal_the_loop_by_hand"
_RESUMED = (
    "tests/lightning/test_penalty_runs.py::test_resumed_fit_ends_as_the_straight_one_bit_by_bit"
)
_CUT = (
    "tests/faults/test_faults.py::test_a_run_that_was_cut_resumes_to_the_same_weights"
    "[kill in write--9-]"
)

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "functools.wraps dropped", "lightning/wrapped_step.py",
        (
            ("        @functools.wraps(step)\n", ""),
            ('        training_step.__wrapped__ = getattr(step, "__wrapped__", step)\n', ""),
        ),
        "tests/lightning/test_penalty.py::"
        "test_training_step_may_be_declared_in_every_way_that_lightning_takes",
    ),
    Mutation(
        "the term detached (Lightning)", "lightning/wrapped_step.py",
        (("loss = task + term.loss\n", "loss = task + term.loss.detach()\n"),),
        "tests/lightning/test_penalty.py::test_equals_the_plain_loop_bit_by_bit",
    ),
    Mutation(
        "the term detached (Trainer)", "hf/trainer.py",
        (("added = term.loss / (", "added = term.loss.detach() / ("),),
        "tests/hf/test_trainer.py::test_equals_the_loop_by_hand",
    ),
    Mutation(
        "the mask left unregistered", "model/attention_interface.py",
        (("AttentionMaskInterface.register(IMPLEMENTATION, _visible_mask)\n", ""),),
        "tests/model/test_attention_interception.py::test_models_of_transformers_interface_are_reached_through_it",
    ),
    Mutation(
        "scaled by the world size (Lightning)", "lightning/wrapped_step.py",
        (("loss = task + term.loss\n", "loss = task + term.loss * self._trainer.world_size\n"),),
        _ACROSS,
    ),
    Mutation(
        "scaled by the world size (Trainer)", "hf/trainer.py",
        (("added = term.loss / (", "added = trainer.args.world_size * term.loss / ("),),
        _HF_ACROSS,
    ),
    Mutation(
        "not divided by the accumulated batches (Trainer)", "hf/trainer.py",
        (("(batches if self._is_scaled(num_items_in_batch) else 1)", "1"),),
        "tests/hf/test_trainer.py::test_equals_the_loop_by_hand",
    ),
    Mutation(
        "every process with the draws of the first", "loss/draws.py",
        (("torch.distributed.get_rank() if in_group()", "0 if in_group()"),),
        _ACROSS,
    ),
    Mutation(
        "draws by calls instead of steps", "lightning/wrapped_step.py",
        (("step=at, micro_step", "micro_step"),),
        _RESUMED,
    ),
    Mutation(
        "what is logged keeps its graph", "loss/integration.py",
        (("self._added.append(term.loss.detach())", "self._added.append(term.loss)"),),
        "tests/lightning/test_penalty.py::test_nothing_of_a_step_outlives_it",
    ),
    Mutation(
        "the training step is not put back", "lightning/wrapped_step.py",
        (('vars(self._module).pop("training_step", None)', "pass"),),
        "tests/lightning/test_penalty_faults.py::test_nothing_is_left_behind",
    ),
    Mutation(
        "checkpoints written in place", "lightning/checkpoint_io.py",
        (
            (
                'with atomic_path(path) as temporary, temporary.open("wb") as file:',
                'with Path(path).open("wb") as file:',
            ),
        ),
        _CUT,
    ),
    Mutation(
        "checksums not looked at", "lightning/checkpoint_io.py",
        (("if (changed := archive.testzip()) is not None:", "if changed := None:"),),
        "tests/lightning/test_checkpoint_io.py",
    ),
    Mutation(
        "proven under Accelerate's autocast", "tracing/attach.py",
        (("exact, own_forward(model), as_written", "exact, as_written"),),
        "tests/hf/test_trainer_places.py::test_mixed_precision_trains",
    ),
    Mutation(
        "reentrant checkpointing let through", "loss/density_loss.py",
        (("if model.training and is_reentrant(modules):", "if False:"),),
        "tests/lightning/test_support.py::test_refused_modules_say_why",
    ),
    Mutation(
        "exits at the steps of masked runs", "loss/schedule.py",
        (("% self.every == self.offset", "% self.every == 0"),),
        "tests/loss/test_early_exits.py::"
        "test_exits_come_at_their_own_steps_between_masked_runs_and_weigh_as_much",
    ),
    Mutation(
        "what is not finite in a replay is added", "loss/cuda_graphs.py",
        (("torch.where(finite, gradient, zero, out=into)", "gradient"),),
        "tests/loss/test_captured.py::"
        "test_what_is_not_finite_gives_a_term_and_gradients_of_zero",
    ),
    Mutation(
        "a memory in which a capture failed is used again", "loss/graph_memory.py",
        (("            self._known.pop(device, None)", "            pass"),),
        "tests/loss/test_graph_memory.py::test_a_memory_in_which_a_capture_failed_is_left",
    ),
    Mutation(
        "gradients lie in the memory of all graphs", "loss/graph_memory.py",
        (("_write(run(found), found)", "found = run()"),),
        "tests/loss/test_graph_memory.py::"
        "test_what_a_function_gives_lies_outside_of_what_it_gave",
    ),
    Mutation(
        "a replay writes over one whose gradients are awaited", "loss/cuda_graphs.py",
        (("known is None or known.awaited else known", "known is None else known"),),
        "tests/loss/test_cuda_graphs.py::test_a_key_is_captured_once_it_comes_back",
    ),
    Mutation(
        "a graph does not see that a weight was replaced", "loss/cuda_graphs.py",
        (("(id(each), each.data_ptr(),", "(each.data_ptr(),"),),
        "tests/loss/test_captured.py::"
        "test_a_graph_is_of_its_shapes_its_weights_and_what_they_do",
    ),
    Mutation(
        "gradients of one map reach all", "loss/learned_maps.py",
        (("dict(known)", "dict.fromkeys(self.maps.weights, next(iter(known.values())))"),),
        "tests/loss/test_learned_maps.py::"
        "test_gradients_that_are_there_already_reach_their_own_map_alone",
    ),
    Mutation(
        "what torch.autograd.grad gave is written over", "loss/cuda_graphs.py",
        (("bool(torch._C._will_engine", "True or bool(torch._C._will_engine"),),
        "tests/loss/test_cuda_graphs.py::"
        "test_gradients_are_added_without_a_copy_and_given_as_one",
    ),
    Mutation(
        "every chunk of predictions weighs the same", "density/chunks.py",
        (("gradient * by.to(gradient.dtype)[:, None]", "gradient * by.to(gradient.dtype)[0]"),),
        "tests/density/test_chunks.py::"
        "test_chunks_give_distances_and_gradients_of_all_at_once",
    ),
)  # fmt: skip


def mutated(source: str, mutation: Mutation) -> str:
    """A file's text without the guard.

    Raises:
        ValueError: the text to be changed is not there exactly once.
    """
    for old, new in mutation.changes:
        if source.count(old) != 1:
            raise ValueError(f"{mutation.name}: found {source.count(old)} times {old!r}")
        source = source.replace(old, new)
    return source


def run_tests(mutation: Mutation | None, test: str, seconds: float = 400) -> tuple[int, str]:
    """Exit status and output of a test against the mutated source; None leaves the source whole."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "src")
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg*"))
        if mutation is not None:
            file = copy / "softtrace" / mutation.file
            file.write_text(mutated(file.read_text("utf-8"), mutation), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-p", "no:cacheprovider", test],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True,
            timeout=seconds,
        )  # fmt: skip
    return done.returncode, done.stdout
