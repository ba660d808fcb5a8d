"""The next token of a text, chosen as ``model.generate(do_sample=False)`` chooses it.

A model's generation config can change what greedy decoding writes (``repetition_penalty``,
``no_repeat_ngram_size``, ``suppress_tokens``, ``min_new_tokens``, ...). transformers makes logits
processors of it. Those that look at the text so far and at nothing else can be applied to every
position of a draft, each with its own prefix; the others are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, SynthIDTextWatermarkingConfig
from transformers.generation import logits_process

from softtrace.errors import InvalidInputError

#: Processors whose result depends on the text so far and the logits alone.
_OF_THE_TEXT = {
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.WatermarkLogitsProcessor,
}

#: Processors that look at the logits of one token alone, and at no text.
OF_LOGITS = {
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinPLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
}

#: Options of a generation config that drafts cannot honour: what is allowed, and why no more.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), "beams write several texts at once"),
    "num_beam_groups": ((None, 1), "beams write several texts at once"),
    "num_return_sequences": ((None, 1), "greedy decoding writes one text"),
    "constraints": ((None,), "words are forced by beams, which write several texts at once"),
    "force_words_ids": ((None,), "words are forced by beams, which write several texts at once"),
    "penalty_alpha": ((None, 0), "contrastive search is not greedy decoding"),
    "dola_layers": ((None,), "contrasting layers is not greedy decoding"),
    "guidance_scale": ((None, 1), "guidance runs the model on a second text with its own cache"),
    "token_healing": ((None, False), "it writes the prompt anew"),
    "assistant_ensemble_weight": ((None,), "a mixture with the draft is not greedy decoding"),
}
#: What the direct loops cannot honour besides.
_REFUSED_DIRECTLY: dict[str, tuple[tuple[Any, ...], str]] = {
    **_REFUSED,
    "stop_strings": (
        (None,),
        "these loops have no tokenizer; call softtrace.decoding.generate with one",
    ),
    "max_time": ((None,), "where the text ends would depend on the speed of the machine"),
}


@dataclass(frozen=True)
class GreedyChoice:
    """How transformers' greedy decoding chooses the tokens after one prompt.

    Attributes:
        prompt: ``[1, T]`` int64 ids.
        processors: what changes the logits; empty where the generation config asks for nothing.
    """

    prompt: Tensor
    processors: LogitsProcessorList

    def scores(self, logits: Tensor, written: Sequence[int]) -> Tensor:
        """What the next tokens are the maxima of, for positions that follow each other.

        Args:
            logits: ``[N, V]``. The last row is for what follows the prompt and ``written``, each
                row before it for what follows one token less.
            written: new tokens, N - 1 at least.

        Returns:
            ``[N, V]``, float32 where there are processors, else ``logits`` as they are.
        """
        if not self.processors:
            return logits
        seen = torch.cat((self.prompt, self.prompt.new_tensor([[*written]])), dim=1)
        first = seen.shape[1] - len(logits) + 1
        rows = logits.to(self.prompt.device, torch.float32, copy=True)[:, None]  # as generate does
        processors: Any = self.processors
        scores = [processors(seen[:, : first + place], row) for place, row in enumerate(rows)]
        return torch.cat(scores)


def greedy_choice(
    model: nn.Module,
    prompt: Tensor,
    max_new_tokens: int,
    ends: Collection[int],
    sampling: Mapping[str, Any] | None = None,
) -> GreedyChoice:
    """What ``model.generate(do_sample=False)`` applies to the logits of one text.

    Args:
        model: a causal language model of transformers; without a generation config nothing applies.
        prompt: ``[1, T]`` ids.
        max_new_tokens: how many tokens are written at most.
        ends: tokens that end the text; with none, what bears on an end does not apply.
        sampling: options of ``model.generate(do_sample=True)``, for what is applied to logits
            before a token is drawn by them; None for greedy decoding.

    Raises:
        InvalidInputError: the generation config, or ``sampling``, asks for something that depends
            on more than the text so far, or transformers refuses it.
    """
    generate: Any = getattr(model, "generate", None)
    if generate is None or getattr(model, "generation_config", None) is None:
        return GreedyChoice(prompt, LogitsProcessorList())
    refuse_options(model, {}, _REFUSED_DIRECTLY)
    options: dict[str, Any] = {
        "do_sample": sampling is not None,
        **(sampling or {}),
        "max_new_tokens": max_new_tokens,
        "max_length": None,  # or transformers warns that the other one is taken
        "eos_token_id": sorted(end for end in ends if end >= 0) or None,
        "cache_implementation": None,  # none is used
    }
    if options["eos_token_id"] is None:  # generate fails at it
        options["exponential_decay_length_penalty"] = None
    try:
        processors: LogitsProcessorList = generate(
            prompt, attention_mask=torch.ones_like(prompt), custom_generate=_prepared, **options
        )
    except (TypeError, ValueError) as error:
        where = "sampling or model.generation_config" if sampling else "model.generation_config"
        raise InvalidInputError(
            f"{where}: transformers does not decode with it: {error}"
        ) from error
    for processor in processors:
        if type(processor) not in _OF_THE_TEXT | OF_LOGITS:
            raise InvalidInputError(
                f"model.generation_config: found one that asks for {type(processor).__name__}, "
                "which is not known to depend on the text so far alone, so that drafts could be "
                "checked with it; take the option out or decode with model.generate"
            )
    return GreedyChoice(prompt, processors)


def _prepared(
    model: nn.Module, input_ids: Tensor, logits_processor: LogitsProcessorList, **_: Any
) -> LogitsProcessorList:
    """Stands where ``generate`` would decode, and hands back what it prepared."""
    return logits_processor


def refuse_options(
    model: nn.Module,
    options: Mapping[str, Any],
    refused: Mapping[str, tuple[tuple[Any, ...], str]] = _REFUSED,
) -> None:
    """Refuse a generation that a draft changes.

    Args:
        model: its generation config holds what ``options`` do not say.
        options: of ``model.generate``.
        refused: names of options with what is allowed, and why no more.

    Raises:
        InvalidInputError: an option that cannot be honoured, by name.
    """
    for name, (allowed, why) in refused.items():
        found = option_of(model, options, name)
        if found not in allowed:
            raise InvalidInputError(
                f"generation_config.{name}: found {found!r}, allowed is "
                f"{' or '.join(map(str, allowed))}: {why}. Set it so, or decode with model.generate"
            )
    if option_of(model, options, "cache_implementation") == "quantized":
        raise InvalidInputError(
            "generation_config.cache_implementation: found 'quantized', which rounds what the "
            "checks read; allowed are the others. Set it to None, or decode with model.generate"
        )
    if isinstance(option_of(model, options, "watermarking_config"), SynthIDTextWatermarkingConfig):
        raise InvalidInputError(
            "generation_config.watermarking_config: found SynthID's, which counts its own calls "
            "and so the guesses that are taken back; allowed is WatermarkingConfig. Set it to "
            "None, or decode with model.generate"
        )


def option_of(model: nn.Module, options: Mapping[str, Any], name: str) -> Any:
    """What ``model.generate(**options)`` takes for one option; None where nothing says it."""
    if name in options:
        return options[name]
    configs = (options.get("generation_config"), getattr(model, "generation_config", None))
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)
