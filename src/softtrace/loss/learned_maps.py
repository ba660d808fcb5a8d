"""Learning the maps of early exits while a model is trained, by an optimiser of their own.

Maps are no weights of the model: the optimiser, the clipping and the gradient scaler of a training
never meet them. Adam is used, which does not mind whether gradients are summed or averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, distributed, nn

from softtrace.errors import TrainerSetupError
from softtrace.graph.importance import working_dtype
from softtrace.loss.options import DensityOptions
from softtrace.model.exit_maps import ExitMaps, exit_maps_of, name_of, set_exit_maps
from softtrace.processes import in_group
from softtrace.tracing.instrument import Instrument

_RATE = 1e-3


class LearnedMaps:
    """The maps of a model's exits, which it is given here, and what learns them.

    Args:
        model: a causal language model; maps that it has already are learned on.
        depths: after how many layers its exits are.
        width: d_model.
        dtype: of the maps.
    """

    def __init__(
        self, model: nn.Module, depths: range, width: int, dtype: torch.dtype = torch.float32
    ) -> None:
        known = exit_maps_of(model)
        if known is not None and all(known.weight(depth) is not None for depth in depths):
            self.maps = known
        else:
            self.maps = ExitMaps(depths, width, dtype=dtype)
            set_exit_maps(model, self.maps)
        self._optimiser = torch.optim.AdamW(self.maps.parameters(), _RATE, weight_decay=0.0)
        self._copies: dict[str, Tensor] = {}
        self._step = -1

    @classmethod
    def of(cls, instrument: Instrument, options: DensityOptions) -> LearnedMaps | None:
        """The maps of a model that was attached; None where it has no exit."""
        layers = len(instrument.anatomy.layers)
        if layers < 2:
            return None
        low, high = options.exit_bounds(layers)
        read = instrument.anatomy.output_weight(0)
        depths = range(low, high + 1)
        return cls(instrument.model, depths, read.shape[-1], working_dtype(read.dtype))

    def read(self, hidden: Tensor, depth: int) -> Tensor:
        """A stream as the final norm reads it, see :class:`softtrace.model.exit_maps.ExitMaps`.

        Gradients reach a copy of the map: those of the map itself are collected apart from the
        training's own, and it may be changed before the training's backward pass comes.
        """
        name = name_of(depth)
        if name not in self._copies:
            own = self.on(hidden.device).weights[name]
            self._copies[name] = own.detach().clone().requires_grad_()
        read: Tensor = self.maps(hidden, depth, self._copies[name])
        return read

    def begin(self, step: int) -> None:
        """Let the maps learn what was collected, unless that was of this step too.

        Batches that are accumulated into one step are read through the same maps.
        """
        if step != self._step and any(each.grad is not None for each in self.maps.parameters()):
            self.on(next(self.maps.parameters()).device)  # where the model is by now
            self._optimiser.step()
            self._optimiser.zero_grad()
        self._copies.clear()  # of a batch that failed before its gradients were collected
        self._step = step

    def collect(
        self,
        device: torch.device,
        distance: Tensor | None,
        known: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a batch's gradients of the maps, over all processes, which all have to call.

        Args:
            device: of the batch. Maps through which nothing was read yet come to it, for processes
                on GPUs have no way to add up what lies elsewhere.
            distance: mean distance of the batch's exits with a graph, which is kept; None where
                there is none in this process.
            known: gradients by maps, by their names, where these are there already.
        """
        copies, self._copies = self._copies, {}
        together = in_group()
        if distance is None and not together:
            return
        found: dict[str, Tensor] = {}
        if known is not None:
            found = dict(known)
        elif distance is not None and copies:
            gradients = torch.autograd.grad(distance, list(copies.values()), retain_graph=True)
            found = dict(zip(copies, gradients, strict=True))
        if together and not found:
            self.on(device)
        for name, own in self.maps.weights.items():
            read = found.get(name)
            added = torch.zeros_like(own) if read is None else read.to(own)
            if together:
                distributed.all_reduce(added)
            # Nothing is read from the device: what is not finite counts as nothing.
            added = added.nan_to_num(0.0, 0.0, 0.0)
            own.grad = added if own.grad is None else own.grad + added

    def on(self, device: torch.device) -> ExitMaps:
        """The maps, moved with all that learns them to where the model is by now."""
        states = self._optimiser.state.values()
        averages = [value for state in states for key, value in state.items() if key != "step"]
        if any(each.device != device for each in (*self.maps.parameters(), *averages)):
            kept = self.state()
            self.maps.to(device)
            self.load(kept)
        return self.maps

    def state(self) -> dict[str, Tensor]:
        """What a resumed training starts from, on the CPU; alike in all processes."""
        kept = {"step": torch.tensor(self._step)}
        for name, own in self.maps.weights.items():
            kept[name] = own.detach()
            if own.grad is not None:
                kept[f"{name}.grad"] = own.grad
            for key, value in self._optimiser.state.get(own, {}).items():
                kept[f"{name}.{key}"] = value
        return {name: value.detach().to("cpu", copy=True) for name, value in kept.items()}

    def load(self, kept: Mapping[str, Tensor]) -> None:
        """Resume from a :meth:`state`.

        Raises:
            TrainerSetupError: it is of other exits.
        """
        names = {name.partition(".")[0] for name in kept} - {"step"}
        if names != set(self.maps.weights):
            raise TrainerSetupError(
                f"checkpoint: found maps of exits {_listed(names)}, this run has "
                f"{_listed(self.maps.weights)}; resume with the exit_depths it was started with"
            )
        self._step = int(kept["step"])
        for name, own in self.maps.weights.items():
            its = {
                key.partition(".")[2]: value
                for key, value in kept.items()
                if key.startswith(f"{name}.")
            }
            own.data.copy_(kept[name])
            gradient = its.pop("grad", None)
            own.grad = None if gradient is None else gradient.to(own, copy=True)
            self._optimiser.state[own] = {
                key: value.clone() if key == "step" else value.to(own, copy=True)
                for key, value in its.items()
            }


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
