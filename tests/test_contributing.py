"""The examples of CONTRIBUTING.md, added to a copy of the package as the page says, are used through the commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
NUM_PARAGRAPHS = 7
DOORS = ("scheme", "prior", "objective", "corpus", "figure", "task")


@dataclass(frozen=True)
class Example:
    """What the page shows behind `<!-- door: NAME -->`: a new file, and what it adds to a registry."""

    path: str
    code: str
    registry_path: str
    registry: str
    import_line: str
    entry: str

    @classmethod
    def of(cls, door: str) -> Example:
        marked = PAGE.partition(f"<!-- door: {door} -->\n")[2]
        file, lines = re.findall(r"```python\n(.*?)```", marked, flags=re.DOTALL)[:2]
        path, _, code = file.partition("\n")
        where, import_line, entry = lines.splitlines()
        registry_path, _, registry = where.removeprefix("# ").partition(": ")
        return cls(path.removeprefix("# "), code, registry_path, registry, import_line, entry)

    @property
    def name(self) -> str:
        """The name under which the registry has it."""
        return self.entry.split('"')[1]

    def add_to(self, root: Path) -> None:
        """Write the new file, and the two lines into the file of the registry."""
        assert not (root / self.path).exists()
        (root / self.path).write_text(self.code)
        text = (root / self.registry_path).read_text()
        text, num_imports = re.subn(r"^(?=from ltm_pyro)", f"{self.import_line}\n", text, count=1, flags=re.MULTILINE)
        text, num_entries = re.subn(rf"^({self.registry}\b.*?\{{)", rf"\1\n{self.entry}\n", text, flags=re.MULTILINE)
        assert (num_imports, num_entries) == (1, 1)
        (root / self.registry_path).write_text(text)


@dataclass(frozen=True)
class House:
    """A copy of the package with the examples in it, and a run that was trained by them."""

    root: Path

    def command(self, name: str, *args: str) -> str:
        """What a command prints."""
        return self.python("-m", f"ltm_pyro.{name}", *args)

    def python(self, *args: str) -> str:
        """What Python prints, given these arguments, where `ltm_pyro` is the copy."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, *args], cwd=self.root, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def examples() -> dict[str, Example]:
    return {door: Example.of(door) for door in DOORS}


@pytest.fixture(scope="module")
def house(examples: dict[str, Example], tmp_path_factory: pytest.TempPathFactory, tiny_options: list[str]) -> House:
    root = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "ltm_pyro", root / "ltm_pyro", ignore=shutil.ignore_patterns("__pycache__"))
    for example in examples.values():
        example.add_to(root)
    for file, num_paragraphs in (("novel.txt", 40), ("other.txt", NUM_PARAGRAPHS)):
        (root / file).write_text("\n".join(f"This is paragraph {n} of {file}.\n" for n in range(num_paragraphs)))
    house = House(root)
    options = ["--data", f"{examples['corpus'].name}:novel.txt", "--inference", examples["scheme"].name]
    options += ["--model.prior", examples["prior"].name, "--infer-from", examples["objective"].name]
    house.command(
        "train", *tiny_options, *options, "--steps", "2", "--fast-steps", "2", "--out", "run",
        "--validation-sequences", "2",
    )  # fmt: skip
    return house


def metrics(house: House) -> list[dict[str, float]]:
    return [json.loads(line) for line in (house.root / "run/metrics.jsonl").read_text().splitlines()]


def test_a_scheme_a_prior_an_objective_and_a_corpus_that_are_one_file_and_one_line_each_train_a_model(house, examples):
    settings = (house.root / "run/config.yaml").read_text()
    for door in ("scheme", "prior", "objective"):
        assert re.search(rf": {examples[door].name}$", settings, flags=re.MULTILINE), door
    assert f"data: {examples['corpus'].name}:novel.txt" in settings
    assert [line["step"] for line in metrics(house) if line["split"] == "train"][-1] == 2


PROGRAM = """
import contextlib, io, json
import ltm_pyro
from ltm_pyro.__main__ import dispatch
from ltm_pyro.inference import SequenceNoise, infer, log_joint
from ltm_pyro.inference.schemes import SCHEMES


def printed_by(*args):
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        dispatch(list(args))
    return printed.getvalue()


printed_by(
    "evaluate", "run", "--data", "{corpus}:other.txt", "--num-sequences", "0", "--estimators", "elbo", "{figure}",
    "iwae", "--num-samples", "4", "--json", "figures.json",
)
task = printed_by("tasks", "{task}", "run", "--num-items", "5", "--max-new-tokens", "1", "--json", "task.json")

ltm, joints = ltm_pyro.load("run"), []
batch = ltm.batch(["Paragraph 7 has 7 words.", "Nine words."])
for num_steps in (0, 20):
    scheme = SCHEMES["{scheme}"](num_steps=num_steps)
    joint = log_joint(ltm.model, batch, scheme.mean(infer(scheme, ltm.model, batch, SequenceNoise(0))))
    joints.append((joint.log_likelihood + joint.log_prior).tolist())

helps = dict((command, printed_by(command, "--help")) for command in ("evaluate", "tasks"))
helps["train"] = printed_by("train", "--inference", "ascent", "--help-all")
print(json.dumps(dict(task=task, joints=joints, helps=helps)))
"""
"""What is asked of the run. One process does it all: each would take seconds to start."""


@pytest.fixture(scope="module")
def answers(house: House, examples: dict[str, Example]) -> dict[str, Any]:
    """What the task prints, the log joints before and after inference, and the help of the commands."""
    program = PROGRAM.format(**{door: example.name for door, example in examples.items()})
    return json.loads(house.python("-c", program))


def test_the_new_scheme_raises_the_log_joint_that_it_ascends(answers):
    before, after = answers["joints"]
    assert all(new > old for old, new in zip(before, after, strict=True))


@pytest.fixture(scope="module")
def figures(house: House, answers: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of the run for a corpus of the new kind, by their names."""
    return {one["estimator"]: one for one in json.loads((house.root / "figures.json").read_text())["figures"]}


def test_the_new_figure_lies_between_the_two_that_it_interpolates(figures, examples):
    """Li & Turner 2016, theorem 1: the bound falls with α, from α = 1, the ELBO, to 0, the importance-weighted one.

    All three are computed from the same draws, so it holds for their estimates too, by Jensen's inequality.
    """
    name = examples["figure"].name
    assert list(figures) == ["elbo", name, "iwae"]
    assert figures["iwae"]["nats_per_token"] < figures[name]["nats_per_token"] < figures["elbo"]["nats_per_token"]
    assert figures[name]["valid_bound"]


def test_the_new_corpus_is_scored_paragraph_by_paragraph(figures):
    assert figures["elbo"]["num_documents"] == NUM_PARAGRAPHS


def test_the_new_task_is_scored_with_its_own_options(house, answers):
    (result,) = json.loads((house.root / "task.json").read_text())["tasks"]
    assert "ended" in answers["task"]
    assert result["metric"] == "ended"
    assert result["num_items"] == 5


def test_the_help_names_what_was_added(answers, examples):
    helps = answers["helps"]
    for door, example in examples.items():
        assert example.name in helps[{"figure": "evaluate", "task": "tasks"}.get(door, "train")], door
    assert "--ascent.step-size" in helps["train"]


def test_the_page_leads_to_files_that_exist():
    named = re.findall(r"`(ltm_pyro/[\w/.]+|tests/[\w/.]+|benchmarks/[\w/.]*|docs/[\w.]*)`", PAGE)
    added = {Example.of(door).path for door in DOORS}
    assert [path for path in named if path not in added and not (ROOT / path).exists()] == []
