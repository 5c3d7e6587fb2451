"""The page as HTML: one file with its style and its script, which asks nothing of a network.

All that comes from a run is escaped. A policy in the page lets a browser run the script and use the style that stand
here, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ltm_pyro.evaluation.by_token import Piece, pieces
from ltm_pyro.evaluation.estimators import ESTIMATORS, Meaning
from ltm_pyro.evaluation.figures import Figure
from ltm_pyro.evaluation.inferred import Inference
from ltm_pyro.evaluation.page import plots
from ltm_pyro.evaluation.page.content import CODE, NUM_SAMPLES, SAMPLE_TOKENS, CodedText, RunContent
from ltm_pyro.evaluation.page.plots import Curve
from ltm_pyro.evaluation.report import number_text

COST_LEVELS = 8
"""The shades of a cost, from none."""
GAIN_LEVELS = 5
"""The shades of a gain, and those of a loss."""
NUM_STYLES = 6
"""The kinds of lines in a plot; more runs than that share them."""
MOST_NUMBERS = 16
"""The most slots of a layer whose KL is written out, and not only coloured."""
WITHOUT = "without thinking"
"""What the figures are called whose z is held where inference starts."""
DIFFERENCE = "Δ bits/byte"
DRAWS_ERROR = "Monte Carlo error"
"""The names of columns."""
TAIL = 0.95
"""The share of all tokens whose numbers differ in shade; those of the others have the darkest one."""

MEANINGS = {
    Meaning.UPPER_BOUND: (
        "an upper bound on -log p(x), in expectation over the draws of z: a single estimate may lie below -log p(x) by "
        "its Monte Carlo error"
    ),
    Meaning.CODE_LENGTH: (
        "the length of a code for the text, valid whatever the quality of inference, since every token is predicted "
        "before it is seen. It is not a bound on the model's own -log p(x)"
    ),
    Meaning.EXACT: "exact: nothing of it is estimated",
}
"""What a valid figure is to -log p(x), in a sentence."""


@dataclass(frozen=True)
class Shown:
    """A run under the name that the page gives it."""

    name: str
    content: RunContent


@dataclass(frozen=True)
class Scales:
    """How many bits a step of each colour stands for, the same in all of the page."""

    cost: float
    gain: float

    @classmethod
    def of(cls, costs: Sequence[float], gains: Sequence[float]) -> Scales:
        """Steps in which all but the largest numbers differ."""
        return cls(_step(costs, COST_LEVELS), _step(gains, GAIN_LEVELS))

    def cost_class(self, bits: float) -> str:
        """The class of a cost."""
        return f"c{_level(bits, self.cost, COST_LEVELS)}"

    def gain_class(self, bits: float) -> str:
        """The class of a gain, or of a loss below 0."""
        return f"{'p' if bits > 0 else 'm'}{_level(abs(bits), self.gain, GAIN_LEVELS)}"


def _step(values: Sequence[float], levels: int) -> float:
    known = [abs(value) for value in values if math.isfinite(value)]
    largest = float(np.quantile(known, TAIL)) if known else 0.0
    return plots.round_up(largest / levels) if largest > 0 else 1.0


def _level(value: float, step: float, levels: int) -> int:
    """The number of the shade: 0 is none, and stands for less than half a step."""
    return min(levels, max(0, int(value / step + 0.5))) if math.isfinite(value) else 0


def text_of(text: str) -> str:
    """A text as HTML: escaped, and with the number of a character that cannot be seen, or that turns others around."""
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return html.escape(
        "".join(
            f"⟨{ord(character):04X}⟩"
            if unicodedata.category(character) in hidden and character not in "\n\t"
            else character
            for character in text
        )
    )


def render(contents: Sequence[RunContent]) -> str:
    """The page.

    Args:
        contents: what it shows, a run each, at least one. Differences are from the first.
    """
    runs = [Shown(name, content) for name, content in zip(_names(contents), contents, strict=True)]
    here = Path(__file__).parent
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    sections = (_runs(runs), _figures(runs), _texts(runs), _curves(runs), _samples(runs), _slots(runs))
    title = "ltm_pyro: " + ", ".join(shown.name for shown in runs)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text_of(title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            *sections,
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _names(contents: Sequence[RunContent]) -> list[str]:
    """The last part of each run's path, or all of it where that is not enough to tell runs apart."""
    paths = [content.run.name for content in contents]
    last = [Path(path).name or path for path in paths]
    return [name if last.count(name) == 1 else path for name, path in zip(last, paths, strict=True)]


def _runs(runs: Sequence[Shown]) -> str:
    return "\n".join(
        ["<h1>What thinking changes</h1>", "<ul>", *(f"<li>{_run(shown)}</li>" for shown in runs), "</ul>"]
    )


def _run(shown: Shown) -> str:
    content, trained = shown.content, shown.content.run.trained
    z_from = f"z by {_way(content)}" if content.has_z else "no z"
    thinking = ""
    if content.thinking is not None:
        thinking = f" Thinking changes its code length by {_signed(content.thinking)} bits/byte."
    return (
        f"<strong>{text_of(shown.name)}</strong>: {trained.num_weights:,} weights, {text_of(z_from)}; "
        f"{trained.progress.step:,} slow steps on {trained.progress.tokens_seen:,} tokens.{thinking}"
    )


def _way(content: RunContent) -> str:
    return f"{content.inference.name}, T = {content.inference.scheme.num_steps}"


def _signed(difference: tuple[float, float | None]) -> str:
    return number_text(difference[0], 4, difference[1], sign="+")


def _table(rows: Sequence[dict[str, str]], words: Sequence[str]) -> str:
    """A table of cells that are HTML, by the name of their column. A column that is empty throughout is left out.

    Args:
        words: the columns that hold words and not numbers.
    """
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    classes = {name: ' class="word"' if name in words else "" for name in names}
    head = "".join(f"<th{classes[name]}>{name}</th>" for name in names)
    # In a narrow window each row is a paragraph, and its cells name their columns.
    body = [
        "<tr>" + "".join(f'<td{classes[name]} data-name="{name}">{row[name]}</td>' for name in names) + "</tr>"
        for row in rows
    ]
    return "\n".join(
        [
            # The focus lets a keyboard scroll a table that is wider than the window.
            '<div class="wide" tabindex="0"><table class="figures">',
            f"<thead><tr>{head}</tr></thead><tbody>",
            *body,
            "</tbody></table></div>",
        ]
    )


def _figures(runs: Sequence[Shown]) -> str:
    """The table of the figures, and under it what each of them means."""
    entries = [(shown, figure) for shown in runs for figure in shown.content.all_figures]
    rows = [_row(shown, figure, runs[0]) for shown, figure in entries]
    notes = [
        (name, f"{_capital(estimator.summary)}. It is {MEANINGS[estimator.meaning]}.")
        for name, estimator in ESTIMATORS.items()
        if any(figure.estimator == name for _, figure in entries)
    ]
    if any(shown.content.held for shown in runs):
        notes.append(
            (
                f"{CODE}, {WITHOUT}",
                "The code length without thinking: with z held where inference starts before anything is read (T = 0), "
                "or drawn from the prior. It is what the same weights predict with such a z.",
            )
        )
    if any(row["block"] for row in rows):
        notes.append(("block", "The tokens that are predicted from one inference of z."))
    notes.append(
        (
            "±",
            "One standard error over documents: how much the figure would differ for other documents like these. It "
            "says nothing of how much other seeds of training would differ.",
        )
    )
    if any(row[DIFFERENCE] for row in rows):
        notes.append(
            (
                DIFFERENCE,
                f"The figure less the same (or the exact) one of {runs[0].name}, paired over documents; above 0 is "
                "worse. Empty where a run reads other sequences, or has other figures.",
            )
        )
    if any(row[DRAWS_ERROR] for row in rows):
        notes.append(
            (
                DRAWS_ERROR,
                "The standard error of nats/token over the draws of z, for these very texts. Empty where a figure has "
                "none, or where the tail of its importance weights is too heavy for it to be known.",
            )
        )
    return "\n".join(
        [
            "<h2>Figures</h2>",
            *(f"<p>{line}</p>" for line in dict.fromkeys(_scored(shown.content) for shown in runs)),
            _table(rows, ("run", "figure", "z from", "meaning")),
            '<dl class="note">',
            *(f"<dt>{text_of(term)}</dt><dd>{text_of(text)}</dd>" for term, text in notes),
            "</dl>",
        ]
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _scored(content: RunContent) -> str:
    figure = content.code
    return text_of(
        f"{content.run.texts.name}: {figure.num_sequences:,} of {len(content.run.packed):,} pieces, "
        f"of {len(figure.documents):,} documents, "
        f"{figure.num_tokens:,} tokens, {figure.num_bytes:,} bytes"
    )


def _row(shown: Shown, figure: Figure, first: Shown) -> dict[str, str]:
    """A row of the table, as HTML. What is not finite has no number."""
    record, estimator = figure.record(), ESTIMATORS[figure.estimator]
    difference = shown.content.difference_from(first.content, figure)
    return {
        "run": text_of(shown.name),
        "figure": f'<abbr title="{text_of(estimator.summary)}">{figure.estimator}</abbr>'
        + (f", {WITHOUT}" if figure is shown.content.held else ""),
        "z from": text_of(figure.z_from or ""),
        "T": str(figure.fast_steps) if shown.content.has_z else "",
        "block": str(shown.content.block_size) if figure.estimator == CODE else "",
        "meaning": f'<abbr title="{text_of(MEANINGS[estimator.meaning])}">{estimator.meaning.value}</abbr>'
        if figure.is_valid
        else "not finite",
        "nats/token": number_text(record["nats_per_token"], 4, record["standard_error"]),
        "bits/byte": number_text(record["bits_per_byte"], 4),
        DIFFERENCE: _signed(difference) if difference else "",
        DRAWS_ERROR: number_text(record["monte_carlo_standard_error"], 4),
    }


def _texts(runs: Sequence[Shown]) -> str:
    """The texts, each with its tokens coloured by what they cost a run and by what thinking gains on them."""
    groups: dict[tuple[object, ...], list[Shown]] = {}
    for shown in runs:
        groups.setdefault(shown.content.pairing, []).append(shown)
    pages = [
        [(shown, panel_of(shown.content, shown.content.texts[number])) for shown in group]
        for group in groups.values()
        for number in range(len(group[0].content.texts))
    ]
    panels = [panel for page in pages for _, panel in page]
    has_gains = any(panel.gains is not None for panel in panels)
    of_blocks = (
        " A dashed bar marks where a block begins. On the first block thinking gains nothing, since nothing has been "
        "read before it."
    )
    scales = Scales.of(
        [bits for panel in panels for bits in panel.costs],
        [bits for panel in panels for bits in panel.gains or []],
    )
    return "\n".join(
        [
            "<h2>The text, token by token</h2>",
            "<ul>",
            *(f"<li>{text_of(_how_coded(shown))}</li>" for shown in runs),
            "</ul>",
            "<p>A piece is as much of a document as the model reads at once: it may begin and end within one. Where a "
            f"character takes several tokens, their bits are added.{of_blocks if has_gains else ''}</p>",
            _legend(scales, has_gains),
            "<div>",  # beyond which the pager does not stay in view
            '<nav class="pager" aria-label="texts" hidden>',
            '<button type="button" class="previous">← Previous</button>',
            '<button type="button" class="next">Next →</button>',
            '<span class="count" aria-live="polite"></span>',
            '<span class="note">or the arrow keys; point at a token, or tap it, for its numbers</span>',
            '<p class="numbers"></p>',
            "</nav>",
            *(_page(number, page, scales) for number, page in enumerate(pages, 1)),
            "</div>",
        ]
    )


def _how_coded(shown: Shown) -> str:
    """What the cost and the gain of a token are for a run, and why there is no gain where there is none."""
    content = shown.content
    if not content.has_z:
        return (
            f"{shown.name}: the cost of a token is -log p of it given the tokens before it. This model has no z, so "
            "there is no thinking whose gain could be shown."
        )
    draws = "one z" if content.code.num_samples == 1 else f"the mean over {content.code.num_samples} draws of z"
    if content.is_streaming:
        how = f"is predicted with {draws} inferred from the blocks before it"
    else:
        how = (
            f"is predicted with {draws} inferred from all tokens before the block, and the first with z from the prior"
        )
        start = "with as many draws of z from the prior"
    cost = (
        f"{shown.name}: the cost of a token is -log p of it given the tokens before it, where each block of "
        f"{content.block_size} tokens {how} ({_way(content)})."
    )
    if content.held is None:
        return f"{cost} With T = 0 it is inferred in no step, so there is no thinking whose gain could be shown."
    is_prior = content.held.z_from == Inference.from_prior().name
    start = "with as many draws of z from the prior" if is_prior else "with z held where inference starts (T = 0)"
    return (
        f"{cost} The gain is the cost {start}, less this cost. Both are code lengths token by token: every probability "
        "is fixed before its token is seen."
    )


@dataclass(frozen=True)
class Panel:
    """The pieces of a text, and the bits that each of them costs and gains."""

    pieces: list[Piece]
    costs: list[float]
    gains: list[float] | None
    """What thinking saves on each piece; None where nothing is inferred."""


def panel_of(content: RunContent, text: CodedText) -> Panel:
    """The bits of each piece of a text: those of its tokens added."""
    cut = pieces(text.tokens, content.run.trained.tokenizer)
    costs = _bits(text.nats, cut)
    held = None if text.held is None else _bits(text.held, cut)
    gains = None if held is None else [before - after for before, after in zip(held, costs, strict=True)]
    return Panel(cut, costs, gains)


def _bits(nats: Tensor, cut: Sequence[Piece]) -> list[float]:
    return [nats[piece.start : piece.stop].sum().item() / math.log(2) for piece in cut]


def _page(number: int, page: Sequence[tuple[Shown, Panel]], scales: Scales) -> str:
    """A text: of each run the panel of the costs, and beside it that of the gains."""
    return "\n".join(
        [
            f'<section class="text" id="text-{number}">',
            f"<h3>Piece {number}: from {text_of(page[0][0].content.run.texts.name)}</h3>",
            '<div class="runs">',
            *(_of_run(shown, panel, scales) for shown, panel in page),
            "</div>",
            "</section>",
        ]
    )


def _of_run(shown: Shown, panel: Panel, scales: Scales) -> str:
    starts = range(shown.content.block_size, panel.pieces[-1].stop, shown.content.block_size)
    costs = [_cost_title(bits) for bits in panel.costs]
    classes = [scales.cost_class(bits) for bits in panel.costs]
    name = text_of(shown.name)
    of_bytes = len("".join(piece.text for piece in panel.pieces).encode())

    def total(bits: list[float], sign: str = "") -> str:
        per_byte = f" ({sum(bits) / of_bytes:{sign}.2f} a byte)" if of_bytes and math.isfinite(sum(bits)) else ""
        return f"{_amount(sum(bits), sign)} bits{per_byte}"

    parts = [_tokens(f"{name}, cost: {total(panel.costs)}", panel.pieces, classes, costs, starts)]
    if panel.gains is not None:
        gains = [_gain_title(gain, cost) for gain, cost in zip(panel.gains, panel.costs, strict=True)]
        classes = [scales.gain_class(bits) for bits in panel.gains]
        caption = f"{name}, gain by thinking: {total(panel.gains, '+')}"
        parts.append(_tokens(caption, panel.pieces, classes, gains, starts))
    kind = "of-run" if panel.gains is None else "of-run gains"
    return f'<div class="{kind}" data-run="{name}">{"".join(parts)}</div>'


def _amount(bits: float, sign: str = "") -> str:
    return f"{bits:{sign},.0f}" if math.isfinite(bits) else "not finite"


def _cost_title(bits: float) -> str:
    return f"{bits:.2f} bits" if math.isfinite(bits) else "not finite"


def _gain_title(gain: float, cost: float) -> str:
    return f"{gain:+.2f} = {gain + cost:.2f} - {cost:.2f} bits" if math.isfinite(gain) else "not finite"


def _tokens(
    caption: str, cut: Sequence[Piece], classes: Sequence[str], titles: Sequence[str], block_starts: Sequence[int]
) -> str:
    """A text with a colour and a title for each piece. Nothing stands between the pieces that is not in the text."""
    spans = []
    for piece, kind, title in zip(cut, classes, titles, strict=True):
        # A block may begin within a character.
        begins_block = any(position in block_starts for position in range(piece.start, piece.stop))
        kinds = [kind, "block" if begins_block else "", "end" if not piece.text else ""]
        kinds.append("line-end" if piece.text.endswith("\n") else "")
        spans.append(f'<span class="{" ".join(filter(None, kinds))}" title="{title}">{text_of(piece.text)}</span>')
    return f'<figure><figcaption>{caption}</figcaption><div class="tokens">{"".join(spans)}</div></figure>'


def _legend(scales: Scales, has_gains: bool) -> str:
    """The colours and what they stand for."""

    def shade(kind: str, text: str) -> str:
        return f'<span><i class="{kind}"></i>{text}</span>'

    costs = [shade(f"c{level}", f"{level * scales.cost:.3g}") for level in range(COST_LEVELS + 1)]
    gains = (
        [shade(f"m{level}", f"-{level * scales.gain:.3g}") for level in range(GAIN_LEVELS, 0, -1)]
        + [shade("p0", "0")]
        + [shade(f"p{level}", f"+{level * scales.gain:.3g}") for level in range(1, GAIN_LEVELS + 1)]
    )
    lines = [f'<p class="scale">cost [bits]: {"".join(costs)} or more</p>']
    if has_gains:
        lines.append(f'<p class="scale">gain [bits], losses underlined: {"".join(gains)} or more</p>')
    return "".join(lines)


def _curves(runs: Sequence[Shown]) -> str:
    """The losses of training and of validation, as the runs have logged them."""
    parts = ["<h2>Training</h2>"]
    plots_of = {
        "train": ("loss in training", "the loss of single slow steps, each on its own batch", False),
        "validation": ("validation", "other held-out text than that of the figures above", True),
    }
    pictures, missing = [], []
    for split, (name, what, has_marks) in plots_of.items():
        curves = [curve for number, shown in enumerate(runs) if (curve := _curve(shown, number, split))]
        if curves:
            picture = plots.plot(name, curves, "tokens read in training", "bits/byte", has_marks)
            pictures.append(f"<figure><figcaption>{_capital(name)}: {what}</figcaption>{picture}</figure>")
        missing += [
            f"<p>{text_of(shown.name)} has no curve of its {name}: {text_of(_why_no_curve(shown.content, split))}.</p>"
            for shown in runs
            if shown.name not in {curve.name for curve in curves}
        ]
    if pictures:
        keys = [
            f"<li>{plots.key(number % NUM_STYLES)}{text_of(_kinds_of_losses(shown))}</li>"
            for number, shown in enumerate(runs)
        ]
        parts += [f'<ul class="legend">{"".join(keys)}</ul>', f'<div class="plots">{"".join(pictures)}</div>']
        parts.append(
            '<p class="note">Only losses that are upper bounds, code lengths or exact are drawn. That of a step is '
            "an estimate from one draw of z. Values at the beginning that are above all later ones are cut off.</p>"
        )
    return "\n".join([*parts, *missing])


def _curve(shown: Shown, number: int, split: str) -> Curve | None:
    points = [(float(record["tokens_seen"]), float(record["bits_per_byte"])) for record in _drawn(shown.content, split)]
    return Curve(shown.name, number % NUM_STYLES, points) if points else None


def _drawn(content: RunContent, split: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that can be drawn: those that are valid, with numbers."""

    def is_number(value: object) -> bool:
        return type(value) in (int, float) and math.isfinite(float(str(value)))

    return [
        record
        for record in content.metrics
        if record.get("split") == split
        and record.get("valid_bound") is True
        and is_number(record.get("tokens_seen"))
        and is_number(record.get("bits_per_byte"))
    ]


def _kinds_of_losses(shown: Shown) -> str:
    """The name of a run, and which figures its curves are."""
    kinds = {split: _drawn(shown.content, split) for split in ("train", "validation")}
    names = [
        f"{split}: " + ", ".join(dict.fromkeys(str(record.get("estimator")) for record in records))
        for split, records in kinds.items()
        if records
    ]
    return f"{shown.name} ({'; '.join(names)})" if names else shown.name


def _why_no_curve(content: RunContent, split: str) -> str:
    if not content.metrics:
        return "it has no metrics.jsonl"
    kinds = {str(record.get("estimator")) for record in content.metrics if record.get("split") == split}
    if not kinds:
        return "its metrics.jsonl has none"
    return f"what it has logged ({', '.join(sorted(kinds))}) is no bound, code length or exact figure"


def _samples(runs: Sequence[Shown]) -> str:
    """What each model writes."""
    parts = [
        "<h2>Samples</h2>",
        f"<p>The first {SAMPLE_TOKENS} tokens, at most, of {NUM_SAMPLES} texts of each model.</p>",
    ]
    for shown in runs:
        content = shown.content
        start = "as it is before a text is read" if content.is_streaming else "drawn from the prior"
        z_from = f", with z {start}" if content.has_z else ""
        parts.append(f"<h3>{text_of(shown.name)}{z_from}</h3>")
        # A browser drops a line end at the beginning, which may be one of the text.
        parts += ['<div class="samples">', *(f"<pre>\n{text_of(text)}</pre>" for text in content.samples), "</div>"]
    return "\n".join(parts)


def _slots(runs: Sequence[Shown]) -> str:
    """The KL of each layer and slot."""
    parts = [
        "<h2>What the slots of z say</h2>",
        "<p>KL(q ‖ p) of each slot in nats, mean over the texts above: how much a slot says about its text. q is the "
        "posterior given the whole text, and of q only the marginals of single numbers of z count.</p>",
    ]
    shown_slots = [shown for shown in runs if shown.content.slots is not None]
    for shown in runs:
        slots = shown.content.slots
        if slots is None:
            parts.append(f"<p>{text_of(shown.name)} {text_of(shown.content.no_slots)}.</p>")
            continue
        note = " (estimated from draws of q)" if slots.is_estimate else ""
        parts += [f"<h3>{text_of(shown.name)}{note}</h3>", _heat(slots.nats)]
    return "\n".join(parts[:1] + parts[2:] if not shown_slots else parts)


def _heat(nats: Tensor) -> str:
    """A cell for each layer and slot, [L, S], coloured from 0 to the largest."""
    num_layers, num_slots = nats.shape
    largest = nats[nats.isfinite()].max().item() if nats.isfinite().any() else 0.0
    step = largest / COST_LEVELS or 1.0
    has_numbers = num_slots <= MOST_NUMBERS
    rows = []
    for layer in range(num_layers):
        cells = []
        for slot, value in enumerate(nats[layer].tolist()):
            number = number_text(value, 2) or "not finite"
            kinds = f"c{_level(value, step, COST_LEVELS)}" + ("" if has_numbers else " bare")
            title = f"layer {layer}, slot {slot}: {number}"
            cells.append(f'<td class="{kinds}" title="{title}">{number if has_numbers else ""}</td>')
        rows.append(f'<tr><th scope="row">layer {layer}</th>{"".join(cells)}</tr>')
    numbers = "".join(f'<th scope="col">slot {slot}</th>' for slot in range(num_slots)) if has_numbers else ""
    head = f"<tr><td></td>{numbers}</tr>" if has_numbers else ""
    return f'<div class="wide" tabindex="0"><table class="heat">{head}{"".join(rows)}</table></div>'
