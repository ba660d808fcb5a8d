"""``attach(model)``: the proof that a model is the sum of its edges, and what it gives at once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from softtrace.anatomy.discovery import PlainRun, take_apart, tiny_batch
from softtrace.anatomy.refusals import refuse_early, refuse_engine, refuse_units, running
from softtrace.anatomy.tolerances import tolerance, typical_mismatch
from softtrace.anatomy.watch import running_layers
from softtrace.checks import check_choice
from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.graph.attention_maps import none_held
from softtrace.graph.batch import Batch, check_finite
from softtrace.graph.edges import EdgeImportance
from softtrace.graph.importance import Norm
from softtrace.model.alone import alone
from softtrace.model.devices import device_of_module
from softtrace.model.memory import attempt, half_that_fits
from softtrace.model.sharding import computing_dtype, let_go, note_units, run
from softtrace.model.state import as_written
from softtrace.model.wrappers import forward_parameters, own_forward, unwrapped
from softtrace.processes import in_group
from softtrace.tracing.instrument import Instrument, attached
from softtrace.tracing.later_hooks import hooked, hooks_of, without_hooks
from softtrace.tracing.proof import prove
from softtrace.tracing.runner import Runner
from softtrace.tracing.verification import Verification

logger = logging.getLogger(__name__)

_TINY = 6  # tokens of the batch that a model is proven on


def attach(model: nn.Module) -> Instrument:
    """Prove that ``model`` is the sum of its edges, and return the instrument that runs it.

    A tiny batch is run (no gradients, no change to the global random state) and every layer must
    satisfy ``out == in + Σ edges``, also with edges masked. Attaching twice returns the same
    instrument, unless modules of the model or their ``forward`` were replaced in between, or hooks
    were added that change its logits on such a batch: then it is proven anew. (Among several
    processes hooks are not looked at again.) What is proven holds for the weights at that time;
    where all output projections are still zero, a wrong reading can fit.

    Args:
        model: A causal language model of transformers, as ``AutoModelForCausalLM`` returns it.

    Raises:
        UnsupportedModelError: The layers are not the sum of the graph's edges; the message names
            the layer and the mismatch.
        NonFiniteError: Its logits are not finite, so that nothing can be proven.
    """
    inner = unwrapped(model)
    with alone(inner):
        return _attach(model, inner)


def _attach(outer: nn.Module, model: nn.Module) -> Instrument:
    note_units(outer)
    known, added = attached(model), set[int]()
    if known is not None:
        if in_group():  # leaf modules and tensor parallelism leave the modules as they were
            refuse_engine(model)
            return known  # a hook may be on one of the processes, which cannot run alone
        added = hooks_of(known.parts) - known.hooks
        if not added:
            return known
    refuse_early(model)
    device = device_of_module(model).type
    # Autocast rounds every product, which is no mismatch of the model's layout.
    exact = torch.autocast(device, enabled=False)
    with torch.no_grad(), exact, own_forward(model), as_written(model), ExitStack() as stack:
        stack.callback(let_go, outer)
        if known is None:
            return Instrument.of(*_proven(model))
        if _change_nothing(model, added):
            known.hooks.update(added)
            return known
        try:
            return Instrument.of(*_proven(model))
        except UnsupportedModelError as error:
            where = ", ".join(hooked(model, added))
            raise UnsupportedModelError(
                f"found hooks on {where} that were added since the model was attached and change "
                "what it computes, allowed are those with which it stays the sum of its edges; "
                f"remove them (handle.remove()). With them: {error}"
            ) from error


def attach_whatever_hooks(model: nn.Module) -> Instrument:
    """:func:`attach`, but for what hooks that were added since change.

    For decoding, which reads no edges, and proves of exits and caches what it needs with the hooks
    that are there.
    """
    known = None if in_group() else attached(unwrapped(model))
    return known or attach(model)


def _change_nothing(model: nn.Module, hooks: set[int]) -> bool:
    """Whether a model says the same with these hooks on its modules and without them.

    What hooks make of the whole model's output, which may be no logits in training, is no edge's.
    Nor is a hook judged that fails on a tiny batch: it fails, or not, where it is meant to run.
    """
    inputs = tiny_batch(model, _TINY).forward_inputs(forward_parameters(model))
    with without_hooks(model, {*model._forward_hooks}):
        with without_hooks(model, hooks):
            without = _plain(model, inputs)
        try:
            return torch.equal(_plain(model, inputs), without)
        except UnsupportedModelError:
            return True


def _proven(model: nn.Module) -> tuple[Runner, Verification]:
    """Take a model apart and prove that it was taken apart rightly."""
    configs = tuple({id(each): each for each in map(_config_of, model.modules()) if each}.values())
    parameters, batch = forward_parameters(model), tiny_batch(model, _TINY)
    inputs = batch.forward_inputs(parameters)
    plain, layers = running_layers(model, lambda: _plain(model, inputs))
    check_finite(plain, "logits of the model on a tiny batch, run to attach", batch.valid)
    allowed = tolerance(computing_dtype(model))
    anatomy = take_apart(PlainRun(model, inputs, plain, layers, configs, allowed))
    refuse_units(layers, (anatomy.readout.norm.module, anatomy.readout.head))
    # Late, since weights that round by the batch (8 bits) differ here too, and are refused as that.
    unpadded = _plain(model, Batch.of(batch.input_ids).forward_inputs(parameters))
    _refuse_unmasked(model, typical_mismatch(unpadded[0], plain[0]), 4 * allowed)
    runner = Runner(weakref.ref(model), anatomy, configs, parameters)
    try:
        return runner, prove(runner, batch, plain)
    except UnsupportedModelError:
        if not any(modules.score_projections for modules in anatomy.layers):
            raise
    # Keys that are values too, or shared between layers, cannot be left out of masked runs.
    narrower = tuple(replace(modules, score_projections=()) for modules in anatomy.layers)
    runner = replace(runner, anatomy=replace(anatomy, layers=narrower))
    return runner, prove(runner, batch, plain)


def _plain(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's own logits ``[B, T, V]`` on a tiny batch."""
    floats = {f"{each.dtype}" for each in model.parameters() if each.is_floating_point()}
    without = ""
    if len(floats) > 1:
        without = (
            f" without autocast (its weights are of {' and '.join(sorted(floats))}; give all one "
            "type, such as model.to(torch.float32), and let autocast round)"
        )
    with running(f"{type(model).__name__} does not run on a batch of token ids alone{without}"):
        logits = getattr(run(model, **inputs), "logits", None)
    shape = inputs["input_ids"].shape
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            f"{type(model).__name__} gives logits of shape {found} for token ids {tuple(shape)}; "
            "a causal language model gives [B, T, V], one row a token (no language-model head, or "
            "logits of the last token alone?)"
        )
    return logits


def _refuse_unmasked(model: nn.Module, error: float, allowed: float) -> None:
    """Refuse a model that is causal only where a row of its batch is padded.

    Where none is, transformers makes no mask, and the kernel masks by the ``is_causal`` of each
    attention module: False in PaliGemma, and in decoders that were turned into embedders.
    """
    if error > allowed:
        raise UnsupportedModelError(
            f"{type(model).__name__} reads a row otherwise where no row of its batch is padded (by "
            f"{error:.2g} of the largest logit, allowed {allowed:.0e}): without a mask its "
            "attention lets tokens see later ones; load it with attn_implementation='eager', which "
            "makes a mask always"
        )


def _config_of(module: nn.Module) -> PretrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PretrainedConfig) else None


def edge_importance(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    norm: Norm = "l1",
    positions: Tensor | Iterable[int] | None = None,
) -> EdgeImportance:
    """Importance of every edge of a batch.

    Differentiable in the model's weights (but for FSDP1's); wrap in ``torch.no_grad()`` to only
    measure. Where memory runs out no attention maps are held, as of long sequences. Where weights
    are sharded (FSDP) all processes call this, each with a batch of its own, or all with the same,
    and each gets what is of its own batch.

    Args:
        model: A causal language model; attached on the fly.
        input_ids: ``[B, T]`` integers.
        attention_mask: ``[B, T]`` of 0 and 1, padding on either side; None for no padding.
        position_ids: ``[B, T]`` of packed rows, starting anew with every document: no edge crosses
            from one document into another. None for one document a row.
        norm: How large an edge is: the ``"l1"`` norm of what it carries, as in arXiv 2605.27033,
            its ``"l2"`` norm, or ``"ifr"``, by how much it brings the rest of its node nearer to
            it (:mod:`softtrace.graph.proximity`), which takes H·T² vectors of d_model a layer.
        positions: What shall be explained: ``[B, T]`` bool, or integers, the same positions of
            every sequence, negative ones counted from its last real token. Tokens after the last of
            them are left out, T is then smaller, and logits of others are not made. None for all.

    Returns:
        Importances in [0, 1], shares of their node, as ``layers[l].attention`` [B,H,T,S],
        ``.attention_residual`` [B,T], ``.mlp`` [B,T], ``.mlp_residual`` [B,T]. Of long sequences
        nothing of H·T² is held: ``.attention`` is made anew, layer by layer, when it is asked for.

    Raises:
        UnsupportedModelError: See :func:`attach`.
        InvalidInputError: Ids lie outside the vocabulary, shapes are wrong, the norm is unknown, or
            memory does not suffice.
        NonFiniteError: The model's logits are not finite.
        SofttraceError: Where weights are sharded, another process failed.
    """
    check_choice("norm", norm, get_args(Norm))
    instrument = attach(model)

    def record(batch: Batch, chosen: Tensor | None = None) -> EdgeImportance:
        recording = instrument.record(
            batch, keep_attention=False, norm=norm, positions=chosen, keep_logits=False
        )
        return recording.importance

    with instrument.in_turns(norm):
        batch = instrument.batch(input_ids, attention_mask, position_ids)
        chosen = None
        if positions is not None:
            batch, chosen = batch.up_to(positions)
        found = attempt(lambda: record(batch, chosen))
        if found is not None:
            return found
        logger.warning("memory ran out; attention maps are now made when they are asked for")
        with none_held():
            found = attempt(lambda: record(batch, chosen))
            if found is None:
                _refuse_size(batch, record)
        return found


def _refuse_size(batch: Batch, record: Callable[[Batch], EdgeImportance]) -> NoReturn:
    """Refuse a batch for which memory does not suffice, after trying what does."""
    rows, length = batch.valid.shape
    real = batch.valid[0].nonzero()[:, 0]
    fits = "allowed is what fits"
    if few := half_that_fits(rows, 1, lambda n: record(batch.part(lambda values: values[:n]))):
        fits = f"{few} of them fit here"
    elif short := half_that_fits(
        len(real), 2, lambda n: record(batch.part(lambda values: values[:1, real[:n]]))
    ):
        fits = f"one of {short:,} tokens fits here"
    raise InvalidInputError(
        f"input_ids: memory ran out at {rows} sequence(s) of {length:,} tokens; {fits}. Take fewer "
        "or shorter sequences, a smaller dtype of the weights, or device_map='auto'"
    )
