"""The attach-time proof: on a tiny batch, every node is the sum of its edges, kept or masked.

A model works because this holds, not because its name is on a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

from softtrace.anatomy.anatomy import Anatomy
from softtrace.anatomy.refusals import running
from softtrace.anatomy.tolerances import ROUNDINGS, mismatch, rounding, tolerance, typical_mismatch
from softtrace.errors import UnsupportedModelError
from softtrace.graph.attention_maps import AttentionMap
from softtrace.graph.batch import Batch
from softtrace.graph.edges import LayerEdges
from softtrace.graph.importance import working_dtype
from softtrace.model.devices import run_by_itself
from softtrace.model.hooks import Hook, first_tensor, on_input, on_output, registered
from softtrace.model.sharding import computing_dtype
from softtrace.tracing.independence import check_independence
from softtrace.tracing.masking import MaskedRun
from softtrace.tracing.recording import RecordingRun
from softtrace.tracing.run import Run
from softtrace.tracing.runner import Runner
from softtrace.tracing.verification import Checks, Verification

#: norms of transformers compute in float32 even in a float64 model
_NORMS = 1e-6


class _Witness(MaskedRun):
    """A masked run that rebuilds every node from its edges and compares."""

    own_sums = True  # they are what is compared

    def __init__(
        self,
        anatomy: Anatomy,
        batch: Batch,
        masks: Sequence[LayerEdges],
        checks: Checks,
        attention: Sequence[Tensor | AttentionMap] | None = None,
    ) -> None:
        super().__init__(anatomy, batch, masks, attention, keep_hidden=True)
        self.checks = checks
        self.mlp_runs: list[tuple[int, nn.Module, Tensor, Tensor]] = []
        self.last_output: Tensor | None = None
        self._mixed: tuple[Tensor, Tensor] | None = None
        self._expected: Tensor | None = None
        self._size: Tensor | None = None
        self._parts: list[Tensor] = []

    @override
    def listeners(self) -> list[Hook]:
        hooks = super().listeners()
        for index, modules in enumerate(self.anatomy.layers):
            projected = on_output(partial(self._projected, index))
            hooks.append(Hook(modules.projection, projected, False, first=True))
            for module in modules.token_wise:
                hooks.append(Hook(module, on_output(partial(self._mlp_ran, index, module)), False))
        return hooks

    @property
    def _layer(self) -> int:
        return len(self.hidden or ()) - 1

    @override
    def _enter(self, hidden: Tensor) -> Tensor | None:
        super()._enter(hidden)
        if self.last_output is not None:
            self._compare("entering it", hidden, self.last_output)
        return None

    @override
    def on_attention(
        self, module: nn.Module, probabilities: AttentionMap, value: Tensor, visible: Tensor
    ) -> AttentionMap:
        probabilities = super().on_attention(module, probabilities, value, visible)
        self._mixed = (probabilities.whole(), value)
        return probabilities

    def _projected(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        """The projection's output is the sum of what the edges carry, and a constant."""
        if self._mixed is None:
            raise UnsupportedModelError(f"layer {layer}: its attention was not seen")
        probabilities, value = self._mixed
        self._mixed = None
        weight = self.anatomy.output_weight(layer).to(value.dtype)
        value = value.repeat_interleave(weight.shape[0] // value.shape[1], dim=1)
        carried = probabilities.to(value.dtype)[..., None] * (value @ weight)[:, :, None]
        edges = carried.sum((1, 3))  # [B, H, T, S, d] exists here alone, at a few tokens
        bias = self.anatomy.output_bias(layer)
        expected = edges if bias is None else edges + bias.to(edges.dtype)
        self._compare("attention's output", output.reshape(expected.shape), expected)
        return output

    @override
    def after_attention(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        modules = self.anatomy.layers[layer]
        if modules.attention_norm is not None:
            norm = modules.attention_norm
            rebuilt = norm.scale(read, output) * norm.linear(read.to(working_dtype(read.dtype)))
            bias = norm.bias()
            rebuilt = rebuilt.to(output) + (0 if bias is None else bias)
            self._compare("the norm after attention", output, rebuilt)
        mask = self.masks[layer].attention_residual[..., None].to(output)
        added = modules.attention_scale * output
        self._expected = mask * self.entry + added
        self._size = self.entry.abs() + added.abs()
        return super().after_attention(layer, read, output)

    @override
    def _reach_middle(self, hidden: Tensor) -> Tensor | None:
        if self._expected is None or self._size is None:
            raise UnsupportedModelError(f"layer {self._layer}: attention did not run before MLP")
        found = hidden.reshape(self.entry.shape)
        self._compare_sum("after attention", found, self._expected, self._size)
        return super()._reach_middle(hidden)

    def _mlp_ran(self, layer: int, module: nn.Module, read: Tensor, output: Tensor) -> Tensor:
        self.mlp_runs.append((layer, module, read, output.clone()))  # Falcon writes into it
        return output

    @override
    def after_mlp(self, layer: int, part: int, output: Tensor) -> Tensor:
        self._parts.append(output)
        return super().after_mlp(layer, part, output)

    @override
    def _leave(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        modules, masks = self.anatomy.layers[layer], self.masks[layer]
        size = self._size  # of entry and attention: the model's own middle has their rounding
        if len(self._parts) < len(modules.mlp_out) or size is None or self._expected is None:
            raise UnsupportedModelError(f"layer {layer}: its MLP did not run inside it")
        mlp = masks.mlp[..., None].to(output) * sum(self._parts[1:], self._parts[0])
        if modules.parallel:
            node = self._expected
        else:
            node = masks.mlp_residual[..., None].to(output) * self.middle
        added = modules.mlp_scale * mlp
        self._expected, self._size, self._parts = None, None, []
        self._compare_sum("after the MLP", output, node + added, size + added.abs())
        self.last_output = super()._leave(layer, read, output)
        return self.last_output

    def finish(self) -> Tensor:
        """Every layer ran once and the final norm read the last one; return what it read."""
        layers, hidden = len(self.anatomy.layers), self.hidden or []
        if len(hidden) != layers + 1 or self.last_output is None:
            raise UnsupportedModelError(
                f"{layers} layers and the final norm were entered {len(hidden)} times in one run; "
                "each has to run exactly once"
            )
        self._compare("read by the final norm", hidden[-1], self.last_output)
        return hidden[-1]

    def _compare(self, where: str, found: Tensor, expected: Tensor) -> None:
        allowed = max(tolerance(found.dtype), _NORMS)
        found, expected = (each.to(self.valid.device)[self.valid] for each in (found, expected))
        error = mismatch(found, expected)
        self._require(where, error, allowed, "of the largest value")

    def _compare_sum(self, where: str, found: Tensor, expected: Tensor, size: Tensor) -> None:
        """Elementwise: cancelled residuals leave rounding at the scale of what was cancelled."""
        valid = self.valid.to(found.device)
        one, other, size = (each[valid] for each in (found, expected, size))
        eps = torch.finfo(found.dtype).eps
        error = rounding(one, other, size) * eps
        self._require(where, error, ROUNDINGS * eps, "of the terms of its sum")

    def _require(self, where: str, error: float, allowed: float, relative: str) -> None:
        self.checks.require(
            where,
            error,
            allowed,
            f"layer {self._layer}, {where}: the node is not the sum of its edges (largest "
            f"mismatch {error:.2g} {relative}, allowed {allowed:.0e}). The pattern tried is "
            f"'{self.anatomy.pattern}'; this model does something else with its residual stream",
        )


def prove(runner: Runner, batch: Batch, plain: Tensor) -> Verification:
    """Check the decomposition of a runner's model; call with gradients and dropout off.

    Args:
        runner: of the model, which was taken apart.
        batch: a tiny one.
        plain: ``[B, T, V]``, the model's own logits on it.

    Raises:
        UnsupportedModelError: naming the layer, the place and the mismatch.
    """
    anatomy, found, valid = runner.anatomy, Checks(), batch.valid
    # A unit of FSDP2 may give in float32 (output_dtype) what it computed, and rounded, in bfloat16.
    dtypes = plain.dtype, computing_dtype(runner.model)
    rounded = min(dtypes, key=lambda each: each.itemsize)
    wanted = plain[valid].to(rounded)
    masks = _masks(anatomy, batch, None)
    run = _Witness(anatomy, batch, masks, found)
    logits = runner.forward(run)
    last = run.finish()
    _same_logits(found, "our unmasked run against the model's own", logits[valid], wanted)
    head = anatomy.readout.early(last)
    what = "head(final norm(last layer)) against the logits"
    _same(found, what, head[valid], logits[valid].to(rounded))
    _check_mlps(found, run.mlp_runs, valid)
    _check_tokens(runner, found, batch)
    recording = RecordingRun(anatomy, batch)
    runner.forward(recording)
    run = _Witness(anatomy, batch, masks, found, recording.attention)
    logits = runner.forward(run)
    run.finish()
    what = "a run that uses recorded attention against the model's own"
    _same_logits(found, what, logits[valid], wanted)
    generator = torch.Generator().manual_seed(0)
    run = _Witness(anatomy, batch, _masks(anatomy, batch, generator), found)
    runner.forward(run)
    run.finish()
    check_independence(runner, found, max(tolerance(last.dtype), _NORMS), valid.device)
    return found.verification()


def _masks(
    anatomy: Anatomy, batch: Batch, generator: torch.Generator | None
) -> tuple[LayerEdges, ...]:
    """All ones, or coin flips (with a generator)."""
    (rows, length), device = batch.valid.shape, batch.valid.device

    def draw(*shape: int) -> Tensor:
        if generator is None:
            return torch.ones(shape, device=device)
        return torch.randint(2, shape, generator=generator, device="cpu").float().to(device)

    return tuple(
        LayerEdges(
            draw(rows, anatomy.heads, length, length),
            draw(rows, length),
            draw(rows, length),
            draw(rows, length),
            modules.parallel,
        )
        for modules in anatomy.layers
    )


def _check_mlps(
    found: Checks, runs: Sequence[tuple[int, nn.Module, Tensor, Tensor]], valid: Tensor
) -> None:
    """An MLP edge carries one token's MLP alone, so masked runs skip the tokens not kept."""
    some = valid.flatten().nonzero()[::2, 0]
    for layer, module, hidden, together in runs:
        flat, some = hidden.reshape(-1, hidden.shape[-1]), some.to(hidden.device)
        name = type(module).__name__
        with running(f"layer {layer}: its MLP ({name}) does not run on some tokens alone"):
            by_themselves = first_tensor(run_by_itself(module, flat[some][None]))
            assert by_themselves is not None
        _same(
            found,
            f"layer {layer}: its MLP on some tokens against the same tokens among all (the graph "
            "has one MLP edge a token, so an MLP may not mix tokens)",
            by_themselves.reshape(len(some), -1),
            together.reshape(len(flat), -1)[some],
            name="MLPs of some tokens alone",
        )


def _check_tokens(runner: Runner, found: Checks, batch: Batch) -> None:
    """Where an MLP cannot be run by itself: noise on the first token's node changes no other's."""
    valid = batch.valid
    for index, modules in enumerate(runner.anatomy.layers):
        if modules.token_wise:
            continue
        gave = [_disturbed(runner, batch, index, noise) for noise in (0.0, 1.0)]
        others = valid.clone()
        others[:, 2] = False
        plain, noisy = (each.to(valid.device).reshape(*valid.shape, -1)[others] for each in gave)
        _same(
            found,
            f"layer {index}: its MLP's output at other tokens, with noise on one token's node, "
            "against that without (the graph has one MLP edge a token, so an MLP may not mix "
            "tokens)",
            noisy,
            plain,
            name="MLPs of undisturbed tokens",
        )


class _PassThrough(Run):
    """Listens to nothing: attention stays in the open, and that is all."""

    @override
    def hooks(self) -> list[Hook]:
        return []

    @override
    def on_attention(
        self, module: nn.Module, probabilities: AttentionMap, value: Tensor, visible: Tensor
    ) -> AttentionMap:
        return probabilities


def _disturbed(runner: Runner, batch: Batch, index: int, noise: float) -> Tensor:
    """What the MLP of one layer gave with ``noise`` on token 2 of what its branch reads."""
    modules = runner.anatomy.layers[index]
    gave: list[Tensor] = []
    readers = modules.middle or (modules.layer,)
    shape = batch.valid.shape

    def disturb(value: Tensor) -> Tensor:
        changed = value.reshape(*shape, -1).clone()
        changed[:, 2] += noise * changed[:, 2].roll(1, -1)
        return changed.reshape(value.shape)

    note = on_output(lambda read, output: gave.append(output) or output)  # type: ignore[func-returns-value]
    hooks = [Hook(each, on_input(disturb), True) for each in readers]
    with registered([*hooks, *(Hook(each, note, False) for each in modules.mlp_out)]):
        runner.forward(_PassThrough(runner.anatomy, batch))
    return sum(gave[1:], gave[0])


def _same_logits(found: Checks, what: str, one: Tensor, other: Tensor) -> None:
    """Logits ``[N, V]`` of two runs: each layer of them rounds differently, and that adds up."""
    _require_small(found, what, typical_mismatch(one, other), 4 * tolerance(other.dtype), what)


def _same(found: Checks, what: str, one: Tensor, other: Tensor, name: str | None = None) -> None:
    _require_small(found, what, mismatch(one, other), tolerance(other.dtype), name or what)


def _require_small(found: Checks, what: str, error: float, allowed: float, name: str) -> None:
    allowed = max(allowed, _NORMS)
    message = f"{what}: they differ by {error:.2g} of the largest value, allowed {allowed:.0e}"
    found.require(name, error, allowed, message)
