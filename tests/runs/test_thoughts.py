from __future__ import annotations

import json
import struct

import pytest
import torch

from ltm_pyro.errors import InputError, WriteError
from ltm_pyro.runs.thoughts import load_thoughts, save_thoughts


def test_on_a_full_disk_the_thoughts_that_were_there_are_there_still(tmp_path, full_beyond):
    path = tmp_path / "z.safetensors"
    old = torch.randn(1, 2, 3, 4)
    save_thoughts(str(path), old)
    with full_beyond(path.stat().st_size), pytest.raises(WriteError, match=r"z\.safetensors cannot be written"):
        save_thoughts(str(path), torch.randn(2, 2, 3, 4))
    assert load_thoughts(str(path), (2, 3, 4)).equal(old)
    assert [each.name for each in tmp_path.iterdir()] == ["z.safetensors"]


@pytest.mark.parametrize("value", [{"dtype": "F4", "shape": [0]}, {"dtype": "F32", "shape": [0, 2**63 - 1, 4]}])
def test_numbers_of_a_type_or_a_size_that_torch_lacks_are_refused(value, tmp_path):
    header = json.dumps({"z": value | {"data_offsets": [0, 0]}}).encode()
    (tmp_path / "z").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match=r"the thoughts in .*/z cannot be read|/z holds z of"):
        load_thoughts(str(tmp_path / "z"), (2, 3, 4))
