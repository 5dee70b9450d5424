"""The tokenizer loses nothing, is the same every time, and knows nothing but text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fastlm.training import InputError
from fastlm.training.corpus import TextFile, find_corpus
from fastlm.training.tokenizer import BYTE_OF_LETTER, END_OF_TEXT, load_tokenizer, mark_of, train_tokenizer

SOURCE = Path(__file__).parent


def files() -> tuple[TextFile, ...]:
    return find_corpus(SOURCE, held_out=1e-9).train


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(files(), 600)


@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    table = {number: spelling for spelling, number in tokenizer.get_vocab().items()}
    spelled = b"".join(bytes(BYTE_OF_LETTER[letter] for letter in table[number]) for number in ids)
    assert spelled == text.encode()


def test_the_mark_written_in_a_text_is_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = f"before {END_OF_TEXT} after"
    assert mark_of(tokenizer) not in tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    ids = loaded.encode(text, add_special_tokens=False).ids
    assert mark_of(loaded) not in ids
    assert loaded.decode(ids) == text


def test_training_gives_the_same_tokenizer_with_any_number_of_threads(tokenizer: Tokenizer) -> None:
    code = (
        "import sys; from pathlib import Path; from fastlm.training.corpus import find_corpus;"
        "from fastlm.training.tokenizer import train_tokenizer;"
        f"files = find_corpus(Path({str(SOURCE)!r}), held_out=1e-9).train;"
        "sys.stdout.write(train_tokenizer(files, 600).to_str())"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert json.loads(done.stdout) == json.loads(tokenizer.to_str())
    assert train_tokenizer(files(), 600).to_str() == tokenizer.to_str()


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(InputError, match=r"--vocab-size: expected at least 257 .*, got 256"):
        train_tokenizer(files(), 256)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "1.0"}'])
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer: expected a tokenizers file at"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="tokenizer: expected a tokenizers file at"):
        load_tokenizer(tmp_path / "missing.json")
