"""``softtrace inspect``: how a model is taken apart, what was verified, how many edges it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from softtrace.anatomy.anatomy import LayerModules
from softtrace.anatomy.norms import LinearNorm
from softtrace.checks import check_least
from softtrace.graph.batch import check_length
from softtrace.graph.edges import EDGE_KINDS
from softtrace.graph.sizes import edge_counts
from softtrace.model.devices import device_of_module
from softtrace.model.hooks import Hook, registered
from softtrace.model.loading import dtype_name, load_model
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument

_LENGTH = 128


def inspect(model: str, length: int | None = None, dtype: str = "float32") -> dict[str, Any]:
    """Load a model, prove that it is the sum of its edges, and describe how.

    Args:
        model: Model directory (safetensors) or hub name.
        length: Number of tokens of the sequence whose edges are counted, for its last token; None
            for 128, or as many positions as the model learned.
        dtype: Number format of the weights: "float32", "bfloat16", "float16", or "auto" for the one
            that they were saved in.

    Returns:
        What :func:`describe` returns.

    Raises:
        ModelDirectoryError, UnsupportedModelError, InvalidInputError: the model or the length.
    """
    if length is not None:
        check_least("length", length, 1)
    network = load_model(model, dtype=dtype)  # an instrument does not keep its model alive
    instrument = attach(network)
    positions = instrument.anatomy.positions
    if length is None:
        length = _LENGTH if positions is None else min(_LENGTH, positions)
    return describe(instrument, length)


@torch.no_grad()
def describe(instrument: Instrument, length: int) -> dict[str, Any]:
    """Everything known of an attached model, in plain numbers and strings.

    Args:
        instrument: of the model.
        length: tokens of the sequence whose edges are counted.

    Returns:
        ``model``, ``pattern``, ``attention``, ``layers`` (ranges of equal ones), ``readout``,
        ``edges`` (of the last token, by kind), ``largest_mismatch``, ``verified`` (check to
        mismatch and bound).
    """
    network, anatomy = instrument.model, instrument.anatomy
    check_length(length, anatomy.positions, "length")
    names = {id(module): name for name, module in network.named_modules()}
    device = device_of_module(network)
    ids = torch.arange(length, device=device)[None] % anatomy.vocabulary
    with _progress(instrument, length):
        recording = instrument.record(instrument.batch(ids), keep_attention=False)
    last = torch.tensor([[length - 1]], device=device)
    counts = edge_counts(recording.importance.existing(), last)[0, 0].sum(0).tolist()
    verification, readout = instrument.verification, anatomy.readout
    after = readout.after.field
    return {
        "model": {
            "class": type(network).__name__,
            "type": getattr(network.config, "model_type", ""),
            "layers": len(anatomy.layers),
            "heads": anatomy.heads,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "dtype": dtype_name(next(network.parameters()).dtype),
        },
        "pattern": anatomy.pattern,
        "attention": {
            "interface": "through transformers' attention interface",
            "interception": "caught at the softmax of its own code",
        }[anatomy.route],
        "layers": list(_ranges([_layer(each, names) for each in anatomy.layers])),
        "readout": {
            "final_norm": _norm(readout.norm, names),
            "head": _named(readout.head, names),
            "logits": f"config.{after} = {readout.value:g}" if after else "as the head gives them",
        },
        "length": length,
        "edges": {
            **{kind: round(count) for kind, count in zip(EDGE_KINDS, counts, strict=True)},
            "total": round(sum(counts)),
        },
        "largest_mismatch": verification.largest,
        "verified": {
            check: {"mismatch": error, "allowed": verification.allowed[check]}
            for check, error in verification.errors.items()
        },
    }


@contextmanager
def _progress(instrument: Instrument, length: int) -> Iterator[None]:
    """Show how many layers have run, where that takes longer than a second."""
    layers = [each.layer for each in instrument.anatomy.layers]
    said = f"counting the edges of {length:,} tokens"
    with tqdm(total=len(layers), desc=said, unit="layer", delay=1) as bar:

        def ran(*_: Any) -> None:
            bar.update()

        with registered(Hook(layer, ran, before=False) for layer in layers):
            yield


def report(found: dict[str, Any]) -> str:
    """What :func:`describe` found, as text for a terminal."""
    model, edges = found["model"], found["edges"]
    lines = [
        f"{model['class']} ({model['type']}): {model['layers']} layers of {model['heads']} heads, "
        f"{model['parameters'] / 1e6:,.1f} M parameters, {model['dtype']}",
        "",
        f"residual pattern   {found['pattern']}",
        f"attention          {found['attention']}",
    ]
    for each in found["layers"]:
        lines.append(f"{each['layers']:<18} " + each["modules"][0])
        lines += [" " * 19 + line for line in each["modules"][1:]]
    readout = found["readout"]
    lines += [
        f"final norm         {readout['final_norm']}",
        f"head               {readout['head']}; logits {readout['logits']}",
        "",
        f"edges that can reach the last of {found['length']} tokens: {edges['total']:,}",
        *(f"  {kind:<18} {edges[kind]:>12,}" for kind in EDGE_KINDS),
        "",
        f"verified on tiny batches, largest mismatch {found['largest_mismatch']:.1e} "
        "(relative; allowed; check)",
        *(
            f"  {each['mismatch']:8.1e}  {each['allowed']:.0e}  {check}"
            for check, each in found["verified"].items()
        ),
    ]
    return "\n".join(lines)


def _layer(modules: LayerModules, names: dict[int, str]) -> list[str]:
    """What one layer consists of, by names relative to it."""
    base = f"{names[id(modules.layer)]}."
    short = {key: name.removeprefix(base) for key, name in names.items()}
    times = f", times {modules.attention_scale:g}" if modules.attention_scale != 1 else ""
    norm = modules.attention_norm
    after = "" if norm is None else f", then {_norm(norm, short)}"
    mlp_times = f", times {modules.mlp_scale:g}" if modules.mlp_scale != 1 else ""
    parts = " + ".join(_named(module, short) for module in modules.mlp_out)
    node = (
        "one node a token: attention and MLP add into it"
        if modules.parallel
        else "two nodes a token; the second is read by "
        + ", ".join(_named(module, short) for module in modules.middle)
    )
    return [
        f"attention: {_named(modules.attention, short)}",
        f"W_O: {_named(modules.projection, short)}{after}{times}",
        f"MLP: {parts}{mlp_times}",
        node,
    ]


def _named(module: nn.Module, names: dict[int, str]) -> str:
    return f"{names[id(module)]} ({type(module).__name__})"


def _norm(norm: LinearNorm, names: dict[int, str]) -> str:
    weight = "no weight" if norm.weight is None else norm.weight
    if norm.offset:
        weight += f" + {norm.offset:g}"
    centred = ", centred" if norm.centred else ""
    return f"{_named(norm.module, names)}, linear in {weight}{centred}"


def _ranges(layers: list[list[str]]) -> Iterator[dict[str, Any]]:
    """Runs of equal layers: ``{"layers": "layers 0-27", "modules": [...]}``."""
    start = 0
    for index in range(1, len(layers) + 1):
        if index == len(layers) or layers[index] != layers[start]:
            last = index - 1
            label = f"layer {start}" if last == start else f"layers {start}-{last}"
            yield {"layers": label, "modules": layers[start]}
            start = index
