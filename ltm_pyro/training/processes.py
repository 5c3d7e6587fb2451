"""Several processes that train one model, as `torchrun` starts them: each has a part of every batch.

Gradients are averaged by `DistributedDataParallel`. All else that the processes tell each other (that one was asked to
stop, sums, errors) goes through :meth:`Processes.gather`, which all of them must call the same number of times in the
same order: so nothing that only one of them knows may decide whether another calls it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ltm_pyro.errors import InputError, RunError

Value = TypeVar("Value")


class _Left:
    """The last that a process says that cannot go on."""


@dataclass(frozen=True)
class Processes:
    """Those that train together, seen from one of them; by default it is alone."""

    rank: int = 0
    """Its number."""
    size: int = 1
    """How many there are."""
    group: Any = None
    """What they talk over, on CPUs; None if it is alone."""

    @property
    def is_first(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in the order of their ranks; any that can be pickled.

        Raises:
            SystemExit: if another process has left.
        """
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, self.group)
        if any(isinstance(other, _Left) for other in values) and not isinstance(value, _Left):
            raise SystemExit(1)
        return values

    def by_all(self, function: Callable[[], Value]) -> Value:
        """What a function returns that every process calls; where one of them cannot, all end.

        Raises:
            InputError: in the first process, if the function raised it in any.
            SystemExit: in the others, so that the error is printed once.
        """
        value, error = None, None
        try:
            value = function()
        except InputError as raised:
            error = str(raised)
        found = [other for other in self.gather(error) if other is not None]
        if found and not self.is_first:
            raise SystemExit(2)
        if found:
            raise InputError(found[0])
        return value  # type: ignore[return-value]

    def by_first(self, function: Callable[[], Value]) -> Value:
        """What a function returns that the first process alone calls; any value that can be pickled.

        Raises:
            InputError, SystemExit: as :meth:`by_all`.
        """
        value = self.by_all(lambda: function() if self.is_first else None)
        return self.gather(value)[0]  # type: ignore[return-value]

    def take_gpu(self) -> None:
        """Use the GPU of this machine that has this process's number on it.

        Raises:
            InputError: if the machine has fewer GPUs than processes.
        """
        if self.group is None:
            return
        local_rank, num_devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_devices:
            raise InputError(
                f"there is no GPU for process {local_rank} of this machine, which has {num_devices}: start fewer, or "
                "use --device cpu"
            )
        torch.cuda.set_device(local_rank)

    def synchronised(self, model: nn.Module) -> nn.Module:
        """The model, whose backward pass averages the gradients over the processes; all get the first one's weights."""
        return model if self.group is None else DistributedDataParallel(model, gradient_as_bucket_view=True)


def accumulating(synchronised: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A block whose gradients are added up in each process, and averaged in the next backward pass behind it."""
    return synchronised.no_sync() if isinstance(synchronised, DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes that this one was started with; they part at the end of the block.

    All but the first print nothing on standard output.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        yield Processes()
        return
    # NCCL for gradients on GPUs; without one of the two names, each kind of device has its own.
    distributed.init_process_group()
    processes = Processes(distributed.get_rank(), distributed.get_world_size(), distributed.new_group(backend="gloo"))
    with contextlib.ExitStack() as stack:
        if not processes.is_first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield processes
        except (OSError, RunError):
            # Perhaps of what the first process alone writes: the others wait for it.
            processes.gather(_Left())
            if processes.is_first:
                raise
            raise SystemExit(1) from None
        finally:
            # After any other error they wait for each other for ever.
            if isinstance(sys.exception(), (InputError, OSError, RunError, SystemExit, NoneType)):
                distributed.destroy_process_group()
