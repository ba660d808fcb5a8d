"""The attach-time proof: on a tiny batch, every node is the sum of its edges, kept or masked.

A model works because this holds, not because its name is on a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import override

from softtrace.batch import check_finite, position_ids_of
from softtrace.errors import UnsupportedModelError
from softtrace.families.pattern import Anatomy
from softtrace.graph import LayerEdges
from softtrace.hooks import Hook, on_input, on_output
from softtrace.runs import MaskedRun, RecordingRun, dropout_off

if TYPE_CHECKING:
    from softtrace.instrument import Instrument

_LENGTH = 6


class _Witness(MaskedRun):
    """A masked run that rebuilds every node from its edges and compares."""

    def __init__(
        self,
        anatomy: Anatomy,
        valid: Tensor,
        masks: Sequence[LayerEdges],
        attention: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(anatomy, valid, masks, attention, keep_hidden=True)
        self.mlp_runs: list[tuple[Tensor, Tensor]] = []
        self.last_output: Tensor | None = None
        self._mixed: tuple[Tensor, Tensor] | None = None
        self._mlp_input: Tensor | None = None
        self._mlp_output: Tensor | None = None

    @override
    def hooks(self) -> list[Hook]:
        hooks = super().hooks()
        for index, modules in enumerate(self.anatomy.layers):
            hooks.append(Hook(modules.mlp, on_input(self._enter_mlp), True))
            hooks.append(Hook(modules.layer, on_output(self._leave, index), False))
        return hooks

    @property
    def _layer(self) -> int:
        return len(self.hidden or ()) - 1

    @override
    def _enter(self, hidden: Tensor) -> None:
        super()._enter(hidden)
        if self.last_output is not None:
            self._compare("entering it", hidden, self.last_output)

    @override
    def on_attention(
        self, module: nn.Module, probabilities: Tensor, value: Tensor, visible: Tensor
    ) -> Tensor:
        probabilities = super().on_attention(module, probabilities, value, visible)
        self._mixed = (probabilities, value)
        return probabilities

    @override
    def _reach_middle(self, hidden: Tensor) -> None:
        super()._reach_middle(hidden)
        layer = self._layer
        if self._mixed is None:
            raise UnsupportedModelError(
                f"layer {layer}: its attention does not follow transformers' attention interface, "
                "so the share of each source token cannot be seen"
            )
        probabilities, value = self._mixed
        self._mixed = None
        weight = self.anatomy.output_weight(layer).to(value.dtype)
        value = value.repeat_interleave(weight.shape[0] // value.shape[1], dim=1)
        carried = probabilities.to(value.dtype)[..., None] * (value @ weight)[:, :, None]
        edges = carried.sum((1, 3))  # [B, H, T, S, d] exists here alone, at 6 tokens
        bias = self.anatomy.output_bias(layer)
        mask = self.masks[layer].attention_residual[..., None].to(edges.dtype)
        expected = mask * self.entry + edges + (0 if bias is None else bias)
        self._compare("after attention", hidden, expected)

    def _enter_mlp(self, hidden: Tensor) -> None:
        self._mlp_input = hidden

    @override
    def after_mlp(self, layer: int, output: Tensor) -> Tensor:
        self._mlp_output = output
        if self._mlp_input is not None:
            self.mlp_runs.append((self._mlp_input, output))
        return super().after_mlp(layer, output)

    def _leave(self, layer: int, output: Tensor) -> Tensor:
        if self._mlp_output is None:
            raise UnsupportedModelError(f"layer {layer}: its MLP did not run inside it")
        masks = self.masks[layer]
        residual = masks.mlp_residual[..., None].to(output.dtype) * self.middle
        expected = residual + masks.mlp[..., None].to(output.dtype) * self._mlp_output
        self._mlp_output = None
        self._compare("after the MLP", output, expected)
        self.last_output = output
        return output

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
        # Cancelled residuals leave rounding at the scale of what was cancelled.
        floor = float(self.entry.abs().max())
        error = _mismatch(found[self.valid], expected[self.valid], floor)
        if not error <= tolerance(found.dtype):
            raise UnsupportedModelError(
                f"layer {self._layer}, {where}: the node is not the sum of its edges (largest "
                f"relative mismatch {error:.2g}, allowed {tolerance(found.dtype):.0e}). The "
                f"pattern tried is '{self.anatomy.pattern}'; this model does something else "
                "with its residual stream"
            )


def prove(instrument: Instrument) -> None:
    """Check the decomposition of an instrument's model; call with gradients off.

    Raises:
        UnsupportedModelError: naming the layer, the place and the mismatch.
        NonFiniteError: the model's own logits are not finite.
    """
    anatomy, model = instrument.anatomy, instrument.model
    generator = torch.Generator().manual_seed(0)  # the global random state stays untouched
    ids = torch.randint(anatomy.vocabulary, (2, _LENGTH), generator=generator, device="cpu")
    ids = ids.to(next(model.parameters()).device)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :2] = False  # left padding in one row
    with dropout_off(model):
        plain = model(
            input_ids=ids,
            attention_mask=valid.long(),
            position_ids=position_ids_of(valid),
            use_cache=False,
        ).logits
    check_finite(plain, "logits of the model on a tiny batch, run to attach", valid)
    masks = _masks(anatomy, ids, None)
    run = _Witness(anatomy, valid, masks)
    logits = instrument.forward(run, ids)
    last = run.finish()
    # Half precision rounds differently in every layer of the two runs, and that adds up.
    _require_same("our unmasked run against the model's own", logits[valid], plain[valid], 4)
    head = anatomy.head(anatomy.final_norm(last))
    _require_same("head(final norm(last layer)) against the logits", head[valid], logits[valid])
    _check_final_norm(anatomy, last[valid])
    with dropout_off(model):
        _check_mlps(anatomy, run.mlp_runs, valid)
    recording = RecordingRun(anatomy, valid)
    instrument.forward(recording, ids)
    run = _Witness(anatomy, valid, masks, recording.attention)
    logits = instrument.forward(run, ids)
    run.finish()
    _require_same(
        "a run that uses recorded attention against the model's own", logits[valid], plain[valid], 4
    )
    run = _Witness(anatomy, valid, _masks(anatomy, ids, generator))
    instrument.forward(run, ids)
    run.finish()


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative mismatch accepted for a model of this dtype."""
    return {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2}.get(dtype, 5e-2)


def _masks(
    anatomy: Anatomy, ids: Tensor, generator: torch.Generator | None
) -> tuple[LayerEdges, ...]:
    """All ones, or coin flips (with a generator)."""
    batch, length = ids.shape

    def draw(*shape: int) -> Tensor:
        if generator is None:
            return torch.ones(shape, device=ids.device)
        return torch.randint(2, shape, generator=generator, device="cpu").float().to(ids.device)

    return tuple(
        LayerEdges(
            draw(batch, anatomy.heads, length, length),
            draw(batch, length),
            draw(batch, length),
            draw(batch, length),
        )
        for _ in anatomy.layers
    )


def _check_mlps(anatomy: Anatomy, runs: Sequence[tuple[Tensor, Tensor]], valid: Tensor) -> None:
    """An MLP edge carries one token's MLP alone, so masked runs skip the tokens not kept."""
    some = valid.flatten().nonzero()[::2, 0]
    for layer, (hidden, together) in enumerate(runs):
        alone = anatomy.layers[layer].mlp(hidden.flatten(0, 1)[some][None])
        alone = alone[0] if isinstance(alone, tuple) else alone
        _require_same(
            f"layer {layer}: its MLP on some tokens against the same tokens among all (the graph "
            "has one MLP edge a token, so an MLP may not mix tokens)",
            alone[0],
            together.flatten(0, 1)[some],
        )


def _check_final_norm(anatomy: Anatomy, last: Tensor) -> None:
    """The final norm must be a scalar a token times what ``linearised_final_norm`` says."""
    normed = anatomy.final_norm(last)
    bias = getattr(anatomy.final_norm, "bias", None)
    direction = anatomy.linearised_final_norm(last)
    if isinstance(bias, Tensor):
        normed = normed - bias
    scale = (normed * direction).sum(-1, keepdim=True) / (direction**2).sum(-1, keepdim=True)
    _require_same("the final norm against scale · weight · input", scale * direction, normed)


def _require_same(what: str, found: Tensor, expected: Tensor, slack: float = 1.0) -> None:
    error = _mismatch(found, expected, 0.0)
    # Norms of transformers compute in float32 even in a float64 model.
    allowed = max(slack * tolerance(expected.dtype), 1e-6)
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{what}: they differ by {error:.2g} of the largest value, allowed {allowed:.0e}"
        )


def _mismatch(found: Tensor, expected: Tensor, floor: float) -> float:
    scale = max(float(expected.abs().max()), floor, 1e-30)
    return float((found - expected).abs().max()) / scale
