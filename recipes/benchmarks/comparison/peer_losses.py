"""Baselines behind one call, ``method(ids, step)``: other projects' losses, close to their papers.

Where a paper leaves something open, or a stock model cannot carry it, the docstring says what was
done instead. All take a Llama-like model of transformers in train mode and return the whole
training loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softtrace
from softtrace.density.distortion import divergence


class Method:
    """Plain fine-tuning, and what the others build on.

    Args:
        model: ``LlamaForCausalLM`` or one with the same module names.
        strength: the method's dial; nothing here.
        seed: of random choices.
        plain: losses of the paired plain run, for methods with a loss budget: smoothed training
            losses of every step, or held-out losses by step.
    """

    source = "cross-entropy alone"
    strengths: tuple[float, ...] = ()
    needs_plain = False
    every = 1  # steps after which what a step does comes again

    def __init__(
        self,
        model: Any,
        strength: float = 0.0,
        seed: int = 0,
        plain: list[float] | dict[int, float] | None = None,
    ) -> None:
        self.model, self.strength, self.seed, self.plain = model, strength, seed, plain
        self.layers: list[nn.Module] = list(model.model.layers)

    def __call__(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The training loss and the task loss inside it."""
        task = self.model(input_ids=ids, labels=ids).loss
        return task + self.term(ids, step, task), task

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        """What is added to the task loss."""
        return task.new_zeros(())

    def measured(self, step: int, loss: float) -> None:
        """Take in the held-out loss after so many steps."""

    def exit_logits(self, hidden: Tensor) -> Tensor:
        """A residual stream read by the model's own final norm and head."""
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits

    @contextmanager
    def watching(self, before: bool, modules: list[nn.Module]) -> Iterator[list[Tensor]]:
        """Collect what modules read (before) or give."""
        seen: list[Tensor] = []

        def read(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        def gave(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handles = [
            module.register_forward_pre_hook(read, with_kwargs=True)
            if before
            else module.register_forward_hook(gave)
            for module in modules
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


DIRECT: dict[str, Any] = {
    "exit_tokens": 0.125, "exit_quantile": 1.0, "exit_depths": (0.25, 1.0), "exit_map": False,
}  # fmt: skip
"""Exits of all tokens at many depths without maps, as the results of ``peers.py`` have them."""


class SoftTrace(Method):
    """This project's term with direct exits, at the other defaults but for the strength."""

    source = "softtrace"
    strengths = (0.15, 0.35, 0.8)
    options: ClassVar[dict[str, Any]] = DIRECT

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.density = softtrace.DensityLoss(
            self.model, strength=self.strength, seed=self.seed, **self.options
        )
        self.every = self.density.options.on(self.model.device).every or 1

    def __call__(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        with self.density.watching():
            task = self.model(input_ids=ids, labels=ids).loss
        return task + self.term(ids, step, task), task

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        return self.density(ids, step=step).loss


class WithoutExits(SoftTrace):
    """Its masked runs alone, on a little more of the batch, which costs the same."""

    options: ClassVar[dict[str, Any]] = {**DIRECT, "exits": 0.0, "share": 0.15}


class MoreExits(SoftTrace):
    """Five times the weight on exits, and twice the tokens for them."""

    strengths = (0.15, 0.35)
    options: ClassVar[dict[str, Any]] = {**DIRECT, "exits": 1.0, "exit_tokens": 0.25}


class ExitsFirst(SoftTrace):
    """Half the strength, and nearly the weight of a distillation on exits."""

    strengths = (0.15, 0.25)
    options: ClassVar[dict[str, Any]] = {**DIRECT, "exits": 2.0, "exit_tokens": 0.25}


class WholeBatch(SoftTrace):
    """Masked runs of the whole batch at every step: what the defaults are a cheap part of."""

    strengths = (0.35,)
    options: ClassVar[dict[str, Any]] = {**DIRECT, "every": 1, "share": 1.0}


class Seldom(SoftTrace):
    """Masked runs at every 8th step, large ones, and more weight on exits."""

    options: ClassVar[dict[str, Any]] = {
        **DIRECT, "every": 8, "share": 0.6, "exits": 0.5, "exit_tokens": 0.25,
    }  # fmt: skip


class LayerSkip(Method):
    """Early-exit cross-entropy with rotating exits, and layer dropout that rises with depth.

    arXiv 2404.16710, section 4.1. Layer l of L is dropped per sequence with probability
    p_max · (exp(l ln 2 / (L - 1)) - 1), constant over the steps as where a pretrained model goes
    on; p_max = 0.1 as there. Exit l weighs e_scale · Σ_{i≤l} i, the last layer
    L - 1 + e_scale · Σ_{i≤L-2} i, over the sum of those that are on; besides the last layer one
    exit a step is on (rotational curriculum with R = L - 1, one of the paper's settings). The dial
    is e_scale; the paper's values lie between 0.1 and 1.
    """

    source = "LayerSkip, arXiv 2404.16710"
    strengths = (0.05, 0.2, 1.0)
    p_max = 0.1

    def __call__(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        count = len(self.layers)
        draws = torch.Generator().manual_seed(softtrace.loss.draws.hashed_seed(self.seed, step))

        def drop(layer: int) -> Any:
            rate = self.p_max * (math.exp(layer * math.log(2) / (count - 1)) - 1)
            dropped = (torch.rand(len(ids), generator=draws) < rate).to(ids.device)

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                read = args[0] if args else kwargs["hidden_states"]
                whole = output[0] if isinstance(output, tuple) else output
                kept = torch.where(dropped[:, None, None], read, whole)
                return (kept, *output[1:]) if isinstance(output, tuple) else kept

            return hook

        handles = [
            layer.register_forward_hook(drop(index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        on = step % (count - 1)
        try:
            with self.watching(True, [self.layers[on + 1]]) as seen:
                last = self.model(input_ids=ids, labels=ids).loss
        finally:
            for handle in handles:
                handle.remove()
        weights = layerskip_weights(count, on, self.strength)
        return weights[0] * self.early_loss(seen[0], ids) + weights[1] * last, last

    def early_loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Cross-entropy of an exit, from its residual stream ``[B, T, D]``."""
        logits = self.exit_logits(hidden)[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def layerskip_weights(layers: int, on: int, e_scale: float) -> tuple[float, float]:
    """Normalised weights of the exit after layer ``on`` (from 0) and of the last layer."""
    early = e_scale * sum(range(on + 1))
    last = layers - 1 + e_scale * sum(range(layers - 1))
    return early / (early + last), last / (early + last)


class ExitDistillation(Method):
    """KL of a rotating early exit from the full prediction, which is held constant.

    The distillation term of Zhang et al. (arXiv 1905.08094), the deepest classifier as teacher.
    There all exits are on at once, with a cross-entropy and a feature loss each; here one a step,
    as in LayerSkip's rotation, and without the two: LayerSkip has the cross-entropy.
    """

    source = "self-distillation of exits, arXiv 1905.08094"
    strengths = (0.1, 0.3, 1.0)

    def __call__(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        on = step % (len(self.layers) - 1)
        with self.watching(True, [self.layers[on + 1]]) as seen:
            output = self.model(input_ids=ids, labels=ids)
        distance = self.distance(output.logits.detach(), seen[0])
        return output.loss + self.strength * distance, output.loss

    def distance(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Mean KL of an exit, from its residual stream ``[B, T, D]``, from the full prediction."""
        return divergence(logits, self.exit_logits(hidden)).mean()


class ActivationL1(Method):
    """L1 norm of the hidden activations of every MLP, mean over layers, tokens and units.

    arXiv 2603.23198. There the gate is a ReLU; with this model's SiLU activations become small but
    not zero.
    """

    source = "L1 on MLP activations, arXiv 2603.23198"
    strengths = (0.1, 0.5, 2.0)

    def __call__(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        with self.watching(True, [layer.mlp.down_proj for layer in self.layers]) as seen:
            task = self.model(input_ids=ids, labels=ids).loss
        size = torch.stack([hidden.abs().mean() for hidden in seen]).mean()
        return task + self.strength * size, task


class _OnAttention(Method):
    """Needs the attention probabilities of the training forward, so eager attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.set_attn_implementation("eager")

    def __call__(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        output = self.model(input_ids=ids, labels=ids, output_attentions=True)
        penalty = torch.stack([self.penalty(each.float()) for each in output.attentions]).mean()
        return output.loss + self.weight(output.loss, step) * penalty, output.loss

    def penalty(self, attention: Tensor) -> Tensor:
        """A number for the probabilities ``[B, H, T, T]`` of one layer."""
        raise NotImplementedError

    def weight(self, task: Tensor, step: int) -> float:
        """Of the penalty at this step."""
        return self.strength


class AttentionEntropy(_OnAttention):
    """Mean entropy of the rows of attention (nats), over layers, heads and tokens."""

    source = "entropy of attention"
    strengths = (0.01, 0.03, 0.1)

    def penalty(self, attention: Tensor) -> Tensor:
        return -(attention * attention.clamp_min(1e-9).log()).sum(-1).mean()


class AttentionConnectivity(_OnAttention):
    """Expected share of attention edges that are on, as low as a loss budget allows.

    arXiv 2512.05865: connectivity is minimised under a bound on the loss, with a multiplier whose
    logarithm follows the slack (GECO). There gates of their own, read from queries and keys, switch
    edges, and stay in the model; a stock model has none, so here an edge is on to the degree
    sigmoid(log(a / 0.01) / 0.5) of its attention probability a. The bound is (1 + dial) times what
    the paired plain run had at this step, both smoothed over 20 steps, since a fine-tuning loss
    falls where the paper's stays.
    """

    source = "attention connectivity under a loss constraint, arXiv 2512.05865"
    strengths = (0.003, 0.01, 0.03)
    needs_plain = True
    rate = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.plain is None:
            raise ValueError("needs the losses of the paired plain run")
        self.log_weight, self.smooth = math.log(0.1), math.nan

    def penalty(self, attention: Tensor) -> Tensor:
        length = attention.shape[-1]
        on = ((attention.clamp_min(1e-9).log() - math.log(0.01)) / 0.5).sigmoid()
        return on.tril().sum((2, 3)).mean() / (length * (length + 1) / 2)

    def weight(self, task: Tensor, step: int) -> float:
        now = task.item()
        self.smooth = now if math.isnan(self.smooth) else smoothed(self.smooth, now)
        bound = (1 + self.strength) * (self.plain or [])[step]
        slack = (bound - self.smooth) / bound  # relative: the pace is the same at any loss
        self.log_weight += max(-0.2, min(0.2, self.rate * slack))
        self.log_weight = max(math.log(1e-4), min(self.log_weight, math.log(1e4)))
        return math.exp(self.log_weight)


def smoothed(mean: float, new: float) -> float:
    """Running mean over about 20 steps."""
    return 0.95 * mean + 0.05 * new


METHODS: dict[str, type[Method]] = {
    "plain": Method,
    "softtrace": SoftTrace,
    "softtrace, no exits": WithoutExits,
    "softtrace, every 8th": Seldom,
    "softtrace, more exits": MoreExits,
    "softtrace, exits first": ExitsFirst,
    "softtrace, whole batch": WholeBatch,
    "layerskip": LayerSkip,
    "exit distillation": ExitDistillation,
    "activation L1": ActivationL1,
    "attention connectivity": AttentionConnectivity,
    "attention entropy": AttentionEntropy,
}
