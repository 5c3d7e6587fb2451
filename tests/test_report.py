"""The page about runs: its numbers, what it says of them, and that it shows texts as they are and loads nothing."""

from __future__ import annotations

import dataclasses
import functools
import html.parser
import json
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import ltm_pyro
from ltm_pyro import evaluate, report
from ltm_pyro.evaluation import figures
from ltm_pyro.evaluation.estimators import ESTIMATORS, EstimatorSettings
from ltm_pyro.evaluation.inferred import Inferred, inference_of
from ltm_pyro.evaluation.page import RunContent, render
from ltm_pyro.evaluation.report import ScoredRun
from ltm_pyro.inference import SequenceNoise, log_joint
from ltm_pyro.models import TokenBatch
from ltm_pyro.runs.run import Run

FAST = shlex.split("--device cpu --num-sequences 4 --num-samples 4")
TEXT = 'Grüße <b>{n}</b> & "{n}" © 東京 \u202e\x07 https://example.org/?a={n}&b <script>alert({n})</script>\n'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, train_run: Callable[..., None], short_fits: None) -> Path:
    """A folder with runs on texts that are full of signs: without z, on whole texts, and block by block."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [json.dumps({"text": TEXT.format(n=n)}) for n in range(60)]
    (folder / "signs.jsonl").write_text("\n".join(rows) + "\n")
    options = [
        "--data",
        str(folder / "signs.jsonl"),
        "--model.length",
        "64",
        "--validate-every",
        "2",
        "--log-every",
        "1",
    ]
    train_run(folder, "none", *options)
    train_run(folder, "vi", *options, "--fast-steps", "2")
    train_run(folder, "map", *options, "--fast-steps", "2")
    past = [*options, "--infer-from", "past", "--block-size", "16", "--fast-steps", "1"]
    train_run(folder, "map", *past, "--out", str(folder / "past"))
    train_run(folder, "vi", *past, "--out", str(folder / "past-vi"))
    return folder


@pytest.fixture
def command(
    runs: Path, monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., tuple[int, str, str]]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in the folder of the runs."""
    monkeypatch.chdir(runs)
    return functools.partial(run_main, report.main, *FAST)


@pytest.fixture(scope="module")
def contents(runs: Path) -> dict[str, RunContent]:
    """What the page shows of each run."""
    scoring = evaluate.EvaluateConfig(num_sequences=4, settings=EstimatorSettings(4), batch_size=2)
    found = {}
    for name in ("none", "vi", "map", "past", "past-vi"):
        run = evaluate.load_run(str(runs / name), scoring, torch.device("cpu"))
        found[name] = report.content(run, Run(runs / name).read_metrics(), scoring)
    return found


@pytest.fixture(scope="module")
def page(contents: dict[str, RunContent]) -> Page:
    return Page.of(render(list(contents.values())))


@dataclass
class Page(html.parser.HTMLParser):
    """A page as a browser reads it: its tags, and the text in them."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    """The text after each tag up to the next."""

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def of(cls, source: str) -> Page:
        page = cls([("", {})], [""])
        page.feed(source)
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.data.append("")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", {}))
        self.data.append("")

    def handle_data(self, data: str) -> None:
        self.data[-1] += data

    @property
    def text(self) -> str:
        """All text, without style and script."""
        parts = zip(self.tags, self.data, strict=True)
        return "".join(text for (tag, _), text in parts if tag not in ("style", "script"))

    def panels(self) -> Iterator[list[tuple[str, dict[str, str]]]]:
        """The pieces of each text: what is shown, and the attributes."""
        for place, (_, attributes) in enumerate(self.tags):
            if attributes.get("class") == "tokens":
                end = next(n for n in range(place, len(self.tags)) if self.tags[n][0] == "/div")
                found = [n for n in range(place, end) if self.tags[n][0] == "span"]
                yield [(self.data[n], self.tags[n][1]) for n in found]


def batch_of(run: ScoredRun) -> TokenBatch:
    chosen = figures.chosen_sequences(len(run.packed), 4, run.num_validation)
    return run.packed.batch(chosen)


@pytest.mark.parametrize("name", ["vi", "map", "past", "past-vi"])
def test_the_nats_of_tokens_sum_to_the_prequential_figure_of_each_text(name, contents):
    """The figure is computed by its own estimator, at once for all texts, with other batches."""
    content, batch = contents[name], batch_of(contents[name].run)
    settings = EstimatorSettings(4, content.block_size)
    for text_nats, figure, fast_steps in (("nats", content.code, None), ("held", content.held, 0)):
        inference = inference_of(content.run.trained.config, fast_steps=fast_steps)
        if text_nats == "held" and not content.is_streaming:
            inference = type(inference).from_prior()
            settings = dataclasses.replace(settings, num_samples=content.code.num_samples)
        inferred = Inferred(content.run.trained.model, batch, inference, SequenceNoise(0))
        expected = ESTIMATORS["prequential"].estimate(inferred, settings).nats
        found = torch.stack([getattr(text, text_nats).sum() for text in content.texts])
        assert torch.allclose(found, expected, rtol=1e-6)
        assert figure.nats == pytest.approx(expected.sum().item(), rel=1e-6)
    gains = torch.stack([(text.held - text.nats).sum() for text in content.texts])
    assert gains.abs().max() > 3e-4  # so that a mistake between the two would be noticed


@pytest.mark.parametrize("name", ["past", "past-vi", "vi", "map"])
def test_nothing_is_gained_in_the_first_block(name, contents):
    content = contents[name]
    for text in content.texts:
        gain = (text.held - text.nats)[: content.block_size]
        assert torch.allclose(gain, torch.zeros_like(gain), atol=1e-9)


def test_a_token_of_a_model_without_z_costs_what_the_model_says(contents):
    """By differences of the log-likelihoods of growing texts."""
    content, batch = contents["none"], batch_of(contents["none"].run)
    z = torch.zeros(len(batch), *content.run.trained.model.config.latent_shape)
    so_far = torch.stack(
        [
            log_joint(content.run.trained.model, batch.prefix(torch.full((4,), size)), z).log_likelihood
            for size in range(65)
        ]
    ).double()
    for row, text in enumerate(content.texts):
        expected = -so_far[:, row].diff()[: len(text.tokens)]
        assert torch.allclose(text.nats, expected, atol=1e-4)
    assert content.held is None
    assert content.code.estimator == "exact"


def test_the_figures_are_those_of_evaluate(contents, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.operations, "of_estimate", lambda *args: 1.0)
    names = ("none", "vi", "past")
    args = [*(str(runs / name) for name in names), *FAST, "--block-size", "16", "--json", str(tmp_path / "all.json")]
    assert contents["vi"].block_size == 8  # an eighth of a sequence
    assert evaluate.main(args) == 0
    rows = json.loads((tmp_path / "all.json").read_text())["figures"]
    shown = [figure for name in names for figure in contents[name].figures]
    assert [row["estimator"] for row in rows] == [figure.estimator for figure in shown]
    for row, figure in zip(rows, shown, strict=True):
        if row["run"] == str(runs / "vi") and row["estimator"] == "prequential":
            continue  # of other blocks
        assert row["nats_per_token"] == pytest.approx(figure.record()["nats_per_token"], rel=1e-6)
        # Of numbers in float32 that are summed in another order, and nearly cancel.
        assert row["standard_error"] == pytest.approx(figure.record()["standard_error"], rel=1e-3)


def test_the_table_has_each_figure_with_its_meaning_and_its_difference_from_the_first_run(contents, page):
    rows = []
    for place, (tag, attributes) in enumerate(page.tags):
        if tag == "td" and "data-name" in attributes:
            if attributes["data-name"] == "run":
                rows.append({})
            inner = page.data[place] or page.data[place + 1]  # what is explained stands in a tag of its own
            rows[-1][attributes["data-name"]] = inner
    expected = [(name, figure) for name, content in contents.items() for figure in content.all_figures]
    assert len(rows) == len(expected)
    exact = contents["none"].code
    for row, (name, figure) in zip(rows, expected, strict=True):
        record = figure.record()
        assert (row["run"], row["figure"], row["z from"]) == (name, figure.estimator, figure.z_from or "")
        assert row["meaning"] == ESTIMATORS[figure.estimator].meaning.value
        assert row["nats/token"] == f"{record['nats_per_token']:.4f} ± {record['standard_error']:.4f}"
        assert row["bits/byte"] == f"{record['bits_per_byte']:.4f}"
        if name == "none":
            assert row["Δ bits/byte"] == ""
        else:
            difference, error = figures.difference(figure, exact)
            assert row["Δ bits/byte"] == f"{difference:+.4f} ± {error:.4f}"
    titles = {attributes.get("title") for tag, attributes in page.tags if tag == "abbr"}
    assert {ESTIMATORS[name].summary for name in ("exact", "elbo", "iwae", "prequential")} <= titles
    assert "It is not a bound on the model's own -log p(x)" in page.text


def test_with_and_without_thinking_are_compared_each_with_its_like(contents):
    first, other = contents["past"], contents["past-vi"]
    assert other.difference_from(first, other.code) == figures.difference(other.code, first.code)
    assert other.difference_from(first, other.held) == figures.difference(other.held, first.held)
    assert first.difference_from(first, first.held) is None
    elsewhere = dataclasses.replace(other, pairing=("other text",))
    assert elsewhere.difference_from(first, other.code) is None
    # What evaluate has no reference for, has none here: elbo of whole texts, where the first run has no such figure.
    assert contents["vi"].difference_from(first, contents["vi"].figures[0]) is None


def test_what_thinking_changes_is_stated_for_runs_that_think(contents, page):
    for name in ("past", "past-vi", "vi", "map"):
        content = contents[name]
        bits = (content.code.nats - content.held.nats) / math.log(2) / content.code.num_bytes
        assert content.thinking[0] == pytest.approx(bits)
        assert f"code length by {content.thinking[0]:+.4f} ± {content.thinking[1]:.4f} bits/byte" in page.text
    assert contents["none"].thinking is None
    assert "no z, so there is no thinking" in page.text


def test_the_pieces_of_each_panel_are_the_text_and_their_titles_its_bits(contents, page):
    panels = iter(page.panels())
    for number in range(4):
        for content in contents.values():
            text = content.texts[number]
            costs, gains = next(panels), None if text.held is None else next(panels)
            tokenizer = content.run.trained.tokenizer
            shown = tokenizer.decode([token for token in text.tokens if token < 256])
            for sign in ("\u202e", "\x07"):  # which would turn the text around, or cannot be seen
                shown = shown.replace(sign, f"⟨{ord(sign):04X}⟩")
            assert "".join(piece for piece, _ in costs) == shown
            ends = [attributes["class"].split()[-1] == "end" for _, attributes in costs]
            assert ends.count(True) == text.tokens.count(256)
            bits = [float(attributes["title"].removesuffix(" bits")) for _, attributes in costs]
            assert sum(bits) == pytest.approx(text.nats.sum().item() / math.log(2), abs=0.005 * len(bits))
            if gains is None:
                continue
            assert [piece for piece, _ in gains] == [piece for piece, _ in costs]
            saved = 0.0
            for (_, attributes), cost in zip(gains, bits, strict=True):
                gain, before, after = re.fullmatch(r"(.*) = (.*) - (.*) bits", attributes["title"]).groups()
                assert float(after) == pytest.approx(cost, abs=1e-9)
                assert float(before) - float(after) == pytest.approx(float(gain), abs=0.011)
                # Colours agree with signs.
                assert attributes["class"][0] == ("p" if float(gain) > 0 else "m") or abs(float(gain)) < 0.01
                saved += float(gain)
            expected = (text.held - text.nats).sum().item() / math.log(2)
            assert saved == pytest.approx(expected, abs=0.006 * len(gains))
    assert next(panels, None) is None


def test_a_gain_is_what_thinking_saves(contents):
    """Where z held at its start costs half a bit more than the other for one token, and 2 bits less for the next."""
    content = contents["past"]
    texts = []
    for text in content.texts:
        bits = torch.tensor([0.5, -2.0]).double().repeat(len(text.tokens))[: len(text.tokens)]
        texts.append(dataclasses.replace(text, held=text.nats + bits * math.log(2)))
    panels = Page.of(render([dataclasses.replace(content, texts=texts)])).panels()
    for text, (_, gains) in zip(texts, zip(panels, panels, strict=True), strict=True):
        place = 0
        for piece, attributes in gains:
            in_text = piece if re.search("⟨[0-9A-F]{4}⟩", piece) is None else chr(int(piece[1:5], 16))
            size = len(in_text.encode()) or 1  # an end-of-text is one token
            if "\ufffd" in piece:  # a part of a character, where the sequence begins or ends
                place = None
                break
            expected = sum(0.5 if (place + n) % 2 == 0 else -2.0 for n in range(size))
            assert attributes["title"].startswith(f"{expected:+.2f} = ")
            assert attributes["class"][0] == ("p" if expected > 0 else "m")
            place += size
        assert place in (None, len(text.tokens))


def test_a_run_that_takes_no_step_has_no_gain(contents, runs):
    """It would be the difference of two ways to draw z without having read anything."""
    run = contents["vi"].run
    config = dataclasses.replace(run.trained.config, fast_steps=0)
    run = dataclasses.replace(run, trained=dataclasses.replace(run.trained, config=config))
    scoring = evaluate.EvaluateConfig(num_sequences=2, settings=EstimatorSettings(2))
    content = report.content(run, [], scoring)
    assert content.held is None
    assert content.thinking is None
    assert [text.held for text in content.texts] == [None, None]
    assert "With T = 0 it is inferred in no step" in Page.of(render([content])).text


def test_a_bar_stands_where_each_block_begins(contents, page):
    panels = iter(page.panels())
    for name, content in contents.items():
        costs = next(panels)
        text = content.texts[0]
        bars = sum("block" in attributes["class"].split() for _, attributes in costs)
        assert bars == (0 if name == "none" else (len(text.tokens) - 1) // content.block_size)
        if text.held is not None:
            next(panels)


def test_nothing_of_a_run_is_markup_and_nothing_is_loaded(contents):
    samples = ['</pre><img src="x" onerror=alert(1)>']
    hostile = dataclasses.replace(contents["none"], samples=samples)
    trained = dataclasses.replace(hostile.run.trained, path=Path('<i>"&run'))
    hostile = dataclasses.replace(hostile, run=dataclasses.replace(hostile.run, trained=trained))
    metrics = [{"split": "train", "valid_bound": True, "estimator": "<u>", "tokens_seen": 1, "bits_per_byte": 2.0}]
    source = render([dataclasses.replace(hostile, metrics=metrics), contents["past"]])
    page = Page.of(source)
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"img", "u", "b", "link", "iframe", "object", "base", "a"})
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert samples[0] in page.text
    assert '<i>"&run' in page.text
    assert "<script>alert(" in page.text  # of the corpus, as text
    for _, attributes in page.tags:
        assert attributes.keys().isdisjoint({"src", "href", "srcset", "xlink:href", "action", "style", "background"})
        assert not any(name.startswith("on") for name in attributes)
    (style,) = (text for (tag, _), text in zip(page.tags, page.data, strict=True) if tag == "style")
    (script,) = (text for (tag, _), text in zip(page.tags, page.data, strict=True) if tag == "script")
    for code in (style, script):
        assert not re.search(r"https?:|//[a-z]|@import|fetch\(|XMLHttpRequest|import\(", code)
    assert re.findall(r"url\(([^)]*)\)", source) == [
        f"#inside-{name}" for name in re.findall(r'clipPath id="inside-([^"]+)"', source)
    ]
    (policy,) = (attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; ")


def test_the_kl_is_shown_only_where_it_has_a_meaning(contents, page):
    assert contents["vi"].slots.nats.shape == (2, 2)
    cells = [attributes["title"] for tag, attributes in page.tags if tag == "td" and "title" in attributes]
    nats = contents["vi"].slots.nats
    expected = [f"layer {n}, slot {m}: {nats[n, m].item():.2f}" for n in range(2) for m in range(2)]
    assert cells == expected
    # The slots of a prior of independent numbers share the KL of an ELBO among them, if q's numbers are independent.
    elbo = next(figure for figure in contents["vi"].figures if figure.estimator == "elbo")
    assert nats.sum().item() == pytest.approx(elbo.kl / 4, rel=1e-4)
    for name, reason in {"none": "has no z", "past": "block by block", "map": "no density"}.items():
        assert contents[name].slots is None
        assert reason in contents[name].no_slots
        assert f"{name} {contents[name].no_slots}." in page.text


def test_curves_are_of_valid_losses_only(contents, page):
    """The loss of map on whole texts is a density at a point."""
    assert "map has no curve of its loss in training" in page.text
    assert "neg-log-joint" in page.text
    marks = [data for (tag, _), data in zip(page.tags, page.data, strict=True) if tag == "title"][1:]
    expected = [
        f"{name}: {record['bits_per_byte']:.4f}"
        for name, content in contents.items()
        for record in content.metrics
        if record["split"] == "validation"
    ]
    assert len(expected) >= 5
    assert [mark.partition(" after")[0] for mark in marks] == expected
    line = {"split": "train", "estimator": "reused-noise", "valid_bound": False, "tokens_seen": 9, "bits_per_byte": 1.0}
    invalid = Page.of(render([dataclasses.replace(contents["none"], metrics=[line, line | {"bits_per_byte": None}])]))
    assert "none has no curve of its loss in training: what it has logged (reused-noise) is no bound" in invalid.text
    assert "polyline" not in {tag for tag, _ in invalid.tags}
    nothing = Page.of(render([dataclasses.replace(contents["none"], metrics=[])]))
    assert "none has no curve of its validation: it has no metrics.jsonl" in nothing.text


def test_a_figure_that_is_not_finite_has_no_number(contents):
    content = contents["past"]
    texts = [dataclasses.replace(text, nats=text.nats * math.nan) for text in content.texts]
    broken = dataclasses.replace(content.code, documents={0: figures.Document(math.nan, 10, 9)})
    page = Page.of(render([dataclasses.replace(content, texts=texts, figures=[broken])]))
    assert "nan" not in page.text
    assert "not finite" in page.text
    assert all(attributes["title"] == "not finite" for panel in page.panels() for _, attributes in panel)
    assert "Thinking changes its code length" not in page.text


def test_the_command_writes_one_file(command, runs):
    before = set(runs.iterdir())
    status, out, err = command("none", "past", "--out", "page.html")
    assert (status, out, err) == (0, "page: page.html\n", "")
    assert set(runs.iterdir()) - before == {runs / "page.html"}
    text = Page.of((runs / "page.html").read_text(encoding="utf-8")).text
    assert "Grüße <b>" in text
    assert "東京" in text
    # The same seed gives the same page.
    assert command("none", "past", "--out", "again.html")[0] == 0
    assert (runs / "again.html").read_bytes() == (runs / "page.html").read_bytes()


def test_an_exported_model_and_two_runs_of_the_same_name_are_told_apart(command, runs):
    ltm_pyro.save_pretrained("none", "exported/none")
    assert command("none", "exported/none", "--num-sequences", "1", "--out", "two.html")[0] == 0
    text = Page.of((runs / "two.html").read_text(encoding="utf-8")).text
    assert "exported/none has no curve of its validation: it has no metrics.jsonl" in text
    assert "±" in text


BAD = {
    "no run": ([], "RUN"),
    "a folder that is none": (["nowhere"], "nowhere"),
    "a page in no folder": (["none", "--out", "nowhere/page.html"], "nowhere"),
    "a folder for the page": (["none", "--out", "vi"], "--out"),
    "no such text": (["none", "--data", "nowhere.txt"], "nowhere.txt"),
    "less than no sequence": (["none", "--num-sequences", "-1"], "num-sequences"),
    "no draw": (["none", "--num-samples", "0"], "num-samples"),
    "an empty block": (["none", "--block-size", "0"], "block-size"),
    "a block longer than a sequence": (["none", "--block-size", "65"], "64 tokens"),
    "an empty batch": (["none", "--batch-size", "0"], "batch-size"),
    "a negative seed": (["none", "--seed", "-1"], "seed"),
    "damaged metrics": (["damaged"], "metrics.jsonl"),
    "an unknown option": (["none", "--nonsense"], "nonsense"),
}


@pytest.mark.parametrize(("args", "mentioned"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line_with_status_2(args, mentioned, command, runs):
    if "damaged" in args and not (runs / "damaged").exists():
        shutil.copytree(runs / "none", runs / "damaged")
        (runs / "damaged" / "metrics.jsonl").write_text('nonsense\n{"step": 1}\n')
    status, out, err = command(*args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert mentioned in err


def test_the_page_is_checked_before_any_work(command, monkeypatch):
    monkeypatch.setattr(evaluate, "load_run", lambda *args: pytest.fail("a run was loaded"))
    assert command("none", "--out", "nowhere/page.html")[0] == 2


def in_browser(source: str, address: str, folder: Path, width: int = 1280) -> Page:
    """The page as Chromium leaves it once its script has run, without an error on the console."""
    (folder / "page.html").write_text(source, encoding="utf-8")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder}",
    ]
    options.append(f"--window-size={width},800")
    command = [str(CHROMIUM), *options, "--dump-dom", f"{(folder / 'page.html').as_uri()}{address}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    return Page.of(done.stdout)


def shown_in(page: Page) -> list[str | None]:
    texts = [attributes for _, attributes in page.tags if attributes.get("class") == "text"]
    return [attributes["id"] for attributes in texts if "hidden" not in attributes]


NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@NEEDS_CHROMIUM
@pytest.mark.parametrize(("address", "shown"), [("#text-3", 3), ("#text-99", 4), ("#nonsense", 1)])
def test_a_browser_shows_the_text_that_the_address_names(address, shown, contents, tmp_path):
    """The page's own policy lets its script run."""
    page = in_browser(render([contents["none"], contents["past"]]), address, tmp_path)
    assert shown_in(page) == [f"text-{shown}"]
    assert f"Piece {shown} of 4" in page.text


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_goes_from_text_to_text_and_shows_the_numbers_of_a_token(width, contents, tmp_path):
    source = re.sub("<meta http-equiv[^>]*>", "", render(list(contents.values())))  # which forbids any other script
    press = """<script>
    const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    const places = [];
    for (const act of [() => press("ArrowLeft"), () => press("ArrowRight"),
                       () => document.querySelector(".next").click(), () => document.querySelector(".previous").click(),
                       () => press("ArrowRight"), () => press("ArrowRight"), () => press("ArrowRight")]) {
      act();
      places.push(shown + 1);
    }
    const token = document.querySelectorAll(".text:not([hidden]) .gains .tokens")[1].children[2];
    token.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
    document.title = JSON.stringify([places, location.hash, innerWidth, document.documentElement.scrollWidth,
                                     token.title, document.querySelector(".numbers").textContent]);
    </script>"""
    page = in_browser(source + press, "", tmp_path, width)
    title = next(text for (tag, _), text in zip(page.tags, page.data, strict=True) if tag == "title")
    places, address, inner, scroll, of_token, numbers = json.loads(title)
    assert places == [1, 2, 3, 2, 3, 4, 4]
    assert address == "#text-4"
    assert scroll <= inner <= 1280  # nothing is wider than the window
    assert re.fullmatch(r"[+-].* = .* bits", of_token)
    assert re.fullmatch(rf"vi: cost [\d.]+ bits; gain {re.escape(of_token)}", numbers)
