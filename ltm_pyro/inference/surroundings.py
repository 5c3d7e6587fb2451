"""What surrounds a call of the library and would change what it does: torch's inference mode, and other threads.

Inside of `torch.inference_mode()` no tensor has a gradient, and inference of z needs the gradient of the log joint.
So every public function that takes one leaves that mode for as long as it runs, and works as under `torch.no_grad()`.

Pyro's handlers and its parameter store, whether weights have a gradient, and torch's generator belong to the process,
and not to a thread. So every public function that runs a program has the process to itself: threads that infer take
turns, and each gets what it would get alone. (Torch computes on several cores within a turn.) A thread that runs a
Pyro program by itself beside them must do so inside of `frozen`, which takes a turn as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_TURN = threading.RLock()
"""Held by the thread that may run programs now. Public functions call each other, so it may be taken again."""


@contextlib.contextmanager
def entry() -> Iterator[None]:
    """Within its block, or in the function that it decorates, no other thread runs a program, and torch's inference
    mode is left for `torch.no_grad()`.

    Raises:
        ValueError: if a gradient is taken through a tensor that was made in inference mode, such as weights.
    """
    with _TURN, contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        try:
            yield
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
            raise ValueError(
                "a tensor that was made inside torch.inference_mode() can have no part in a gradient: make the model, "
                "and what is passed in, outside of it or under torch.no_grad()"
            ) from error


def normal_tensors(value: T) -> T:
    """The same value, in which tensors that were made in inference mode are copies that may have part in a gradient.

    Tensors are found in dataclasses; of other objects nothing is known, and they stay as they are.
    """
    copied: Any = value
    if isinstance(value, Tensor):
        copied = value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        changed = {name: new for name, old in fields.items() if (new := normal_tensors(old)) is not old}
        copied = dataclasses.replace(value, **changed) if changed else value
    return copied  # type: ignore[no-any-return]  # of the type that it was
