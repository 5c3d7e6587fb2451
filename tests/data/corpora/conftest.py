"""Corpora of the tests lie in folders of their own, and there is no network."""

import gzip
import json

import datasets
import pytest

from ltm_pyro.data.corpora import load_corpus
from ltm_pyro.errors import InputError


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Relative paths lie in a fresh folder, the caches of `datasets` in another, and there is no network."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "here"


@pytest.fixture
def write(in_a_folder_of_its_own):
    def write(name, contents):
        file = in_a_folder_of_its_own / name
        file.parent.mkdir(parents=True, exist_ok=True)
        contents = contents if isinstance(contents, bytes) else contents.encode()
        file.write_bytes(gzip.compress(contents) if name.endswith(".gz") else contents)
        return str(file)

    return write


@pytest.fixture(scope="session")
def documents():
    return [f"Document number {index}.\nIt has two lines, é.\n" for index in range(60)]


@pytest.fixture(scope="session")
def json_lines():
    """A JSON file with a document a row."""

    def lines(documents, column="text"):
        return "".join(json.dumps({"id": index, column: text}) + "\n" for index, text in enumerate(documents))

    return lines


@pytest.fixture(scope="session")
def refusal():
    """The message with which a corpus is refused, always one line."""

    def message(data, load=load_corpus, **arguments):
        with pytest.raises(InputError) as error:
            load(data, **arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    return message


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that `datasets` reads as it reads a repository of the hub, and that is found there as `group/name`."""
    folder, load_dataset = tmp_path / "repository", datasets.load_dataset
    folder.mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *more, **options: load_dataset(str(folder), **options))
    return folder
