"""Noise of the kinds found in crawled text, made from what every Python installation has; nothing random that is not seeded.

Every function gives text that depends on its arguments alone. `KINDS` are the labels of tokens: `clean` first.
"""

from __future__ import annotations

import ast
import base64
import builtins
import hashlib
import io
import keyword
import random
import struct
import tokenize
import unicodedata
import zlib
from collections.abc import Iterator
from itertools import count, product
from string import ascii_lowercase

KINDS = (
    "clean",
    "base64",  # compressed source, in lines of 76 letters
    "hex",  # bytes of the library's compiled modules; compressed source where there are none
    "minified",  # source without comments, docstrings, line ends and indentation, names shortened
    "words shuffled",
    "lines shuffled",
    "C headers",  # another language that is learnable
    "other scripts",  # letters of other scripts with their names; strings of gettext catalogues where there are any
)
CLEAN = 0
MIXED = "mixed"  # kind of a document in which clean and noise take turns


def seeded(*words: object) -> random.Random:
    """A generator that depends on the words alone, on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, words)).encode("utf-8", "replace"), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def base64_lines(text: str) -> str:
    """The text compressed, as lines of 76 letters."""
    return base64.encodebytes(zlib.compress(text.encode(), 9)).decode()


def hex_lines(content: bytes, width: int = 32) -> str:
    """Bytes as lines of hexadecimal digits."""
    digits = content.hex()
    return "".join(digits[i : i + 2 * width] + "\n" for i in range(0, len(digits), 2 * width))


def shuffled_lines(text: str, seed: object) -> str:
    """The same lines in another order."""
    lines = text.splitlines()
    seeded("lines", seed).shuffle(lines)
    return "\n".join(lines) + "\n"


def shuffled_words(text: str, seed: object, line: int = 12) -> str:
    """The same words in another order, `line` in a line."""
    words = text.split()
    seeded("words", seed).shuffle(words)
    return "".join(" ".join(words[i : i + line]) + "\n" for i in range(0, len(words), line))


def short_names() -> Iterator[str]:
    """`a`, `b`, ..., `z`, `aa`, ...; no keywords."""
    for length in count(1):
        for letters in product(ascii_lowercase, repeat=length):
            name = "".join(letters)
            if not keyword.iskeyword(name):
                yield name


def minified(source: str) -> str | None:
    """Python source in one line: no comments, no docstrings, no indentation, `;` for line ends, names shortened.

    It reads like a minifier's output and need not run. None: not Python of the running version.
    """
    try:
        ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return None
    left_out = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokens if token.type not in left_out]
    kept = set(dir(builtins)) | set(keyword.softkwlist)
    names, fresh, pieces, last = {}, short_names(), [], ""
    for i, token in enumerate(tokens):
        text = token.string
        if token.type == tokenize.NEWLINE:
            text = "" if last in {";", ":", ""} else ";"
        elif token.type == tokenize.STRING and _stands_alone(tokens, i):
            continue
        elif token.type == tokenize.NAME and not keyword.iskeyword(text) and text not in kept:
            if text not in names:
                names[text] = next(fresh)
            text = names[text]
        if not text:
            continue
        joins = (last[-1:].isalnum() or last[-1:] == "_") and (text[0].isalnum() or text[0] in "_'\"")
        pieces.append(" " + text if joins else text)
        last = text
    return "".join(pieces) + "\n"


def _stands_alone(tokens: list[tokenize.TokenInfo], i: int) -> bool:
    """Whether a string is a statement of its own: a docstring."""
    before = i == 0 or tokens[i - 1].type == tokenize.NEWLINE or tokens[i - 1].string == ":"
    return before and i + 1 < len(tokens) and tokens[i + 1].type == tokenize.NEWLINE


def script_lines() -> list[tuple[str, str]]:
    """(script, line) for every letter outside the Latin script that has a name of its own, by code point."""
    lines = []
    for code in range(0x250, 0x20000):
        letter = chr(code)
        name = unicodedata.name(letter, "")
        if not name or not unicodedata.category(letter).startswith("L"):
            continue
        if name.startswith(("LATIN", "CJK", "HANGUL SYLLABLE")) or "IDEOGRAPH" in name:
            continue  # CJK and Hangul names are made by rule: tens of thousands of them
        lines.append((name.split()[0], f"{letter} {code:04x} {name.lower()}\n"))
    return lines


def catalogue_strings(content: bytes) -> list[str]:
    """Translations of a compiled gettext catalogue; empty: not one.

    Source: GNU gettext manual, "The Format of GNU MO Files".
    """
    if len(content) < 20 or content[:4] not in {b"\xde\x12\x04\x95", b"\x95\x04\x12\xde"}:
        return []
    order = "<" if content[:4] == b"\xde\x12\x04\x95" else ">"
    number, _, table = struct.unpack_from(order + "3I", content, 8)
    strings = []
    try:
        for i in range(number):
            length, offset = struct.unpack_from(order + "2I", content, table + 8 * i)
            if i:  # the first is the header
                strings += content[offset : offset + length].decode("utf-8").split("\0")
    except (struct.error, UnicodeDecodeError):
        return []
    return [text for text in strings if text]


def alternating(clean: str, noise: Iterator[tuple[int, str]], seed: object) -> list[tuple[int, str]]:
    """Blocks of 4 to 12 lines of `clean` with a block of noise after each, as (kind, text).

    A noise block is 120 to 320 characters of what `noise` gives next, ending in a line end.
    """
    draw = seeded("alternating", seed)
    lines = clean.splitlines(keepends=True)
    blocks, at = [], 0
    while at < len(lines):
        step = draw.randint(4, 12)
        block = "".join(lines[at : at + step])
        blocks.append((CLEAN, block if block.endswith("\n") else block + "\n"))
        at += step
        found = next(noise, None)
        if found is None:
            break
        kind, text = found
        size = draw.randint(120, 320)
        start = draw.randrange(max(1, len(text) - size))
        blocks.append((kind, text[start : start + size].strip("\n") + "\n"))
    return blocks
