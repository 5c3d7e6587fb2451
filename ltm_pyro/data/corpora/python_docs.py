"""The default corpus: the documentation that every Python installation carries.

About 2.5 MB of English: the docstrings of the standard library, and the topics of `help()`. It differs between versions
of Python, so two figures on it compare only where the corpus hash is the same.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from ltm_pyro.data.corpora.base import CorpusKind, CorpusSource, Split
from ltm_pyro.data.corpora.holding_out import hold_out
from ltm_pyro.errors import InputError

PYTHON_DOCS = "python-docs"

_TESTS = {"test", "tests", "idle_test"}
_TOPICS = "pydoc_data.topics"
_Definition = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class PythonDocs(CorpusKind):
    """The documentation that Python itself carries.

    What is scored is what would be held out of it for validation.
    """

    label = PYTHON_DOCS
    summary = "the docstrings and documentation topics of Python's standard library"

    def recognises(self, data: str) -> bool:
        return data == PYTHON_DOCS

    def open(self, data: str, text_column: str | None) -> CorpusSource:
        return CorpusSource(PYTHON_DOCS, Split.of(read_python_docs, "documentation of this Python"))

    def open_to_score(self, data: str, text_column: str | None) -> tuple[str, Split]:
        return f"{PYTHON_DOCS}, held-out part", Split.of(
            lambda: hold_out(self.open(data, text_column).train.documents())[1]
        )


def read_python_docs() -> list[str]:
    """The documents: one for each module of the standard library that has docstrings, and one for each `help()` topic.

    A module's document holds its docstrings in the order of the source, each under the qualified name that it
    documents. The sources are parsed and never imported, so reading runs no code. Files that are not valid Python are
    left out. The order is that of the modules' names, whatever the file system, and among the topics that of theirs.

    Raises:
        InputError: the standard library holds no documentation (some installations come without its sources).
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for name, path in sorted(_modules(root)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old escape sequences in the sources
                module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # not Python of this version, or not text
            continue
        if name == _TOPICS:
            documents += _topics(module)
        elif docstrings := list(_docstrings(module, name)):
            documents.append("\n\n".join(docstrings) + "\n")
    if not documents:
        raise InputError(
            f"python-docs finds no documentation in {root} (are the sources of the standard library installed?); "
            "give --data a file, a folder or a Hugging Face data set"
        )
    return documents


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Names and files of the modules under `root`, without tests, in any order."""
    for folder, subfolders, files in os.walk(root):
        # Only identifiers can be packages: that leaves out site-packages, lib-dynload and the like.
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in {*_TESTS, "__pycache__"}]
        package = Path(folder).relative_to(root).parts
        for file in files:
            stem, extension = os.path.splitext(file)
            if extension == ".py" and stem.isidentifier():
                parts = package if stem == "__init__" else (*package, stem)
                yield ".".join(parts), Path(folder, file)


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """The docstrings of a definition and of those inside it, in the order of the source, each under its name."""
    if isinstance(node, (ast.Module, *_Definition)) and (docstring := ast.get_docstring(node)):
        yield f"{name}\n\n{docstring}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.stmt, ast.excepthandler)):  # definitions may stand under `if` or `try`
            yield from _docstrings(child, name)


def _topics(module: ast.Module) -> list[str]:
    """The texts of the dictionary of literals that the module assigns, in the order of their names."""
    texts: dict[str, str] = {}
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            texts |= ast.literal_eval(node.value)
    return [text for _, text in sorted(texts.items())]
