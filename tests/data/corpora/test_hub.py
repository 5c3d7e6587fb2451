"""Data sets of the Hugging Face hub, kept on the disk or read while they are downloaded."""

import io
import json
import logging

import datasets
import pytest

from ltm_pyro.data.corpora import load_corpus, load_texts, open_corpus
from ltm_pyro.data.corpora.base import CutOff
from ltm_pyro.errors import InputError


@pytest.mark.parametrize("splits", [("validation", "valid", "test"), ("val", "dev", "test"), ("test",)])
def test_a_data_set_of_the_hub(monkeypatch, splits, documents):
    columns = {split: datasets.Dataset.from_dict({"text": ["", f"text of {split}"]}) for split in splits}
    columns["train"] = datasets.Dataset.from_dict({"text": documents})
    asked_for = []

    def load_dataset(*arguments):
        asked_for.append(arguments)
        return datasets.DatasetDict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus("group/name:config")
    assert asked_for == [("group/name", "config")]
    assert corpus.name == "group-name-config"
    if splits == ("test",):
        assert sorted(corpus.train + corpus.validation) == sorted(documents)
    else:
        assert (corpus.train, corpus.validation) == (documents, [f"text of {splits[0]}"])


def describe(repository, split, num_rows):
    """Have the description of the repository say how many rows a split has."""
    splits = {"dataset_info": {"splits": [{"name": split, "num_bytes": 1, "num_examples": num_rows}]}}
    (repository / "README.md").write_text(f"---\n{json.dumps(splits)}\n---\n")


def test_what_is_streamed_is_what_is_downloaded_and_nothing_of_it_is_kept(repository, tmp_path, documents):
    for number in range(3):
        texts = [None, "", *documents[20 * number : 20 * number + 20]]
        datasets.Dataset.from_dict({"text": texts}).to_parquet(repository / f"train-{number}.parquet")
    datasets.Dataset.from_dict({"text": ["held out"]}).to_parquet(repository / "validation.parquet")
    source = open_corpus("group/name:config", streaming=True)
    assert source.name == "group-name-config"
    for _ in range(2):  # every time anew
        assert (source.train.documents(), source.validation.documents()) == (documents, ["held out"])
    assert not [path for path in tmp_path.rglob("*.arrow") if path.is_file()]
    stored = open_corpus("group/name:config")
    assert (stored.train.documents(), stored.validation.documents()) == (documents, ["held out"])
    assert [path for path in tmp_path.rglob("*.arrow") if path.is_file()]


@pytest.mark.parametrize(("said", "known"), [(None, 0), (60, 60), (40, 40)])
def test_how_far_a_stream_has_come_is_known_as_far_as_its_description_holds(said, known, repository, documents):
    datasets.Dataset.from_dict({"text": documents}).to_parquet(repository / "train.parquet")
    if said:
        describe(repository, "train", said)
    train = open_corpus("name", streaming=True).train
    assert train.size == said
    shares = [share for _, share in train]
    assert shares == [number / said for number in range(1, known + 1)] + [None] * (60 - known)


def test_a_stream_without_the_column_lists_those_there_are(repository):
    datasets.Dataset.from_dict({"id": [1], "body": ["x"]}).to_parquet(repository / "train.parquet")
    train = open_corpus("name", streaming=True).train
    with pytest.raises(InputError, match=r"name, split train has no column 'text'; .*: id, body$"):
        next(iter(train))


def test_a_stream_that_breaks_off_says_so_in_one_line(monkeypatch, capfd, caplog):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)

    def rows(shard):
        yield {"text": "first"}
        logging.getLogger("datasets").error("many lines")
        raise ConnectionError("the network\nis gone")

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shard": [0]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": stream})
    with pytest.raises(CutOff) as error:
        list(open_corpus("name", streaming=True).train)
    assert str(error.value) == "name, split train cannot be read to its end: the network is gone"
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_no_progress_bar_where_nobody_looks(monkeypatch, documents):
    disabled = []

    def load_dataset(*_):
        disabled.append(datasets.are_progress_bars_disabled())
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": documents}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    before = datasets.are_progress_bars_disabled()
    load_corpus("name")
    assert disabled == [True]
    assert datasets.are_progress_bars_disabled() == before


@pytest.mark.parametrize("splits", [("test", "validation", "train"), ("val", "train"), ("test",)])
def test_of_a_data_set_of_the_hub_one_split_is_scored(monkeypatch, splits):
    columns = {split: datasets.Dataset.from_dict({"body": ["", f"text of {split}"]}) for split in splits}
    asked_for = []

    def load_dataset(*arguments):
        asked_for.append(arguments)
        return datasets.DatasetDict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = load_texts("group/name:config", text_column="body")
    assert asked_for == [("group/name", "config")]
    assert (texts.name, texts.documents) == (f"group-name-config, split {splits[0]}", [f"text of {splits[0]}"])


def test_a_data_set_without_training_texts(monkeypatch, refusal, documents):
    only_test = datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": documents}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: only_test)
    assert "no split 'train'" in refusal("name")


def test_a_data_set_with_nothing_to_score(monkeypatch, refusal, documents):
    only_train = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": documents}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: only_train)
    assert "no split 'test' or 'validation' to score, only train" in refusal("name", load_texts)
