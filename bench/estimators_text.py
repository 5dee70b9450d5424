"""Kinds of tokens of Python source, told by the spelling of the token alone."""

from __future__ import annotations

import keyword

KINDS = (
    "new line, indentation",
    "keyword",
    "word, begun",
    "word, continued",
    "digits",
    "punctuation",
    "other",
)


def kind_of(spelling: bytes) -> str:
    """One of `KINDS`. A token may be a part of a word: `in` of `index` cannot be told from the keyword."""
    text = spelling.decode("utf-8", "replace")
    bare = text.strip()
    if not text:
        return "other"  # the mark between documents
    if not bare:
        return "new line, indentation"
    if keyword.iskeyword(bare):
        return "keyword"
    if bare.isascii() and bare.replace("_", "").isalnum():
        if bare.isdigit():
            return "digits"
        return "word, begun" if text[0] == " " else "word, continued"
    if bare.isascii() and not any(letter.isalnum() for letter in bare):
        return "punctuation"
    return "other"
