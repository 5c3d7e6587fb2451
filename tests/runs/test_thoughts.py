from __future__ import annotations

import json
import struct

import pytest
import torch

from ltm_pyro.errors import InputError
from ltm_pyro.runs.thoughts import load_thoughts, thoughts_file


def test_what_is_written_is_read(tmp_path):
    z = torch.randn(3, 2, 3, 4)
    (tmp_path / "z").write_bytes(thoughts_file(z))
    assert load_thoughts(str(tmp_path / "z"), (2, 3, 4)).equal(z)


@pytest.mark.parametrize("value", [{"dtype": "F4", "shape": [0]}, {"dtype": "F32", "shape": [0, 2**63 - 1, 4]}])
def test_numbers_of_a_type_or_a_size_that_torch_lacks_are_refused(value, tmp_path):
    header = json.dumps({"z": value | {"data_offsets": [0, 0]}}).encode()
    (tmp_path / "z").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match=r"the thoughts in .*/z cannot be read|/z holds z of"):
        load_thoughts(str(tmp_path / "z"), (2, 3, 4))
