"""What a step runs as compiled functions: traced operation by operation, then fused.

A compiler that reads Python meets hooks, context variables and a second run of the same modules in
masked runs. What they compute is a fixed list of tensor operations all the same, backward pass
included, for no shape follows from a value: ``make_fx`` writes it down while it runs once, and
``torch.compile`` fuses the list. Layers repeat, and a compiler that is given 30 of them at once
takes many minutes; so the list is cut where it repeats, and what is equal is compiled once.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.split_module import split_module

Tensors = Sequence[Tensor | None]


class Like(NamedTuple):
    """What a tensor is like, without its memory."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, each: Tensor) -> Like:
        """What this tensor is like."""
        return cls(each.shape, each.dtype, each.device)

    def new(self) -> Tensor:
        """Memory of its own, contiguous, in which nothing is written yet."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class Run(Protocol):
    """A function of tensors that lie where they are, to be called again and again."""

    def __call__(self, into: Tensors | None = None) -> Tensors:
        """What it gives, always None at the same places.

        Args:
            into: tensors, and None at those places. The function may write what it gives there, as
                soon as that is complete, and give these. Without it, it makes new ones.
        """


_REPEATED = re.compile("(.{50,2000}?)\\1{2,}", re.DOTALL)
"""A pattern of so many operations that comes three times or more, one after the other."""


@torch.library.custom_op("softtrace::cut", mutates_args=())
def cut(values: Tensor) -> Tensor:
    """The same values; what is fused is cut here, and what comes after runs after what came before.

    A compiler orders operations anew, and of pieces that do not need one another it makes the large
    tensors of all before it is done with those of the first.
    """
    return values.clone()


def fused(
    run: Callable[[Sequence[Tensor]], Tensors], inputs: Sequence[Tensor], backend: str = "inductor"
) -> Run:
    """A function without inputs: what ``run(inputs)`` gives, from the inputs as they are then.

    It writes all that it gives as soon as that is complete.

    Args:
        run: of tensors of the inputs' shapes; may take gradients inside. Shapes and Python values
            must not follow from what the tensors hold.
        inputs: read in place at every call; gradients do not reach them.
        backend: of ``torch.compile``.
    """
    given = list(inputs)
    # A compiled model that runs as it is written, as in runs of ours, refuses to be traced.
    with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        traced = make_fx(lambda tensors: run(tensors))(given)  # it counts the arguments
    leave_out_detached(traced)
    likes = write_into_arguments(traced)
    parts = cut_where_it_repeats(traced)
    compiled: dict[str, Any] = {}
    for name, part in list(parts.named_children()):
        assert isinstance(part, fx.GraphModule)
        shape = _written(part)
        if shape not in compiled:
            compiled[shape] = torch.compile(part, fullgraph=True, dynamic=False, backend=backend)
        setattr(parts, name, compiled[shape])

    def call(into: Tensors | None = None) -> Tensors:
        if into is None:
            into = [each if each is None else each.new() for each in likes]
        # What autocast does is among the operations already.
        autocast_off = torch.autocast(given[0].device.type, enabled=False)
        # Around runs of ours a compiled model runs as it is written, and so would this.
        with torch.no_grad(), autocast_off, torch.compiler.set_stance("default"):
            parts(*given, *(each for each in into if each is not None))
        return into

    return call


def leave_out_detached(traced: fx.GraphModule) -> None:
    """Read a tensor itself in place of its detached alias: what is traced has no gradients.

    Every weight is detached first, which would be a long row of equal operations.
    """
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        traced.graph.erase_node(node)


def write_into_arguments(traced: fx.GraphModule) -> list[Like | None]:
    """Let a function write what it gives into further arguments, each as soon as it is complete.

    So nothing that it gives is held until its end.

    Args:
        traced: gives a list of tensors and None, later an empty one.

    Returns:
        What the further arguments have to be like, and None where None was given.
    """
    graph = traced.graph
    *_, last = graph.find_nodes(op="placeholder")
    (output,) = graph.find_nodes(op="output")
    found = list(output.args[0])
    for place, each in enumerate(found):
        if each is not None:
            with graph.inserting_after(last):
                last = graph.placeholder(f"into_{place}")
            with graph.inserting_after(last if each.op == "placeholder" else each):
                graph.call_function(torch.ops.aten.copy_.default, (last, each))
    output.args = ([],)
    traced.recompile()
    return [each if each is None else Like.of(each.meta["val"]) for each in found]


def cut_where_it_repeats(traced: fx.GraphModule) -> fx.GraphModule:
    """The same function as calls of parts, each of which is one of a row of equal ones, or between.

    It is also cut at every :func:`cut`, which goes.

    Args:
        traced: operations on tensors alone, in the order in which they run.
    """
    operations: list[fx.Node] = []
    told = []
    for node in list(traced.graph.nodes):
        if node.target is torch.ops.softtrace.cut.default:
            told.append(len(operations))
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif node.op.startswith("call"):
            operations.append(node)
    letters: dict[str, str] = {}
    text = "".join(letters.setdefault(str(node.target), chr(len(letters))) for node in operations)
    cuts = [
        match.start() + number * len(match[1])
        for match in _REPEATED.finditer(text)
        for number in range(len(match[0]) // len(match[1]) + 1)
    ]
    cuts = sorted(told + cuts)
    part = {node: bisect(cuts, place) for place, node in enumerate(operations)}
    return split_module(traced, traced, part.__getitem__, keep_original_order=True)


def _written(part: fx.GraphModule) -> str:
    """What a part computes, equal for equal ones: its operations without their names.

    What is read has its shape there: a function that is called with many is compiled for each, and
    refused after eight.
    """
    number = {node: f"%{place}" for place, node in enumerate(part.graph.nodes)}
    lines = []
    for node in part.graph.nodes:
        read = fx.map_arg((node.args, node.kwargs), number.__getitem__)
        # A constant is equal to itself alone; what is read has the place of its argument.
        target = "" if node.op in ("placeholder", "output") else node.target
        if node.op == "get_attr":
            target = id(getattr(part, node.target))
        if node.op == "placeholder" and isinstance(value := node.meta.get("val"), Tensor):
            target = f"{value.dtype} {tuple(value.shape)} {value.stride()}"
        lines.append(f"{node.op} {target} {read if node.op != 'placeholder' else ''}")
    return "\n".join(lines)
