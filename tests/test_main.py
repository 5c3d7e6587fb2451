"""`python -m ltm_pyro` and `ltm` list the commands and run them; the package says what it is."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import ltm_pyro
from ltm_pyro.__main__ import COMMANDS, dispatch

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(one) for group in (PROJECT["dependencies"], *EXTRAS.values()) for one in group]
CONSTRAINTS = ROOT / "constraints.txt"
NAMED_OTHERWISE = {"yaml": "pyyaml", "pyro": "pyro-ppl", "mauve": "mauve-text", "arviz_stats": "arviz"}
"""Libraries that are installed under another name than that of their module."""


def test_every_module_that_runs_a_command_is_listed():
    """A command's module ends with a call of `cli.run`; what runs as a script and is no command is a mistake."""
    package = ROOT / "ltm_pyro"
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in package.rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert found - {"ltm_pyro.__main__"} == set(COMMANDS.values())


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_without_a_command_the_commands_are_listed_each_with_what_it_does(args, run_main):
    status, out, err = run_main(dispatch, *args)
    assert (status, err) == (0, "")
    listed = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert list(listed) == list(COMMANDS)
    for name, module in COMMANDS.items():
        first_line = (importlib.import_module(module).__doc__ or "").splitlines()[0]
        what, _, how = first_line.rpartition(": ")
        assert what
        assert how.startswith(f"python -m ltm_pyro.{name}")
        assert listed[name].endswith(f"  {what}")
        assert len(listed[name]) <= 80


def test_the_version_is_that_of_the_package(run_main):
    assert run_main(dispatch, "--version") == (0, f"ltm_pyro {ltm_pyro.__version__}\n", "")


def test_an_unknown_command_is_one_line_and_status_2(run_main):
    status, out, err = run_main(dispatch, "trian", "--steps", "3")
    assert (status, out) == (2, "")
    assert err == f"error: there is no command 'trian'; choose from {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_the_arguments_behind_its_name(name, run_main):
    status, out, _ = run_main(dispatch, name, "--help")
    assert status == 0
    assert f"ltm_pyro.{name}" in out


def test_the_error_of_a_command_is_its_own(run_main):
    status, out, err = run_main(dispatch, "export", "no-such-run", "--out", "folder")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "no-such-run" in err


def test_the_package_runs_as_a_module_and_passes_the_status_on():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "ltm_pyro", "nothing"], env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)


def test_ltm_is_installed_as_what_python_m_ltm_pyro_runs():
    assert PROJECT["scripts"] == {"ltm": "ltm_pyro.__main__:main"}


def test_every_library_that_the_package_imports_is_declared():
    imported: set[str] = set()
    for path in (ROOT / "ltm_pyro").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).partition(".")[0])
    libraries = {NAMED_OTHERWISE.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"ltm_pyro"}}
    assert libraries <= {requirement.name for requirement in REQUIREMENTS}


def test_every_pinned_version_is_one_that_the_project_asks_for():
    pinned = [Requirement(line) for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    asked = {requirement.name.lower(): requirement.specifier for requirement in REQUIREMENTS}
    for pin in pinned:
        (version,) = (one.version for one in pin.specifier)
        assert asked.get(pin.name.lower(), SpecifierSet()).contains(version), pin
    assert {Requirement(one).name for one in PROJECT["dependencies"]} <= {pin.name.lower() for pin in pinned}


def test_the_source_distribution_has_what_the_tests_read():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    shipped = {*build["targets"]["sdist"]["only-include"], "pyproject.toml"}  # which always goes with it
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    read = set(re.findall(r'(?:ROOT|parents\[\d\]) / "([\w.-]+)', text))
    assert {"docs", "notebooks", "benchmarks"} <= read
    assert read <= shipped


def test_the_licence_of_the_citation_is_that_of_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["license"], citation["title"]) == (PROJECT["license"], PROJECT["name"].replace("-", "_"))
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2502.01567"
