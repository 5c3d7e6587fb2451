"""Thoughts in files: z of one or more texts as safetensors, a format from which no code can run."""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ltm_pyro.errors import InputError

NAME = "z"


def thoughts_file(z_BLSD: Tensor) -> bytes:
    """The contents of a file with z of B texts."""
    return save({NAME: z_BLSD.float().cpu().contiguous()})


def load_thoughts(path: str, latent_shape: tuple[int, int, int]) -> Tensor:
    """Read z of the B texts of a file, [B, *latent_shape] float32.

    Raises:
        InputError: if the file cannot be read, or holds thoughts for a model with another shape of z.
    """
    try:
        tensors = load_file(path)
    # The last three are raised for numbers of a type or a size that torch does not have.
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"the thoughts in {path} cannot be read: {error}") from None
    if NAME not in tensors or len(tensors) > 1:
        raise InputError(f"{path} holds no thoughts: it must have one tensor, {NAME!r}, as --save-thought writes it")
    z_BLSD = tensors[NAME].float()
    if z_BLSD.dim() != 4 or tuple(z_BLSD.shape[1:]) != latent_shape or not len(z_BLSD):
        raise InputError(
            f"{path} holds z of {list(z_BLSD.shape)}, but this run's model needs "
            f"[number of texts, {', '.join(map(str, latent_shape))}]: give thoughts of this run"
        )
    if not z_BLSD.isfinite().all():
        raise InputError(f"{path} holds a z that is not finite")
    return z_BLSD
