"""Tensors that several processes write, each its part, and that any number of processes reads.

By torch's distributed checkpointing, in its format for safetensors: each file says which part of a tensor it holds. The
other format has a pickle, and to read that can run code.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ltm_pyro.errors import InputError, WriteError
from ltm_pyro.files import durable


def write(folder: Path, tensors: Mapping[str, Tensor], group: Any) -> list[Path]:
    """Write tensors that are split between processes into a new folder. All processes do so together.

    Args:
        group: the processes, which communicate on CPUs.

    Returns:
        the files that are this process's to look after. Each file of the folder is one process's.

    Raises:
        WriteError: in all processes, if one of them cannot write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as raised:
        error = next(error for error, _ in raised.failures.values())
        raise WriteError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    if rank == 0:
        durable.sync_folder(folder)
    return sorted(folder.iterdir())[rank::size]


def shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of all tensors in the safetensors files of a folder, by their names.

    Raises:
        InputError: if they cannot be read.
    """
    try:
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{folder} cannot be read: {error}") from None
    return {name: list(tensor.size) for name, tensor in stored.items()}  # type: ignore[union-attr]


def read_into(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors from the safetensors files of a folder. Of a tensor that is split, this process's part is read.

    Args:
        tensors: names and shapes are among those that :func:`shapes` returns.

    Raises:
        InputError: if they cannot be read; some may be filled then.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # it says that processes do not read together, as they need not
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as raised:
        error = next(error for error, _ in raised.failures.values())
        raise InputError(f"{folder} cannot be read: {error}") from None
