"""The coloured page: the text is whole, every token says what it is, nothing comes from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fastlm.methods.rho1.page import Picture, TokenDocument, level_of, spell, write_token_page

NAN = float("nan")
TEXT = 'Grüße <b>\n\t5 € für 😀 & "x"\r\n  two  \n'


class Page(HTMLParser):
    """Reads a page back: the tokens of every document with their classes, titles and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.documents: list[list[dict[str, str]]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self._open = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self.tags.append((tag, values))
        self._open = tag
        if tag == "pre":
            self.documents.append([])
        elif tag == "span" and self.documents:
            self.documents[-1].append({**values, "text": ""})

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open == "span" and self.documents:
            self.documents[-1][-1]["text"] += data


def write(path: Path, *documents: TokenDocument, **options) -> Page:
    write_token_page(path / "page.html", documents, **options)
    return Page(path / "page.html")


def bytes_of(text: str) -> list[bytes]:
    return [bytes([byte]) for byte in text.encode()]


@pytest.mark.parametrize(
    "cut", [bytes_of, lambda text: list(text), lambda text: [text]], ids=["bytes", "letters", "one"]
)
def test_the_text_is_whole_however_it_is_cut(cut, tmp_path):
    tokens = cut(TEXT)
    (shown,) = write(tmp_path, TokenDocument("a", tokens, [0.0] * len(tokens))).documents
    assert len(shown) == len(tokens)
    assert "".join(token["text"] for token in shown) == TEXT.replace("\r", "␍")


def test_parts_of_a_character_show_their_bytes_and_the_last_the_character():
    assert spell([b"a", b"\xe2", b"\x82", b"\xac", b"b"]) == [
        ("a", ""),
        ("", "E2"),
        ("", "82"),
        ("€", ""),
        ("b", ""),
    ]
    assert spell([b"x\xe2\x82", b"\xac\xc3", b"\xbcy"]) == [("x", "E2 82"), ("€", "C3"), ("üy", "")]
    assert spell([b"\xff", b"a\xe2"]) == [
        ("\N{REPLACEMENT CHARACTER}", ""),
        ("a\N{REPLACEMENT CHARACTER}", ""),
    ]
    assert spell([b"\xe2", b"z"]) == [("", "E2"), ("\N{REPLACEMENT CHARACTER}z", "")]
    assert spell(["ü", b"", "\ud800"])[:2] == [("ü", ""), ("", "")]
    assert spell([]) == []


def test_each_token_tells_its_own_numbers(tmp_path):
    document = TokenDocument.of_predictions(
        "d",
        ["a", "b", "c"],
        [4.0, -4.0],
        [True, False],
        loss=[5.0, 1.0],
        reference=[1.0, 5.0],
        notes=["H→L", ""],
    )
    (shown,) = write(tmp_path, document, scale=4.0).documents
    assert [token["title"] for token in shown] == [
        "no score",
        "loss 5.00 · reference 1.00 · excess loss +4.00 · selected · H→L",
        "loss 1.00 · reference 5.00 · excess loss -4.00 · not selected",
    ]
    assert [token["class"].split() for token in shown] == [["t", "u"], ["t", "p3", "s"], ["t", "n3"]]


def test_shades():
    assert [level_of(score, 3.0) for score in (0, 0.4, 0.6, 1.4, 1.6, 2.6, 99, -0.6, -99)] == [
        0,
        0,
        1,
        1,
        2,
        3,
        3,
        -1,
        -3,
    ]
    assert level_of(NAN, 3.0) == 0
    assert level_of(float("inf"), 3.0) == 3


def test_the_scale_follows_the_scores(tmp_path):
    page = write(tmp_path, TokenDocument("d", ["a"] * 100, np.linspace(-0.033, 0.033, 100)))
    assert "+0.033 or more" in (tmp_path / "page.html").read_text(encoding="utf-8")  # 5/6 of 0.04
    assert {token["class"] for token in page.documents[0]} >= {"t p2", "t n2", "t"}
    for score in ([0.0], [NAN], []):
        write(tmp_path, TokenDocument("d", ["a"] * len(score), score))


def test_the_summary_counts(tmp_path):
    document = TokenDocument(
        "d", ["a"] * 5, [NAN, 1, 2, 3, -2], [False, True, True, False, False], loss=[NAN, 1, 2, 3, 4]
    )
    write(tmp_path, document, document)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    for text in (
        "<b>2 (50%)</b>",
        "excess loss of selected <b>+1.50</b>",
        "of the others <b>+0.50</b>",
        "mean loss <b>2.50</b>",
    ):
        assert text in html
    assert html.count('href="#d1"') == html.count('id="d1"') == 1


def test_nothing_from_outside_and_nothing_unescaped(tmp_path):
    evil = "<script src='http://x'>&\"</pre>"
    page = write(
        tmp_path,
        TokenDocument(evil, [evil], [1.0], notes=[evil]),
        title=evil,
        lead=evil,
        score_name=evil,
        pictures=[Picture(evil, b"\x89PNG", evil)],
    )
    assert page.documents[0][0]["text"] == evil
    assert page.documents[0][0]["title"].endswith(evil)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for tag, values in page.tags:
        for name in ("src", "href"):
            assert values.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, values)
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "page.html").read_text(encoding="utf-8"), re.S)
    assert style
    assert not re.search(r"url\(|@import|http", style[1])


def test_what_does_not_fit_is_told(tmp_path):
    with pytest.raises(
        ValueError, match="TokenDocument 'd': selected must have 2 entries, one per token, got 1"
    ):
        TokenDocument("d", ["a", "b"], [1, 2], [True])
    with pytest.raises(ValueError, match="score must have 3 entries, one per token, got 4"):
        TokenDocument.of_predictions("d", ["a", "b", "c"], [1, 2, 3])  # one too many: not shifted
    with pytest.raises(ValueError, match="at least one document, got none"):
        write_token_page(tmp_path / "page.html", [])
    with pytest.raises(ValueError, match=r"scale must be a positive number, got 0\.0"):
        write_token_page(tmp_path / "page.html", [TokenDocument("d", ["a"], [1.0])], scale=0.0)
    assert not list(tmp_path.iterdir())
