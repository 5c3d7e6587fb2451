"""Several processes that train one model, as `torchrun` starts them: each has a part of every batch.

Gradients are averaged by `DistributedDataParallel`, or by `sharded.py` where weights are split. All else that the
processes tell each other (that one was asked to stop, sums, errors) goes through :meth:`Processes.gather`, which all of
them must call the same number of times in the same order. So what only one of them knows must never decide whether it
is called.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not listed by torch
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ltm_pyro.errors import InputError, RunError, WriteError

Value = TypeVar("Value")


class _Left:
    """The last value that a process sends before it ends with an error."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as one of them sees them. By default there is only one."""

    rank: int = 0
    """The number of this process, from 0."""
    size: int = 1
    """The number of processes."""
    group: Any = None
    """The group through which they communicate on CPUs; None if there is only one process."""
    patient_group: Any = None
    """The same, for what may take hours."""
    local_rank: int = 0
    """The number of this process on its machine, from 0."""
    local_size: int = 1
    """The number of processes on its machine."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def patient(self) -> Processes:
        """The same processes, which wait for each other for up to a day instead of half an hour."""
        return replace(self, group=self.patient_group)

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in the order of their ranks. A value must be picklable.

        Raises:
            SystemExit: if another process has ended with an error.
        """
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, self.group)
        if any(isinstance(other, _Left) for other in values) and not isinstance(value, _Left):
            raise SystemExit(1)
        return values

    def by_all(self, function: Callable[[], Value]) -> Value:
        """Call a function in every process, and return its result. If it fails in one of them, all end.

        Raises:
            InputError: in the first process, if the function raised it in any process.
            SystemExit: in the others, so that the error is printed once.
            WriteError: in all processes, if the function raised it in any.
        """
        value, error = None, None
        try:
            value = function()
        except (InputError, WriteError) as raised:
            error = raised
        found = [other for other in self.gather(error) if other is not None]
        if found and isinstance(found[0], InputError) and not self.is_first:
            raise SystemExit(2)
        if found:
            raise found[0]
        return value  # type: ignore[return-value]

    def by_first(self, function: Callable[[], Value]) -> Value:
        """Call a function in the first process alone, and return its result, which must be picklable, in all of them.

        Raises:
            InputError, SystemExit, WriteError: as :meth:`by_all`.
        """
        value = self.by_all(lambda: function() if self.is_first else None)
        return self.gather(value)[0]  # type: ignore[return-value]

    def require_gpus(self) -> None:
        """Check that each process of this machine has a GPU of its own, which :func:`joined` has taken.

        Raises:
            InputError: if the machine has fewer GPUs than processes.
        """
        if self.group is not None and _gpu_of_its_own() is None:
            raise InputError(
                f"this machine has {torch.cuda.device_count()} GPUs for {self.local_size} processes: "
                "start fewer processes, or use --device cpu"
            )

    def synchronised(self, model: nn.Module) -> nn.Module:
        """The model with the first process's weights, whose backward pass averages gradients over the processes."""
        return model if self.group is None else DistributedDataParallel(model, gradient_as_bucket_view=True)


def is_restarted() -> bool:
    """Whether torchrun has started the processes again after one of them failed (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _gpu_of_its_own() -> torch.device | None:
    """The GPU whose number is that of this process on its machine; None where there are more processes than GPUs."""
    return None if _num_local() > torch.cuda.device_count() else torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _num_local() -> int:
    """The number of processes on this machine, as far as it is known: torchrun says it, other launchers may not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", int(os.environ.get("LOCAL_RANK", 0)) + 1))


def _place_to_meet() -> dict[str, Any]:
    """Where processes of one machine that were started again find each other.

    Torchrun gives them the store of those that failed, where some would find addresses that nobody has any more. On
    several machines the number of restarts need not be the same.
    """
    if not is_restarted() or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, rank, size = next(rendezvous("env://"))
    prefix = f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return {"store": PrefixStore(prefix, store), "rank": rank, "world_size": size}


@contextlib.contextmanager
def joined(uses_gpu: bool) -> Iterator[Processes]:
    """The processes that this one was started with. They disconnect at the end of the block.

    All but the first print nothing on standard output.

    Args:
        uses_gpu: whether to train on GPUs, where each process of a machine can have one of its own.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        yield Processes()
        return
    gpu = _gpu_of_its_own() if uses_gpu else None
    if gpu is not None:  # first of all: what is made before would be on the first GPU, in each process
        torch.cuda.set_device(gpu)
    # No backend is named, so that each kind of device has its own: NCCL for gradients on GPUs, gloo on CPUs.
    distributed.init_process_group(device_id=gpu, **_place_to_meet())
    processes = Processes(
        rank=distributed.get_rank(),
        size=distributed.get_world_size(),
        group=distributed.new_group(backend="gloo"),
        patient_group=distributed.new_group(backend="gloo", timeout=timedelta(days=1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_size=_num_local(),
    )
    with contextlib.ExitStack() as stack:
        if not processes.is_first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield processes
        except (OSError, RunError):
            # The error may be that of a file that the first process alone writes; the others are waiting for it.
            processes.gather(_Left())
            if processes.is_first:
                raise
            raise SystemExit(1) from None
        finally:
            # After any other error the processes would wait for each other for ever.
            if isinstance(sys.exception(), (InputError, OSError, RunError, SystemExit, NoneType)):
                distributed.destroy_process_group()
