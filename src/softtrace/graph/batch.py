"""The checked batch that travels from where it enters to every run, and the checks it passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softtrace.checks import as_integer
from softtrace.errors import InvalidInputError, NonFiniteError

_NOT_FINITE = (
    "Lower the learning rate, clip gradients, or train in bfloat16 or float32 instead of float16."
)


@dataclass(frozen=True)
class Batch:
    """A batch of token ids: what runs, losses and measures read, made once and handed on.

    :meth:`softtrace.Instrument.batch` makes it and checks it against its model. :meth:`of` checks
    all that can be known without the model, and reads nothing from the device unless position ids
    are given: where a forward is still under way, :meth:`softtrace.Instrument.check` can follow.

    Attributes:
        input_ids: ``[B, T]`` int64 or int32.
        valid: ``[B, T]`` bool, False at padding.
        targets: ``[B, T]``, the token that each position has to predict, -100 for none.
        counted: ``[B, T]`` bool, which positions count: those with a label, where labels were
            given, and all real tokens otherwise.
        positions: ``[B, T]`` position ids, where they are not those that follow from padding; None
            otherwise.
        packed: whether positions start anew inside a row, one document after another. No edge
            crosses from one document into another, and there is no padding.
        attention_mask: as it was given, for the check of its values.
    """

    input_ids: Tensor
    valid: Tensor
    targets: Tensor
    counted: Tensor
    positions: Tensor | None = None
    packed: bool = False
    attention_mask: Tensor | None = None

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Batch:
        """The batch of these tensors.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]`` of 0 and 1, padding on either side; None for no padding.
            position_ids: ``[B, T]`` or ``[1, T]`` integers, needed where rows are packed: they
                start anew with every document. None where each row is one document.
            labels: ``[B, T]``, -100 where the task loss looks away; None for all tokens.

        Raises:
            InvalidInputError: wrong rank, dtype or shape; positions that :func:`check_positions`
                refuses.
        """
        valid = _real_tokens(input_ids, attention_mask)
        positions = None
        if position_ids is not None:
            positions = check_positions(position_ids, valid, attention_mask is not None)
        packed = positions is not None and is_packed(positions, valid)
        targets, counted = _next_tokens(input_ids, valid, labels, positions if packed else None)
        return cls(input_ids, valid, targets, counted, positions, packed, attention_mask)

    def check_values(self, vocabulary: int) -> None:
        """Read what :meth:`of` does not: the ids and the mask themselves.

        Args:
            vocabulary: rows of the embedding; ids are in [0, vocabulary).

        Raises:
            InvalidInputError: an id outside the vocabulary, a mask of other values than 0 and 1.
        """
        check_ids(self.input_ids, vocabulary)
        mask = self.attention_mask
        if mask is not None and not torch.equal(self.valid.to(mask.dtype), mask):
            raise InvalidInputError(
                "attention_mask: found values other than 0 and 1; give 1 at real tokens and 0 at "
                "padding"
            )

    def part(self, select: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of what ``select`` takes out of every ``[B, T]`` tensor: windows, or rows."""
        return replace(
            self,
            input_ids=select(self.input_ids),
            valid=select(self.valid),
            targets=select(self.targets),
            counted=select(self.counted),
            positions=None if self.positions is None else select(self.positions),
            attention_mask=None,
        )

    def up_to(self, positions: Tensor | Iterable[int]) -> tuple[Batch, Tensor]:
        """The batch without the tokens after the last chosen one, which no chosen one can see.

        Args:
            positions: see :func:`chosen_positions`, which also says what is refused.

        Returns:
            The batch of n tokens a row, and ``[B, n]`` bool, which of them were chosen.
        """
        chosen = chosen_positions(positions, self.valid)
        end = int(chosen.any(0).nonzero().max()) + 1
        return self.part(lambda values: values[:, :end]), chosen[:, :end]

    def forward_inputs(self, parameters: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of a model's forward, for its logits and nothing besides.

        Packed rows get no attention mask: without one transformers keeps their documents apart.
        What a config may ask for in training (the routers' own loss) is left out.

        Args:
            parameters: names that the forward takes.
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids}
        if not self.packed:
            inputs["attention_mask"] = self.valid.long()
        if "position_ids" in parameters:
            inputs["position_ids"] = (
                position_ids_of(self.valid) if self.positions is None else self.positions
            )
        for extra in ("use_cache", "output_router_logits"):
            if extra in parameters:
                inputs[extra] = False
        return inputs


def _real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``[B, T]`` bool, True at real tokens; nothing is read from the device."""
    check_is_tensor(input_ids)
    if input_ids.dim() != 2:
        found = tuple(input_ids.shape)
        row = "; pass one row as input_ids[None]" if input_ids.dim() == 1 else ""
        raise InvalidInputError(f"input_ids: found {found}, expected a tensor of shape [B, T]{row}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InvalidInputError(f"input_ids: found {input_ids.dtype}, expected int64 or int32")
    if input_ids.numel() == 0:
        raise InvalidInputError(
            f"input_ids: found shape {tuple(input_ids.shape)}, no token in it; give at least one"
        )
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    check_same_shape("attention_mask", attention_mask, input_ids)
    return attention_mask.to(torch.bool)


def check_is_tensor(input_ids: Any) -> None:
    """Raise :class:`InvalidInputError` if ids are no tensor, before anything is asked of them."""
    if not isinstance(input_ids, Tensor):
        inside = isinstance(input_ids, Mapping) and "input_ids" in input_ids  # of a tokenizer
        instead = 'what it holds under "input_ids"' if inside else "torch.tensor(input_ids)"
        if isinstance(input_ids, str):
            instead = 'tokenizer(text, return_tensors="pt")["input_ids"]'
        raise InvalidInputError(
            f"input_ids: found {type(input_ids).__name__}, expected a tensor of shape [B, T]; pass "
            f"{instead}"
        )


def check_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Raise :class:`InvalidInputError` for ids that a model of so many tokens does not have."""
    low, high = torch.stack(torch.aminmax(input_ids)).tolist()
    if low < 0 or high >= vocabulary:
        raise InvalidInputError(
            f"input_ids: found ids from {low} to {high}, allowed are 0 to {vocabulary - 1} "
            "(the model's vocabulary); is the tokenizer the model's own? After adding tokens to it "
            "call model.resize_token_embeddings(len(tokenizer))"
        )


def check_same_shape(name: str, values: Tensor, input_ids: Tensor) -> None:
    """Raise :class:`InvalidInputError` if ``values`` is no tensor of the shape of the ids."""
    found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    if not isinstance(values, Tensor) or values.shape != input_ids.shape:
        raise InvalidInputError(
            f"{name}: found {found}, expected a tensor of the shape of input_ids, "
            f"{tuple(input_ids.shape)}"
        )


def chosen_positions(positions: Tensor | Iterable[int], valid: Tensor) -> Tensor:
    """``[B, T]`` bool, which real tokens were chosen.

    Args:
        positions: ``[B, T]`` of bool, or of 0 and 1; or integers, the same positions of every
            sequence, of which negative ones count from its last real token.
        valid: ``[B, T]`` bool.

    Raises:
        InvalidInputError: another shape or type, a position that there is not, or no real token.
    """
    if isinstance(positions, Tensor) and (positions.dim() != 1 or positions.dtype == torch.bool):
        check_same_shape("positions", positions, valid)
        chosen = positions.to(valid.device).bool()
        if not torch.equal(chosen.to(positions), positions):
            raise InvalidInputError(
                "positions: found numbers other than 0 and 1 in a [B, T] mask; give a mask of "
                "bool, or numbers of positions in one dimension"
            )
    else:
        chosen = _at_numbers(positions, valid)
    chosen = chosen & valid
    if not bool(chosen.any()):
        raise InvalidInputError(
            "positions: found no real token among them; choose at least one that is not padding"
        )
    return chosen


def _at_numbers(positions: Iterable[int], valid: Tensor) -> Tensor:
    """``[B, T]`` bool, True at these positions of every sequence ``[B, T]``."""
    length = valid.shape[1]
    try:
        found = [as_integer(each) for each in positions]
    except TypeError:  # nothing that has elements
        found = [None]
    numbers = [number for number in found if number is not None]
    if len(numbers) < len(found):
        raise InvalidInputError(
            f"positions: found {positions!r}, allowed are a [B, T] tensor of bool, or a list of "
            "integers"
        )
    for number in numbers:
        if not -length <= number < length:
            raise InvalidInputError(
                f"positions: found {number}, allowed are {-length} to {length - 1}"
            )
    wanted = torch.tensor(numbers, dtype=torch.int64, device=valid.device)
    places = torch.where(wanted < 0, ends_of(valid)[:, None] + wanted, wanted)
    rows = torch.arange(len(valid), device=valid.device)[:, None].expand_as(places)
    there = places >= 0  # a short row has no 64th token from its end
    chosen = torch.zeros_like(valid)
    chosen[rows[there], places[there]] = True
    return chosen


def ends_of(valid: Tensor) -> Tensor:
    """``[B]``, the number of the position after each row's last real token ``[B, T]``."""
    return valid.shape[1] - valid.flip(1).int().argmax(1)


def check_length(longest: int, allowed: int | None, what: str = "input_ids") -> None:
    """Raise :class:`InvalidInputError` if a sequence has more tokens than a model has positions.

    Args:
        longest: real tokens of the longest sequence.
        allowed: learned positions of the model; None where positions are computed.
        what: where the length comes from.
    """
    if allowed is not None and longest > allowed:
        raise InvalidInputError(
            f"{what}: found sequences of {longest} tokens, allowed are at most {allowed}, the "
            "positions that the model learned; take shorter ones"
        )


def position_ids_of(valid: Tensor) -> Tensor:
    """``[B, T]``: 0 at each row's first real token, so that left padding changes no prediction."""
    return (valid.long().cumsum(-1) - 1).clamp_min(0)


def documents_of(positions: Tensor) -> Tensor:
    """``[B, T]`` number of the document that each token of a packed row belongs to.

    A document begins where a position does not follow on the one before it.
    """
    starts = torch.zeros_like(positions, dtype=torch.long)
    starts[:, 1:] = (positions.diff(dim=-1) != 1).long()
    return starts.cumsum(-1)


def is_packed(positions: Tensor, valid: Tensor) -> bool:
    """Whether positions ``[B, T]`` start anew between two real tokens of a row."""
    return bool(((positions.diff(dim=-1) != 1) & valid[:, 1:] & valid[:, :-1]).any())


def check_positions(positions: Tensor, valid: Tensor, masked: bool) -> Tensor | None:
    """Return position ids that differ from the usual ones, or None where they do not.

    Args:
        positions: ``[B, T]`` or ``[1, T]`` integers; those of packed rows start anew with every
            document, as ``DataCollatorWithFlattening`` makes them.
        valid: ``[B, T]`` bool.
        masked: whether an attention mask was given with them.

    Raises:
        InvalidInputError: wrong shape, type or sign, or packed rows with padding or with a mask,
            in which transformers does not keep documents apart.
    """
    if isinstance(positions, Tensor) and positions.shape == (1, valid.shape[1]):
        positions = positions.expand_as(valid)
    check_same_shape("position_ids", positions, valid)
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise InvalidInputError(f"position_ids: found {positions.dtype}, expected integers")
    if bool((positions[valid] < 0).any()):
        raise InvalidInputError(
            "position_ids: found negative ones at real tokens, allowed are integers from 0"
        )
    positions = positions.long()
    if is_packed(positions, valid) and (masked or not bool(valid.all())):
        raise InvalidInputError(
            "position_ids: they start anew inside a row (packed documents), and an attention mask "
            "was given. transformers keeps packed documents apart only without one; leave it out "
            "and pack without padding, or give each document a row of its own"
        )
    usual = torch.equal(positions[valid], position_ids_of(valid)[valid])
    return None if usual else positions.masked_fill(~valid, 0)


def check_finite(tensor: Tensor, what: str, valid: Tensor | None = None) -> None:
    """Raise :class:`NonFiniteError` if ``tensor`` (at the valid ``[B, T]`` only) is not finite."""
    # One pass: a sum is finite only if all of it is, but for an overflow, which the rest sorts out.
    if bool(torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))):
        return
    finite = torch.isfinite(tensor)
    if valid is not None:
        finite = finite.flatten(2).all(-1) | ~valid if tensor.dim() > 2 else finite | ~valid
    if not bool(finite.all()):
        counted = tensor if valid is None else tensor[valid]
        wrong = int((~torch.isfinite(counted)).sum())
        raise NonFiniteError(
            f"{what}: {wrong} of {counted.numel()} values are NaN or infinite. {_NOT_FINITE}"
        )


def require_finite(finite: Tensor, what: str) -> None:
    """Raise :class:`NonFiniteError` unless a run that did not look itself says ``finite``."""
    if not bool(finite):
        raise NonFiniteError(f"{what} are NaN or infinite. {_NOT_FINITE}")


def _next_tokens(
    input_ids: Tensor, valid: Tensor, labels: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Targets and which positions count, see :class:`Batch`; positions are those of packed rows."""
    if labels is not None:
        check_same_shape("labels", labels, input_ids)
    target = torch.full_like(input_ids, -100)
    target[:, :-1] = (input_ids.masked_fill(~valid, -100) if labels is None else labels)[:, 1:]
    if labels is None and positions is not None:  # the next token is another document's first
        last = documents_of(positions).diff(dim=-1) != 0
        target[:, :-1] = target[:, :-1].masked_fill(last, -100)
    target = target.masked_fill(~valid, -100)
    # Without labels the last token's prediction is as good as any, though its target is unknown.
    return target, valid if labels is None else target >= 0
