"""The embedded corpus, against the documentation as Python itself gives it and on a small library made for the test."""

import inspect
import json
import pydoc_data.topics
import sys
import sysconfig

import pytest

from ltm_pyro.data.corpora.python_docs import read_python_docs
from ltm_pyro.errors import InputError


@pytest.fixture(scope="module")
def documents():
    return read_python_docs()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An empty folder that passes for the standard library."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))

    def write(path, contents):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())

    return write


def test_there_are_megabytes_of_text(documents):
    assert sum(len(document.encode()) for document in documents) > 1_000_000
    assert all(document.strip() for document in documents)


def test_a_second_reading_gives_the_same(documents):
    assert read_python_docs() == documents


def test_nothing_that_is_read_gets_imported(documents):
    # The first opens a browser when it is imported, the second prints a poem.
    assert any(document.startswith("idlelib.") for document in documents)
    assert not {"antigravity", "this", "idlelib", "turtledemo"} & set(sys.modules)


def test_docstrings_are_those_that_python_shows(documents):
    [of_json] = [document for document in documents if document.startswith("json\n")]
    [of_decoder] = [document for document in documents if document.startswith("json.decoder\n")]
    assert inspect.getdoc(json) in of_json
    assert f"json.dumps\n\n{inspect.getdoc(json.dumps)}" in of_json
    assert f"json.decoder.JSONDecoder.raw_decode\n\n{inspect.getdoc(json.JSONDecoder.raw_decode)}" in of_decoder


def test_topics_are_those_of_help(documents):
    assert set(pydoc_data.topics.topics.values()) <= set(documents)


def test_documents_are_in_the_order_of_the_names_of_their_modules(library):
    library("b.py", '"""Module b."""\n')
    library(
        "a/__init__.py",
        '"""Package a.\n\n    Indented.\n    """\n'
        "raise SystemExit('imported')\n"
        "try:\n"
        "    def f():\n"
        '        """Function f."""\n'
        "        def inner(): 'Inner.'\n"
        "except ImportError:\n"
        "    async def g():\n"
        '        """Function g."""\n'
        "class C:\n"
        "    def no_docstring(self): pass\n"
        "    class D:\n"
        '        """Class D."""\n',
    )
    library("a/silent.py", "x = 1\n")
    library("pydoc_data/topics.py", "topics = {'second': 'Topic two.', 'first': 'Topic ' 'one.'}\n")
    package = "\n\n".join(
        [
            *("a", "Package a.\n\nIndented."),
            *("a.f", "Function f."),
            *("a.f.inner", "Inner."),
            *("a.g", "Function g."),
            *("a.C.D", "Class D.\n"),
        ]
    )
    assert read_python_docs() == [package, "b\n\nModule b.\n", "Topic one.", "Topic two."]


def test_tests_installed_packages_and_broken_files_are_left_out(library):
    for path in ["test/a.py", "x/tests/a.py", "idlelib/idle_test/a.py", "site-packages/a.py", "__pycache__/a.py"]:
        library(path, '"""Not to be read."""\n')
    library("notes.txt", '"""Not to be read."""\n')
    library("syntax.py", '"""Broken."""\nprint "old"\n')
    library("coding.py", b'"""Latin \xe9."""\n')
    library("zeros.py", b'"""Zeros."""\n\0')
    library("escape.py", b'"""Old escape \\d."""\n')
    assert read_python_docs() == ["escape\n\nOld escape \\d.\n"]


def test_a_library_without_sources_is_reported(library, tmp_path):
    with pytest.raises(InputError, match="--data") as error:
        read_python_docs()
    assert str(tmp_path) in str(error.value)
