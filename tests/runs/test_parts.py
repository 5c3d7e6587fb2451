"""Tensors in parts: what several processes have written is read as one, and by nothing that runs code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltm_pyro.errors import InputError
from ltm_pyro.runs import parts


class Payload:
    """A pickle that leaves a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def whole() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"0.exp_avg": torch.randn(5, 3, generator=generator), "0.step": torch.tensor(7.0)}


@pytest.fixture
def folder(whole: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """Rows 0 to 2 in the file of one process, rows 3 and 4 in that of another, and a number in one of them."""
    for number, (start, end) in enumerate([(0, 3), (3, 5)], 1):
        tensors = {"0.exp_avg": whole["0.exp_avg"][start:end].clone()}
        offsets = {"0.exp_avg": {"saved_offsets": [start, 0]}}
        if number == 1:
            tensors["0.step"], offsets["0.step"] = whole["0.step"], {"saved_offsets": []}
        path = tmp_path / f"shard-{number:05d}-model-00001-of-00001.safetensors"
        save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    return tmp_path


def test_parts_are_read_as_the_whole(folder, whole):
    assert parts.shapes(folder) == {"0.exp_avg": [5, 3], "0.step": []}
    tensors = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    parts.read_into(tensors, folder)
    assert all(tensor.equal(whole[name]) for name, tensor in tensors.items())


def test_a_pickle_among_the_parts_is_not_read(folder, whole):
    for name in (".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(pickle.dumps(Payload(folder / "ran")))
    tensors = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    parts.shapes(folder)
    parts.read_into(tensors, folder)
    assert not (folder / "ran").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert (folder / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"nothing"])
def test_a_file_that_is_no_part_is_refused_in_one_line(folder, content):
    next(folder.iterdir()).write_bytes(content)
    with pytest.raises(InputError, match="cannot be read") as error:
        parts.shapes(folder)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        parts.shapes(tmp_path / "missing")
