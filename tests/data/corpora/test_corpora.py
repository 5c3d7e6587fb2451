"""Corpora: which kind opens what, what figures are compared by, and what is refused whatever the kind."""

import json
from pathlib import Path

import datasets
import pytest

from ltm_pyro import cli, evaluate, prepare, train
from ltm_pyro.data import corpora
from ltm_pyro.data.corpora import load_corpus, load_texts, open_corpus
from ltm_pyro.data.corpora.base import CorpusKind, CorpusSource, Split
from ltm_pyro.data.corpora.benchmark_sets import BENCHMARK_SETS


class Poems(CorpusKind):
    """Poems that a test brings."""

    label = "poems"
    summary = "what a poet has written"

    def recognises(self, data):
        return data in ("poems", "new poems")

    def open(self, data, text_column):
        return CorpusSource("poems", Split.of(lambda: [f"{number} roses are red. " * 3 for number in range(40)]))

    def open_to_score(self, data, text_column):
        return "new", Split.of(lambda: ["Violets are blue, and sugar is sweet."] * 3)


def test_a_kind_of_corpus_is_a_class_and_a_line(monkeypatch, tiny_options, run_main, refusal):
    """It is learnt from, scored, prepared, and named in help texts and errors."""
    poems = {"poems": Poems(), **corpora.CORPORA}
    monkeypatch.setattr(corpora, "CORPORA", poems)
    options = [*tiny_options, "--steps", "1", "--validation-sequences", "2"]
    assert run_main(train.main, *options, "--data", "poems", "--out", "run")[0] == 0
    few = ("--estimators", "elbo", "--num-samples", "2", "--json", "figures.json")
    assert run_main(evaluate.main, "run", "--data", "new poems", *few)[0] == 0
    [figure] = json.loads(Path("figures.json").read_text())["figures"]
    assert (figure["data"], figure["num_bytes"]) == ("new", 3 * len("Violets are blue, and sugar is sweet."))
    assert run_main(prepare.main, "poems", "--out", "corpus", "--processes", "1")[0] == 0
    assert "poems: what a poet has written" in cli.choices("Data.", poems).help
    assert "neither poems, python-docs, " in refusal("nowhere")
    assert refusal("poems", open_corpus, streaming=True).endswith("and poems is not one: leave it out")


def test_names_go_before_files_and_files_before_the_hub(write, monkeypatch):
    def load_dataset(path, **_):
        return datasets.Dataset.from_dict({"text": [path] * 7600})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    write("ag-news/a.txt", "a folder")
    write("lambda=1/a.txt", "another")
    assert set(load_texts("ag-news").documents) == {"fancyzhx/ag_news"}
    assert load_texts("./ag-news").documents == ["a folder"]
    assert load_texts("ag-news=ag-news").documents == ["a folder"]
    assert load_texts("lambda=1").documents == ["another"]


@pytest.mark.parametrize("data", ["python-docs", "rows.jsonl", "folder", "ptb=rows.jsonl", "ptb"])
def test_only_the_hub_is_streamed(write, data, json_lines, refusal, documents):
    write("rows.jsonl", json_lines(documents))
    write("folder/a.txt", "text")
    message = refusal(data, open_corpus, streaming=True)
    assert message == f"--streaming is for data sets of the Hugging Face hub, and {data} is not one: leave it out"


def test_the_hash_is_of_the_texts_their_order_and_their_side(write, json_lines):
    def sha256(train, validation):
        write("data/train.jsonl", json_lines(train))
        write("data/valid.jsonl", json_lines(validation))
        return load_corpus("data").sha256

    assert sha256(["a", "b"], ["c"]) == sha256(["a", "", "b"], ["c"])
    sides = [(["a", "b"], ["c"]), (["b", "a"], ["c"]), (["a"], ["b", "c"]), (["ab"], ["c"]), (["a", "b"], ["d"])]
    assert len({sha256(*side) for side in sides}) == len(sides)


def test_the_hash_is_of_the_documents_and_their_order(write, json_lines):
    hashes = []
    for documents in (["a", "b"], ["a", "", "b"], ["b", "a"], ["ab"], ["a"]):
        hashes.append(load_texts(write("rows.jsonl", json_lines(documents))).sha256)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("data", ["missing.txt", "folder/missing.jsonl.gz", "./missing", "a/b/c", "/missing", ""])
def test_a_missing_path(data, refusal):
    assert f"there is no file or folder {data!r}" in refusal(data)


@pytest.mark.parametrize("data", ["no-such-name", "nobody/no-such-name", "no-such-name:config", "LM1B"])
def test_a_name_that_is_nowhere(data, refusal):
    known = ", ".join(["python-docs", *BENCHMARK_SETS, "an existing file or folder"])
    for load in (load_corpus, load_texts):
        message = refusal(data, load)
        assert f"{data!r} is neither {known}, nor a Hugging Face data set that can be loaded: " in message


@pytest.mark.parametrize("data", ["a.jsonl", "lm1b=a.jsonl", "wikitext-2=a.jsonl", "ptb=b.txt", "ptb=folder"])
def test_nothing_to_score(write, data, json_lines, refusal, documents):
    write("a.jsonl", json_lines(["", "  \n"]))
    write("b.txt", " \n\n")
    write("folder/test.jsonl", json_lines([" "], "sentence"))
    write("folder/train.jsonl", json_lines(documents, "sentence"))
    assert refusal(data, load_texts) == f"{data} holds no text to score"


@pytest.mark.parametrize("data", ["missing.txt", "./missing", "a/b/c", "", "ptb=", "ptb=missing", "lm1b=no/such.raw"])
def test_a_missing_path_to_score(data, refusal):
    assert f"there is no file or folder {data.split('=')[-1]!r}" in refusal(data, load_texts)
