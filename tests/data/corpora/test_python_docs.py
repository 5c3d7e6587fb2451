"""The default corpus, against the documentation as Python itself gives it and on a small library made for the test."""

import inspect
import json
import os
import pydoc_data.topics
import sys
import sysconfig

import pytest

from ltm_pyro.data.corpora import load_corpus, load_texts
from ltm_pyro.data.corpora.python_docs import read_python_docs
from ltm_pyro.errors import InputError


@pytest.fixture(scope="module")
def python_docs():
    """What is read of the library that this Python has, once: it takes seconds."""
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


def test_there_are_megabytes_of_text(python_docs):
    assert sum(len(document.encode()) for document in python_docs) > 1_000_000
    assert all(document.strip() for document in python_docs)


def test_nothing_that_is_read_gets_imported(python_docs):
    # The first opens a browser when it is imported, the second prints a poem.
    assert any(document.startswith("idlelib.") for document in python_docs)
    assert not {"antigravity", "this", "idlelib", "turtledemo"} & set(sys.modules)


def test_docstrings_are_those_that_python_shows(python_docs):
    [of_json] = [document for document in python_docs if document.startswith("json\n")]
    [of_decoder] = [document for document in python_docs if document.startswith("json.decoder\n")]
    assert inspect.getdoc(json) in of_json
    assert f"json.dumps\n\n{inspect.getdoc(json.dumps)}" in of_json
    assert f"json.decoder.JSONDecoder.raw_decode\n\n{inspect.getdoc(json.JSONDecoder.raw_decode)}" in of_decoder


def test_topics_are_those_of_help(python_docs):
    assert set(pydoc_data.topics.topics.values()) <= set(python_docs)


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


def test_the_order_is_not_that_of_the_file_system(library, monkeypatch):
    for name in ("b", "a", "d/x", "c/z", "c/y"):
        library(f"{name}.py", f'"""Module {name}."""\n')
    walk = os.walk

    def backwards(root):
        for folder, subfolders, files in walk(root):
            subfolders.reverse()
            yield folder, subfolders, files[::-1]

    read = read_python_docs()
    assert [text.split("\n")[0] for text in read] == ["a", "b", "c.y", "c.z", "d.x"]
    monkeypatch.setattr(os, "walk", backwards)
    assert read_python_docs() == read


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


# As a corpus


@pytest.fixture
def read_already(python_docs, monkeypatch):
    monkeypatch.setattr("ltm_pyro.data.corpora.python_docs.read_python_docs", lambda: python_docs)


def test_a_twentieth_of_its_documents_is_held_out(read_already, python_docs):
    corpus = load_corpus("python-docs")
    assert corpus.name == "python-docs"
    assert sorted(corpus.train + corpus.validation) == sorted(python_docs)
    assert not set(corpus.train) & set(corpus.validation)
    held_out, learned = (sum(map(len, texts)) for texts in (corpus.validation, corpus.train))
    assert 0.02 < held_out / (held_out + learned) < 0.1


def test_what_is_held_out_is_scored(read_already):
    texts, corpus = load_texts("python-docs"), load_corpus("python-docs")
    assert texts.name == "python-docs, held-out part"
    assert texts.documents == corpus.validation
    assert texts.sha256 != corpus.sha256
