"""Byte-level BPE by the `tokenizers` library: trained once per run on the training side only, lossless for
any text.

Lossless matters: bits per byte divide by the UTF-8 bytes of the text, so every byte must be paid for by a
token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fastlm.training.config import reason
from fastlm.training.corpus import TextFile, path_fraction, read_documents
from fastlm.training.errors import InputError

END_OF_TEXT = "<|endoftext|>"  # stands before and after every document
SMALLEST_VOCAB = 257  # the 256 bytes and END_OF_TEXT
TRAINING_BYTES = 64 << 20  # more text than this changes the merges of a small vocabulary very little


def _letters_of_bytes() -> dict[str, int]:
    """The byte behind each letter: printable Latin-1 is itself, the rest follows from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _letters_of_bytes()


def train_tokenizer(files: Iterable[TextFile], vocab_size: int) -> Tokenizer:
    """Learns the merges from (at most `TRAINING_BYTES` of) the given files.

    Args:
        files: the training side of a corpus.
        vocab_size: upper bound of the number of tokens; short texts give fewer.

    Returns:
        The tokenizer; the same files give the same one, whatever the number of threads.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise InputError(
            f"--vocab-size: expected at least {SMALLEST_VOCAB} (256 bytes and one mark), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=32,
    )
    tokenizer.train_from_iterator(_sample(list(files)), trainer=trainer)
    return _taught_nothing_special(tokenizer)


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer written by `Tokenizer.save`.

    Raises:
        InputError: the file is missing or is not a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a plain Exception for every kind of failure
        raise InputError(f"tokenizer: expected a tokenizers file at {path}: {reason(error)}") from error
    mark_of(tokenizer)
    return _taught_nothing_special(tokenizer)


def find_tokenizer(path: Path) -> Path:
    """The tokenizer.json at `path`: the file itself, or that of a run, a model or a folder of scores.

    Raises:
        InputError: there is none.
    """
    if not path.is_dir():
        return path
    places = [path, path / "model", path / "data"]
    if path.parent.name == "checkpoints":
        places.append(path.parent.parent / "data")
    for folder in places:
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    raise InputError(f"tokenizer: expected a tokenizer.json, or a folder with one, got {path}")


def load_given_tokenizer(path: Path) -> Tokenizer:
    """Reads the tokenizer at `path` (see `find_tokenizer`) for training on text that it was not trained on.

    Raises:
        InputError: it is missing, has no `END_OF_TEXT`, or is not byte-level BPE, without which bits per byte have no meaning.
    """
    file = find_tokenizer(path)
    tokenizer = load_tokenizer(file)
    names = tokenizer.get_vocab()
    if max(names.values()) + 1 != len(names):
        raise InputError(
            f"tokenizer: expected token ids 0 to {len(names) - 1} in {file}, found ids up to {max(names.values())}"
        )
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for text in names:
        if text not in added and not all(letter in BYTE_OF_LETTER for letter in text):
            raise InputError(f"tokenizer: expected byte-level BPE in {file}, found the token {text!r}")
    return tokenizer


def spelling_of(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token; none for the mark between documents."""
    table = [b""] * tokenizer.get_vocab_size()
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for text, number in tokenizer.get_vocab().items():
        if text in added:
            table[number] = b"" if text == END_OF_TEXT else text.encode()
        else:
            table[number] = bytes(BYTE_OF_LETTER[letter] for letter in text)
    return table


def mark_of(tokenizer: Tokenizer) -> int:
    """Number of the mark before and after every document."""
    number = tokenizer.token_to_id(END_OF_TEXT)
    if number is None:
        raise InputError(f"tokenizer: expected the token {END_OF_TEXT}, found none")
    return int(number)


def _taught_nothing_special(tokenizer: Tokenizer) -> Tokenizer:
    """Text that spells END_OF_TEXT is text: only this package puts the mark itself."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def _sample(files: list[TextFile]) -> Iterator[str]:
    """All text, or whole files in order of their hash until there is enough."""
    if sum(file.size for file in files) > TRAINING_BYTES:
        files = sorted(files, key=lambda file: path_fraction("tokenizer/" + file.name))
    taken = 0
    for file in files:
        for text in read_documents(file):
            yield text
            taken += len(text)
            if taken >= TRAINING_BYTES:
                return
