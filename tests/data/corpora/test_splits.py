"""Which files of a folder are learnt from, validated on and scored: by their names, at any depth, each file once."""

import os
from pathlib import Path

import pytest

from ltm_pyro.data.corpora import load_corpus, load_texts, open_corpus


@pytest.mark.parametrize(
    "layout",
    [
        "data/{}-00000-of-00001.jsonl",
        "a/b/c/{}.jsonl",
        "corpus_{}.jsonl",
        "{}_corpus.jsonl",
        "en.{}.v2.jsonl",
        "My Corpus {} 1.jsonl",
        "{}/part-0.jsonl",
        "{}-2024/part-0.jsonl",
        "shards/{}/deep/er/0.jsonl",
        "partial-{}/0.jsonl.gz",
        "{}.JSONL",
    ],
)
@pytest.mark.parametrize(
    "names", [("train", "validation", "test"), ("training", "valid", "testing"), ("Train", "DEV", "eval")]
)
def test_a_split_is_found_wherever_its_word_stands(write, json_lines, layout, names):
    for split, name in zip(("train", "validation", "test"), names, strict=True):
        write("corpus/" + layout.format(name), json_lines([f"{split} one", f"{split} two"]))
    corpus = load_corpus("corpus")
    assert (corpus.train, corpus.validation) == (["train one", "train two"], ["validation one", "validation two"])
    assert load_texts("corpus").documents == ["test one", "test two"]
    assert load_texts("corpus").name == "corpus, split test"
    assert list(corpus.parts) == ["train", "validation", "test"]
    assert corpus.parts["train"].startswith("2 texts, 18 bytes: 1 file (")
    assert corpus.parts["validation"].startswith("2 texts, 28 bytes: 1 file (")
    assert corpus.parts["test"].startswith("not read: 1 file (")


@pytest.mark.parametrize("name", ["contest.txt", "trainee.txt", "evaluated.txt", "devil.txt", "attest/valley.txt"])
def test_a_word_that_holds_a_splits_word_is_none(write, name):
    write(f"books/{name}", "a story of some length " * 3)
    corpus = load_corpus("books")
    assert list(corpus.parts) == ["train", "validation"]
    assert load_texts("books").name == "books, all of books"


def test_a_folder_named_after_a_split_decides_for_what_lies_below(write):
    write("data/train/the test of time.txt", "one")
    write("data/validation/a train to catch.txt", "held out")
    corpus = load_corpus("data")
    assert (corpus.train, corpus.validation) == (["one"], ["held out"])


@pytest.mark.parametrize("name", ["train_test_split.txt", "train/test/a.txt", "validation-of-the-test.txt"])
def test_a_name_that_says_two_splits_is_refused(write, name, refusal):
    write(f"data/{name}", "text")
    message = refusal("data")
    assert "of the splits" in message
    assert name in message


@pytest.mark.parametrize("name", ["extra.txt", "heldout.txt", "more/notes.txt"])
def test_a_name_that_says_nothing_beside_train_is_refused(write, name, refusal):
    write("data/train.txt", "text")
    write(f"data/{name}", "more text")
    assert f"{Path(name).name}, whose name says no split" in refusal("data")


def test_names_that_say_nothing_are_learnt_from_if_none_says_train(write):
    write("data/a.txt", "one")
    write("data/b.txt", "two")
    write("data/validation.txt", "held out")
    corpus = load_corpus("data")
    assert (corpus.train, corpus.validation) == (["one", "two"], ["held out"])


@pytest.mark.parametrize(
    "about", ["README.md", "LICENSE", "license.txt", "dataset_infos.json", "docs/README", "CITATION.cff"]
)
def test_what_is_about_the_folder_is_left_out_and_said(write, json_lines, about):
    write("data/train.jsonl", json_lines(["one", "two"]))
    write("data/validation.jsonl", json_lines(["three"]))
    write(f"data/{about}", "About these texts.")
    corpus = load_corpus("data")
    assert (corpus.train, corpus.validation) == (["one", "two"], ["three"])
    assert corpus.parts["left out"] == f"not read: 1 file ({about})"


def test_markdown_beside_a_readme(write):
    for name in ("a.md", "b.markdown", "c.rst", "d.txt", "README.md"):
        write(f"notes/{name}", f"The note {name} says something. " * 3)
    assert len(load_texts("notes").documents) == 4


# Links, and what is no file


def test_a_link_to_the_folder_above_multiplies_nothing(write):
    write("books/a.txt", "one")
    write("books/inside/b.txt", "two")
    os.symlink("..", "books/inside/up")
    os.symlink(".", "books/here")
    os.symlink(Path("books").absolute(), "books/inside/absolute")
    assert load_texts("books").documents == ["one", "two"]


def test_a_link_to_a_file_is_the_same_file(write):
    write("books/a.txt", "one")
    os.symlink("a.txt", "books/b.txt")
    os.link("books/a.txt", "books/c.txt")
    assert load_texts("books").documents == ["one"]


def test_a_link_leads_out_of_the_folder(write):
    write("elsewhere/a.txt", "one")
    write("file.txt", "two")
    Path("books").mkdir()
    os.symlink(Path("elsewhere").absolute(), "books/linked")
    os.symlink(Path("file.txt").absolute(), "books/file.txt")
    assert load_texts("books").documents == ["two", "one"]


def test_a_split_under_another_name_stays_one(write):
    """A link that sorts before the split must not take its texts to the side that is learnt from."""
    write("data/train/a.txt", "one")
    write("data/validation/b.txt", "held out")
    os.symlink("validation", "data/all")
    corpus = load_corpus("data")
    assert (corpus.train, corpus.validation) == (["one"], ["held out"])


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_one_file_that_is_two_splits_is_refused(write, link, refusal):
    write("data/train.txt", "one")
    link(Path("data/train.txt").absolute(), "data/test.txt")
    message = refusal("data")
    assert "split" in message
    assert "same file" in message


def test_what_is_no_file_is_never_opened(write):
    """A pipe would wait for a writer for ever."""
    write("books/a.txt", "one")
    os.mkfifo("books/b.txt")
    os.symlink("nowhere", "books/c.txt")
    os.symlink("/dev/zero", "books/d.txt")
    source = open_corpus("books")
    assert source.train.documents() == ["one"]
    assert source.unread == {"left out": "3 files (b.txt, c.txt, d.txt)"}


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.jsonl"])
def test_a_pipe_in_the_place_of_a_file_is_refused(name, refusal):
    os.mkfifo(name)
    assert "neither a file nor a folder" in refusal(name)


def test_a_copy_of_a_benchmark_set_one_folder_down(write):
    for split in ("train", "valid", "test"):
        write(f"copy/wikitext-2-raw/wiki.{split}.raw", f" = {split} = \n\n Of {split} . \n")
    texts = load_texts("wikitext-2=copy")
    assert (texts.name, texts.documents) == ("wikitext-2, split validation", ["= valid =\n\nOf valid."])
    assert load_corpus("wikitext-2=copy").train == ["= train =\n\nOf train."]
