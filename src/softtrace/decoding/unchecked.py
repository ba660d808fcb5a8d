"""Early exit without a check: faster, and not the text that the whole model writes.

Where an exit is sure, its token stands; where it is not, the other layers run. These have then not
read the tokens that went out early. As in LayerSkip (arXiv 2404.16710), what the first layers gave
for those is kept, and the others read it in the same run, so that no keys and values are missing
or copied from elsewhere (as they are in CALM, arXiv 2207.07061).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softtrace.checks import check_range
from softtrace.decoding.confidence import surest
from softtrace.decoding.exit_checks import ProvenExit, decoder_layers, refuse_moving_rotations
from softtrace.decoding.greedy_choice import greedy_choice
from softtrace.decoding.speculative import (
    Ends,
    check_decoding,
    check_one_text,
    continued_exit_of,
    ends_of,
)
from softtrace.decoding.split_model import TwoParts
from softtrace.errors import InvalidInputError


@dataclass(frozen=True)
class EarlyGeneration:
    """What was written with early exits that no one checked.

    Attributes:
        tokens: ``[N]`` int64, the new tokens.
        early: ``[N]`` bool, which of them an exit wrote. The first never is: it comes with the
            prompt.
        layers_saved: Share of runs of layers that were saved of the N - 1 tokens' after the first.
            A run of the upper layers over several tokens that went out early is one.
    """

    tokens: Tensor
    early: Tensor
    layers_saved: float


@torch.inference_mode()
def exit_early(
    model: nn.Module,
    input_ids: Tensor,
    *,
    confidence: float,
    exit_layer: int | None = None,
    max_new_tokens: int = 64,
    eos_token_id: Ends = None,
    proven_exit: ProvenExit | None = None,
) -> EarlyGeneration:
    """Greedy decoding in which tokens go out after the first layers where these are sure.

    Not lossless: :func:`softtrace.decoding.calibrated_confidence` chooses the confidence for an
    agreement that you name, and :func:`agreement_of` says what it came to.

    Args:
        model: A causal language model of transformers, in eval mode.
        input_ids: ``[1, T]``, no padding.
        confidence: Least probability of an exit's most likely token, in [0, 1], before the
            generation config changes it.
        exit_layer, max_new_tokens, eos_token_id: See :func:`softtrace.decoding.speculate`.
        proven_exit: What :func:`softtrace.decoding.check_cache` returned; None proves it anew.

    Raises:
        UnsupportedModelError, InvalidInputError: See :func:`softtrace.decoding.speculate`.
    """
    check_decoding(model, max_new_tokens)
    check_range("confidence", confidence, 0, 1)
    proven, depth = continued_exit_of(model, input_ids, exit_layer, proven_exit)
    refuse_moving_rotations(model, input_ids.shape[1], max_new_tokens)
    ends = ends_of(model, eos_token_id)
    choice = greedy_choice(model, input_ids, max_new_tokens, ends)
    parts = TwoParts(model, decoder_layers(proven.instrument), depth)
    tokens = [int(choice.scores(parts.whole(input_ids)[None], ()).argmax())]
    early = [False]
    while len(tokens) < max_new_tokens and tokens[-1] not in ends:
        logits = parts.first(input_ids.new_tensor([tokens[-1:]]))
        early.append(float(surest(logits)) >= confidence)
        if not early[-1]:  # reads the tokens that went out early, too
            logits = parts.rest()[-1]
        tokens.append(int(choice.scores(logits[None], tokens).argmax()))
    above = (proven.layers - depth) / proven.layers
    saved = above * sum(early) / max(1, len(tokens) - 1)
    return EarlyGeneration(input_ids.new_tensor(tokens), torch.tensor(early), saved)


@torch.no_grad()
def agreement_of(model: nn.Module, input_ids: Tensor, tokens: Tensor) -> float:
    """Share of a text's tokens that the whole model would have written in their places.

    Args:
        model: A causal language model of transformers, in eval mode.
        input_ids: ``[1, T]``, the prompt.
        tokens: ``[N]``, what was written after it, N at least 1.

    Raises:
        InvalidInputError: No tokens, several prompts or an empty one, or what the generation config
            asks for cannot be applied.
    """
    if tokens.dim() != 1 or not len(tokens):
        raise InvalidInputError(
            f"tokens: found {tuple(tokens.shape)}, allowed is [N] with N from 1: the new tokens "
            "without the prompt"
        )
    check_one_text(input_ids)
    whole = torch.cat((input_ids, tokens[None, :-1]), dim=1)
    logits = model(input_ids=whole, use_cache=False).logits[0, input_ids.shape[1] - 1 :]
    choice = greedy_choice(model, input_ids, len(tokens), ends_of(model, None))
    best = choice.scores(logits, tokens[:-1].tolist()).argmax(-1)
    return float((best == tokens).double().mean())
