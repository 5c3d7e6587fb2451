"""Weights that are split between processes, by torch's FSDP2 (`torch.distributed.fsdp.fully_shard`).

Between steps each process holds only its part of every weight, and of its gradient and moments. For a whole slow step
all processes hold all weights: the T fast steps and the backward passes use them many times. FSDP2's own hooks would
gather them in each call of a layer, and reduce gradients at the end of each layer's backward pass. Here neither fits:
layers are also used outside of their `forward`, and the encoder uses the embedding after the decoder is done with it.
So no module of the model has hooks. The modules that have them stand beside it, and hold the same weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

from ltm_pyro.models import LatentThoughtModel
from ltm_pyro.training.processes import Processes


class _Group(nn.Module):
    """Modules whose weights are gathered in one message. It computes nothing."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self) -> Tensor:
        return torch.zeros((), requires_grad=True)


class _Number:
    """A weight that is a single number: a `DTensor` as all others are between steps, but the same in each process."""

    def __init__(self, module: nn.Module, name: str, whole: nn.Parameter, mesh: DeviceMesh) -> None:
        self._module, self._name, self._mesh = module, name, mesh
        self.whole = whole
        self.part = nn.Parameter(self._of_each(whole.data))  # in the same memory

    def put(self, weight: nn.Parameter) -> None:
        """Let the module have it, whole or as it is between steps."""
        setattr(self._module, self._name, weight)

    def average_gradient(self) -> None:
        assert self.whole.grad is not None
        gradient = self.whole.grad / self._mesh.size()
        distributed.all_reduce(gradient)
        self.part.grad, self.whole.grad = self._of_each(gradient), None

    def _of_each(self, number: Tensor) -> DTensor:
        return DTensor.from_local(number, self._mesh, [Replicate()], run_check=False)


class ShardedWeights:
    """The weights of a model, which from now on are `DTensor`s, split along their first dimension.

    All processes must make it, and call its methods, in the same order.

    Args:
        model: the model; all processes get the first one's weights.
        processes: at least two.
    """

    def __init__(self, model: LatentThoughtModel, processes: Processes) -> None:
        weights = list(model.parameters())
        for weight in weights:
            distributed.broadcast(weight.data, 0)
        self._model, self._processes = model, processes
        mesh = init_device_mesh(weights[0].device.type, (processes.size,))
        # FSDP2 does not split a single number: every process holds it, beside parts of all others.
        self._numbers = [
            _Number(module, name, weight, mesh)
            for module in model.modules()
            for name, weight in module.named_parameters(recurse=False)
            if not weight.dim()
        ]
        ignored = {number.whole for number in self._numbers}
        decoder = model.decoder
        others = [part for part in model.children() if part is not decoder]
        others += [part for name, part in decoder.named_children() if name != "blocks"]
        # One message for each layer: its sent and its received copy are in memory beside all weights.
        groups = [*(_Group(block) for block in decoder.blocks), _Group(*others)]
        self._groups = [fully_shard(group, mesh=mesh, ignored_params=ignored) for group in groups]
        self._all = _Group(*groups)
        fully_shard(self._all, mesh=mesh, ignored_params=ignored)
        with torch.no_grad():
            self._all()  # FSDP2 takes the module that is called first for the root of the others
        self._take_back()
        assert all(isinstance(weight, DTensor) for weight in model.parameters()), "a weight is in no group"

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block, every process holds all weights, as ordinary tensors. Gradients that have not been averaged
        by its end are dropped, and so are changes of weights, but for those of single numbers."""
        # So that nobody waits for the weights of a process that has ended with an error.
        self._processes.gather(None)
        for group in self._groups:
            group.unshard()
        for number in self._numbers:
            number.put(number.whole)
        try:
            yield
        finally:
            for weight in self._model.parameters():
                if not isinstance(weight, DTensor):
                    weight.grad = None
            self._take_back()

    def average_gradients(self) -> None:
        """Give each process its part of the mean of all processes' gradients, and take back the whole weights.

        It is called within :meth:`whole`, when the last backward pass is done.
        """
        # At the end of a backward pass of the root, FSDP2 reduces whatever has no hook of its own. This pass does
        # nothing else.
        self._all().backward()
        for number in self._numbers:
            number.average_gradient()
        self._take_back()

    def _take_back(self) -> None:
        for group in self._groups:
            group.reshard()
        for number in self._numbers:
            number.put(number.part)
