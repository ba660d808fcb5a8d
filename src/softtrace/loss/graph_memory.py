"""The memory that captured functions work in: one for all graphs of a density term.

A graph keeps the memory that it was captured with, and a graph of its own memory keeps it from
everybody else, although graphs are replayed one after the other. So all of them work in the same
memory, which is as large as the largest needs, and what is read after a replay lies outside of it.
"""

from __future__ import annotations

import torch

from softtrace.collecting import none_collected
from softtrace.loss.fused import Like, Run, Tensors


class GraphMemory:
    """What the graphs of one density term work in.

    They may be replayed in any order, on one stream.
    """

    def __init__(self) -> None:
        # By device, the newest graph, which keeps the memory alive, and the stream of its capture:
        # what is free in the memory is free for that stream alone.
        self._known: dict[int, tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]] = {}

    def capture(self, run: Run) -> tuple[torch.cuda.CUDAGraph, Tensors]:
        """A graph of a function on the current device, and where each replay writes what it gives.

        Args:
            run: that is called twice. What it does not write where it is told is copied there.

        Raises:
            RuntimeError: the function does something that cannot be captured.
        """
        device = torch.cuda.current_device()
        # What is allocated here stays, and should not lie in the midst of what others allocate and
        # free at every step.
        torch.cuda.empty_cache()
        graph, stream = self._known.get(device, (None, None))
        stream = torch.cuda.Stream() if stream is None else stream  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate what they need at their first call
            likes = [each if each is None else Like.of(each) for each in run()]
        torch.cuda.current_stream().wait_stream(stream)
        # Not what that call gave, which lies in the midst of what it needed and held on to that.
        found = [each if each is None else each.new() for each in likes]
        new = torch.cuda.CUDAGraph()
        pool = None if graph is None else graph.pool()
        try:
            # A capture that fails does not give the stream back that it switched to. Other threads
            # (of a DataLoader, say) may allocate meanwhile.
            with (
                none_collected(),
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(new, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                _write(run(found), found)
        except BaseException:
            _end_capture_of_random_numbers()
            self._known.pop(device, None)  # its memory may still wait for the end of this capture
            raise
        self._known[device] = new, stream
        return new, found


def _write(given: Tensors, into: Tensors) -> None:
    """Copy what does not lie there yet."""
    for each, own in zip(given, into, strict=True):
        if each is not own:
            if each is None or own is None:
                raise RuntimeError("a function gives None at one call and a tensor at another")
            own.copy_(each)


def _end_capture_of_random_numbers() -> None:
    """A capture that failed leaves the generator waiting for its end, and refuses every draw."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())
