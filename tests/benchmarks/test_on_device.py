"""The script that measures a device, at sizes that a processor can do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "on_device.py"


def lines_of(tmp_path: Path, *args: str) -> dict[str, dict]:
    out = tmp_path / "lines.jsonl"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--toy", "--out", str(out), *args]
    # One thread: several wait for each other where another test keeps a core busy.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=environment)
    return {line["part"]: line for line in map(json.loads, out.read_text().splitlines())}


def test_a_part_that_fails_has_its_line_and_costs_no_other(tmp_path):
    lines = lines_of(tmp_path, "--parts", "reference", "waits", "--reference", str(tmp_path / "no clone"))
    assert list(lines) == ["reference", "waits"]
    assert lines["reference"]["status"] == "failed"
    assert "Error" in lines["reference"]["error"]
    assert lines["waits"]["status"] == "done"


@pytest.mark.slow
def test_every_part_ends_and_a_processor_agrees_with_itself(tmp_path):
    """float32 with float64, a run that was killed with one that was not."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"text {n} " * 50}) + "\n" for n in range(60)))
    prepare = [sys.executable, "-m", "ltm_pyro.prepare", str(texts), "--out", str(tmp_path / "corpus")]
    subprocess.run(prepare, check=True, capture_output=True)
    lines = lines_of(tmp_path, "--corpus", str(tmp_path / "corpus"))
    assert {line["status"] for line in lines.values()} == {"done"}
    parity = lines["parity"]["result"]
    for thoughts in ("attended", "fast-weights"):
        assert max(parity[f"{thoughts}, float32"].values()) < 1e-4
        assert max(parity[f"{thoughts}, schemes after 4 steps, float32"].values()) < 1e-2
        assert 1e-4 < max(parity[f"{thoughts}, bfloat16"].values()) < 0.1
    assert parity["attention, float32"] < 1e-6
    training = lines["training"]["result"]
    assert len(training["losses"]) > 4
    assert training["largest_difference_from_cpu"] == training["largest_difference_after_kill_and_resume"] == 0
    assert lines["generation"]["result"]["32 tokens"]["same_tokens"] == 1
    assert max(lines["windows"]["result"]["blocks"]["differences"].values()) < 1e-5
    assert lines["processes"]["result"]["losses"] == pytest.approx(training["losses"])
    for part in ("speed small 64", "compiled small 64"):
        assert 0 < lines[part]["result"]["fast step"]["share"] < 1.5
    for name, num_figures in {"past": 2, "none": 1}.items():
        trained = lines["corpus"]["result"][name]
        assert trained["steps"] == 4
        assert len(trained["held_out"]) == num_figures
        assert all(figure["nats_per_token"] > 0 for figure in trained["held_out"])
