"""Text shown token by token, coloured by a score: one HTML file, no scripts, nothing from outside, light and dark, printable.

Orange is above zero, blue below; the strongest of each carry ▴ or ▾, and selected tokens are underlined, so the page can be
read without telling colours apart. A token that is part of a character (UTF-8 bytes) shows its bytes in small hexadecimal digits, and
the token that completes the character shows the character.
"""

from __future__ import annotations

import base64
import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastlm.training.atomic import write_bytes

STYLE = Path(__file__).with_name("page.css")
LEVELS = 3  # shades on either side of zero
Numbers = Sequence[float] | npt.NDArray[np.floating]


@dataclass(frozen=True)
class TokenDocument:
    """One document of a page. Entry i of every list is about token i itself, given the tokens before it.

    Attributes:
        title: what it is called.
        tokens: `n` spellings, bytes (parts of UTF-8 characters are fine) or text; empty for marks that have none.
        score: `n` numbers that colour the tokens; NaN for tokens that have none, such as the first.
        selected: `n` truth values, or None where nothing was selected.
        loss, reference: `n` losses in nats, told when the pointer rests on a token.
        notes: `n` further words on each token.
    """

    title: str
    tokens: Sequence[bytes | str]
    score: Numbers
    selected: Sequence[bool] | npt.NDArray[np.bool_] | None = None
    loss: Numbers | None = None
    reference: Numbers | None = None
    notes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("score", "selected", "loss", "reference", "notes"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(
                    f"TokenDocument {self.title!r}: {name} must have {len(self.tokens)} entries, one per token, got {len(values)}"
                )

    @classmethod
    def of_predictions(
        cls,
        title: str,
        tokens: Sequence[bytes | str],
        score: Numbers,
        selected: Sequence[bool] | npt.NDArray[np.bool_] | None = None,
        loss: Numbers | None = None,
        reference: Numbers | None = None,
        notes: Sequence[str] | None = None,
    ) -> TokenDocument:
        """From lists of `n - 1` entries in which entry i is about token i + 1, as losses and score files have them."""
        nan = float("nan")
        return cls(
            title,
            tokens,
            [nan, *score],
            None if selected is None else [False, *selected],
            None if loss is None else [nan, *loss],
            None if reference is None else [nan, *reference],
            None if notes is None else ["", *notes],
        )


@dataclass(frozen=True)
class Picture:
    """A PNG that becomes part of the page."""

    caption: str
    png: bytes
    alt: str


def write_token_page(
    path: Path,
    documents: Sequence[TokenDocument],
    *,
    title: str = "Text by excess loss",
    lead: str = "",
    score_name: str = "excess loss",
    scale: float | None = None,
    pictures: Sequence[Picture] = (),
) -> None:
    """Writes the page.

    Args:
        path: the file; replaced in one step.
        documents: shown in this order.
        title, lead: head of the page, plain text.
        score_name: what the score is called, in nats.
        scale: score of the full colour; default: what 95 % of the scores stay below, in absolute value, rounded up to one digit.
        pictures: shown before the text.

    Raises:
        ValueError: no document, or a scale that is not positive.
    """
    if not documents:
        raise ValueError("write_token_page: expected at least one document, got none")
    if scale is None:
        scale = _scale_of(documents)
    elif not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"write_token_page: scale must be a positive number, got {scale}")
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(lead)}</p>' if lead else "",
        _legend(documents, score_name, scale),
        _pictures(pictures),
        _summary(documents, score_name) if len(documents) > 1 else "",
        *(_document(number, document, score_name, scale) for number, document in enumerate(documents)),
        "</main></body></html>\n",
    ]
    write_bytes(path, "".join(parts).encode())


def level_of(score: float, scale: float) -> int:
    """Shade of a score, from -3 to 3; 0 for what is next to nothing, and for NaN."""
    if math.isnan(score):
        return 0
    return max(-LEVELS, min(LEVELS, round(max(-1.0, min(1.0, score / scale)) * LEVELS)))


def spell(tokens: Sequence[bytes | str]) -> list[tuple[str, str]]:
    """What each token shows: the characters it completes, and the hexadecimal digits of bytes that complete none.

    The texts put together are the document; bytes that are no UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown: list[tuple[str, str]] = []
    for number, token in enumerate(tokens):
        spelling = token.encode("utf-8", "surrogatepass") if isinstance(token, str) else bytes(token)
        last = number == len(tokens) - 1
        text = decoder.decode(spelling, final=last)
        waiting = 0 if last else len(decoder.getstate()[0])
        begun = spelling[len(spelling) - min(waiting, len(spelling)) :] if waiting else b""
        shown.append((text, begun.hex(" ").upper()))
    return shown


def _scale_of(documents: Sequence[TokenDocument]) -> float:
    scores = np.abs(np.concatenate([np.asarray(d.score, float) for d in documents]))
    scores = scores[np.isfinite(scores)]
    wide = float(np.quantile(scores, 0.95)) if len(scores) else 0.0
    if wide <= 0:
        return 1.0
    digit = 10.0 ** math.floor(math.log10(wide))
    return float(math.ceil(wide / digit - 1e-9) * digit)


def _legend(documents: Sequence[TokenDocument], score_name: str, scale: float) -> str:
    edges = [(2 * level - 1) / (2 * LEVELS) * scale for level in range(1, LEVELS + 1)]
    items = []
    for level in range(LEVELS, 0, -1):
        end = "" if level == LEVELS else f" to {edges[level]:+.2g}"
        items.append(
            (f"t p{level}", f"{edges[level - 1]:+.2g}{end}" + (" or more" if level == LEVELS else ""))
        )
    items.append(("t", f"within ±{edges[0]:.2g}"))
    for level in range(1, LEVELS + 1):
        end = "" if level == LEVELS else f" to {-edges[level]:+.2g}"
        items.append(
            (f"t n{level}", f"{-edges[level - 1]:+.2g}{end}" + (" or less" if level == LEVELS else ""))
        )
    shades = "".join(f'<li><span class="{name}">token</span> {escape(text)}</li>' for name, text in items)
    marks = ""
    if any(document.selected is not None for document in documents):
        marks = '<li><span class="t s">token</span> selected</li><li><span class="t">token</span> not selected</li>'
    if any(hexadecimal for document in documents for _, hexadecimal in spell(document.tokens)):
        marks += (
            '<li><span class="t" data-x="E2"></span> bytes of a character that a later token completes</li>'
        )
    shown = [name for name in ("loss", "reference") if any(getattr(d, name) is not None for d in documents)]
    names = ", ".join([*shown, score_name])
    return (
        f"<section><h2>How to read it</h2><p>Every token is coloured by its {escape(score_name)}, in nats. Rest the "
        f"pointer on a token for its numbers: {escape(names)}.</p>"
        f'<ul class="legend">{shades}{marks}</ul></section>'
    )


def _pictures(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    figures = "".join(
        f'<figure><img alt="{escape(picture.alt)}" src="data:image/png;base64,{base64.b64encode(picture.png).decode()}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in pictures
    )
    return f"<section>{figures}</section>"


def _facts(document: TokenDocument, score_name: str) -> list[tuple[str, str]]:
    """Names and values of a document's summary."""
    score = np.asarray(document.score, float)
    known = np.isfinite(score)
    facts = [("tokens", f"{len(document.tokens):,}")]
    if document.selected is not None:
        chosen = np.asarray(document.selected, bool)
        share = f" ({chosen.sum() / known.sum():.0%})" if known.any() else ""
        facts.append(("selected", f"{int(chosen.sum()):,}{share}"))
        facts.append((f"{score_name} of selected", _mean(score[known & chosen])))
        facts.append(("of the others", _mean(score[known & ~chosen])))
    else:
        facts.append((f"mean {score_name}", _mean(score[known])))
    for name in ("loss", "reference"):
        if getattr(document, name) is not None:
            values = np.asarray(getattr(document, name), float)
            facts.append((f"mean {name}", _mean(values[np.isfinite(values)], signed=False)))
    return facts


def _mean(values: npt.NDArray[np.floating], *, signed: bool = True) -> str:
    return "–" if len(values) == 0 else f"{values.mean():{'+' if signed else ''}.2f}"


def _summary(documents: Sequence[TokenDocument], score_name: str) -> str:
    names = list(dict.fromkeys(name for document in documents for name, _ in _facts(document, score_name)))
    rows = []
    for number, document in enumerate(documents):
        facts = dict(_facts(document, score_name))
        cells = "".join(f"<td class=n>{escape(facts.get(name, '–'))}</td>" for name in names)
        rows.append(f'<tr><td><a href="#d{number}">{escape(document.title)}</a></td>{cells}</tr>')
    head = "".join(f"<th class=n>{escape(name)}</th>" for name in names)
    table = f"<table><tr><th>document</th>{head}</tr>{''.join(rows)}</table>"
    return f"<section><h2>Documents</h2><div class=scroll>{table}</div></section>"


def _document(number: int, document: TokenDocument, score_name: str, scale: float) -> str:
    facts = "".join(
        f"<li>{escape(name)} <b>{escape(value)}</b></li>" for name, value in _facts(document, score_name)
    )
    shown = spell(document.tokens)
    spans = "".join(
        _token(i, document, text, begun, score_name, scale) for i, (text, begun) in enumerate(shown)
    )
    return (
        f'<section id="d{number}"><h2>{escape(document.title)}</h2><ul class="facts">{facts}</ul>'
        f'<pre class="text">{spans}</pre></section>'
    )


def _token(i: int, document: TokenDocument, text: str, begun: str, score_name: str, scale: float) -> str:
    score = float(document.score[i])
    level = level_of(score, scale)
    selected = document.selected is not None and bool(document.selected[i])
    classes = (
        ["t"] + ([f"{'p' if level > 0 else 'n'}{abs(level)}"] if level else []) + (["s"] if selected else [])
    )
    if math.isnan(score):
        classes.append("u")
    told = []
    for name, values in (("loss", document.loss), ("reference", document.reference)):
        if values is not None and not math.isnan(values[i]):
            told.append(f"{name} {values[i]:.2f}")
    told.append("no score" if math.isnan(score) else f"{score_name} {score:+.2f}")
    if document.selected is not None and not math.isnan(score):
        told.append("selected" if selected else "not selected")
    if document.notes is not None and document.notes[i]:
        told.append(document.notes[i])
    extra = ""
    if begun and not text:
        extra = f' data-x="{begun}"'
    elif begun:
        extra = f' data-y="{begun}"'
    elif not text:  # a mark between documents has no spelling
        extra = ' data-x="◆"'
    elif text.startswith("\n"):
        extra = ' data-x="↵"'
    return (
        f'<span class="{" ".join(classes)}"{extra} title="{escape(" · ".join(told))}">{_visible(text)}</span>'
    )


def _visible(text: str) -> str:
    """Escaped, with pictures of control characters other than newline and tab."""
    return escape(
        "".join(
            chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "␡" if c == "\x7f" else c
            for c in text
        )
    )
