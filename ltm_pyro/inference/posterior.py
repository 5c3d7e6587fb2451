"""Draws from the posterior of a batch of sequences, and their export to ArviZ."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


@functools.cache
def import_arviz() -> tuple[Any, bool]:
    """ArviZ, and whether it is 1.0 or later. It is imported when it is needed, since that takes seconds."""
    import_matplotlib()
    with warnings.catch_warnings(), _folders_for_files():
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        import arviz
    return arviz, int(arviz.__version__.split(".")[0]) >= 1


@functools.cache
def import_matplotlib() -> Any:
    """Matplotlib with its `figure` and `ticker`. It is imported when it is needed, as ArviZ."""
    with _folders_for_files():
        import matplotlib.figure
        import matplotlib.ticker

        # It asks for its folders once, and warns of one that it cannot write.
        matplotlib.get_cachedir()
        matplotlib.get_configdir()
    return matplotlib


@contextlib.contextmanager
def _folders_for_files() -> Iterator[None]:
    """Let libraries that keep files in the user's folders do so in a temporary one, where those cannot be written.

    ArviZ notes the day of its last announcement, and Matplotlib the fonts of the machine. In a container there may be
    no home.
    """
    cache, config = os.environ.get("XDG_CACHE_HOME"), os.environ.get("XDG_CONFIG_HOME")
    of_user = [Path(cache or "~/.cache") / "arviz"]
    of_matplotlib = os.environ.get("MPLCONFIGDIR")
    if of_matplotlib:
        of_user.append(Path(of_matplotlib))
    else:
        of_user += [Path(cache or "~/.cache") / "matplotlib", Path(config or "~/.config") / "matplotlib"]
    if all(map(_can_write_in, of_user)):
        yield
        return
    before, folder = dict(os.environ), _temporary_folder()
    os.environ.update(XDG_CACHE_HOME=folder, MPLCONFIGDIR=folder)
    try:
        yield
    finally:
        for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR"):
            del os.environ[name]
            if name in before:
                os.environ[name] = before[name]


@functools.cache
def _temporary_folder() -> str:
    """A folder that lives as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="ltm_pyro-")
    atexit.register(folder.cleanup)
    return folder.name


def _can_write_in(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if it does not exist."""
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, RuntimeError):  # the latter where the user has no home
        return False


@dataclass(frozen=True)
class Posterior:
    """Draws of z for B sequences."""

    samples: Tensor
    """[chain, draw, B, *event_shape]."""
    sequence_ids: Tensor
    """[B] int64."""

    def __repr__(self) -> str:
        return f"Posterior(samples {list(self.samples.shape)})"

    def __post_init__(self) -> None:
        if not self.samples.shape[:2].numel():
            raise ValueError("a posterior needs at least one draw")

    @property
    def mean(self) -> Tensor:
        """[B, *event_shape]: mean over chains and draws."""
        return self.samples.mean((0, 1))

    def to_arviz(
        self,
        groups: dict[str, dict[str, np.ndarray]] | None = None,
        texts: Sequence[str] | None = None,
        dims: dict[str, list[str]] | None = None,
        coords: dict[str, tuple[str, np.ndarray]] | None = None,
    ) -> Any:
        """The draws as ArviZ's container: `InferenceData` in ArviZ 0.x, `xarray.DataTree` from 1.0 on.

        Group `posterior`, variable `z` with dimensions (chain, draw, sequence, layer, slot, dim), or
        (chain, draw, sequence, z_dim_0, …) for a z of other than three dimensions. The coordinate `sequence` holds the
        sequence ids.

        Args:
            groups: variables of further groups, by group and name. Their first dimensions are those of z (chain, draw,
                sequence); in `observed_data` the first dimension is the sequence.
            texts: the text of each sequence, which becomes the coordinate `text`.
            dims: by name, the dimensions of variables that have others than the sequence, without chain and draw.
            coords: further coordinates, by name: the dimension that each stands along, and its values.
        """
        arviz, is_new = import_arviz()
        event_dims = self.samples.dim() - 3
        names = ["layer", "slot", "dim"] if event_dims == 3 else [f"z_dim_{i}" for i in range(event_dims)]
        contents = {"posterior": {"z": self.samples.detach().cpu().numpy()}, **(groups or {})}
        all_dims = {"z": ["sequence", *names]}
        for group, variables in (groups or {}).items():
            shared = 1 if group == "observed_data" else 3
            all_dims |= {
                name: ["sequence", *(f"{name}_dim_{i}" for i in range(value.ndim - shared))]
                for name, value in variables.items()
            }
        labels: dict[str, Any] = {
            "dims": all_dims | (dims or {}),
            "coords": {"sequence": self.sequence_ids.cpu().numpy()},
        }
        with warnings.catch_warnings():
            # ArviZ warns of fewer draws than chains, which a caller chooses knowingly.
            warnings.filterwarnings("ignore", message="More chains", category=UserWarning)
            data = arviz.from_dict(contents, **labels) if is_new else arviz.from_dict(**contents, **labels)
        further = dict(coords or {})
        if texts is not None:
            further["text"] = ("sequence", np.array(list(texts), dtype=object))
        for group in contents if further else ():
            dataset = data[group].to_dataset() if is_new else data[group]
            along = {name: coordinate for name, coordinate in further.items() if coordinate[0] in dataset.dims}
            dataset = dataset.assign_coords(along)
            if is_new:
                data[group] = dataset
            else:  # an assignment to an item would list the group once more
                setattr(data, group, dataset)
        return data
