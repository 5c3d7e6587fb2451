"""Work that is done again and again on a GPU, as a CUDA graph.

Where kernels are short, the host takes longer to start them than the device to run them. A graph is recorded once and
started as a whole. It repeats the kernels that it was recorded from, on the same addresses: so the work must change
nothing but tensors, in place, and ask the device for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

Work = Callable[[], None]

WORTH_A_GRAPH = 64
"""The number of times from which on work is recorded. An estimate: what it saves on a GPU has not been measured."""
NUM_WARM_UPS = 3
"""The number of times that work is done before it is recorded: libraries prepare themselves when they are first used,
which a graph must not contain."""


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream to record in, as nothing can be recorded in the one that everything runs in by default.

    There is one for all graphs: libraries keep memory for each stream that they have been used in.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # as all of torch's


class Graphed:
    """Work on a CUDA device, recorded as a graph after some times."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work = work
        self.num_done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.side = _side_stream(device)

    def __call__(self) -> None:
        """Do the work once more."""
        if self.num_done < NUM_WARM_UPS:
            self._beside()
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):
                    self.work()  # is recorded, and not done
            self.graph.replay()
        self.num_done += 1

    def _beside(self) -> None:
        usual = torch.cuda.current_stream(self.side.device)
        self.side.wait_stream(usual)
        with torch.cuda.stream(self.side):
            self.work()
        usual.wait_stream(self.side)


def repeated(work: Work, num_times: int, device: torch.device) -> Work:
    """Work on this device that will be done so many times: as a graph where that pays, and as it is elsewhere."""
    return Graphed(work, device) if device.type == "cuda" and num_times >= WORTH_A_GRAPH else work
