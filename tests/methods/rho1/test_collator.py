"""Batches: what stands beside what, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fastlm.methods import rho1
from fastlm.methods.rho1 import document_key
from fastlm.training import InputError
from tests.methods.rho1.documents import FakeStore

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12]]


@pytest.fixture
def store() -> FakeStore:
    return FakeStore({document_key(row): np.asarray(row[1:], np.float32) + 100 for row in ROWS})


def test_a_reference_loss_stands_where_its_token_is_predicted(store):
    batch = rho1.Collator(store, pad_token_id=0)([{"input_ids": row} for row in ROWS])
    nan = float("nan")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, -100, -100]]
    expected = torch.tensor([[106, 107, 108, 109, nan], [111, 112, nan, nan, nan]])
    assert torch.equal(batch["ref_nll"].nan_to_num(-1), expected.nan_to_num(-1))
    assert batch["ref_nll"].dtype == torch.float32


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor, lambda row: np.asarray(row, np.uint16)])
def test_tokens_of_any_kind(kind, store):
    batch = rho1.Collator(store, pad_token_id=0)([{"input_ids": kind(row)} for row in ROWS])
    assert batch["ref_nll"][0, 0] == 106


def test_cutting_comes_after_the_document_was_found(store):
    batch = rho1.Collator(store, pad_token_id=0, max_length=4, pad_to_multiple_of=8)([{"input_ids": ROWS[0]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0, 0, 0]]
    assert batch["ref_nll"][0, :3].tolist() == [106, 107, 108]
    assert batch["ref_nll"][0, 3:].isnan().all()  # the token after the cut is not in the batch


def test_a_row_longer_than_the_references_context_is_refused(store):
    store.context = 4
    with pytest.raises(
        InputError, match=r"rows of at most 4 tokens.*, got a row of 5; cut rows with max_length=4"
    ):
        rho1.Collator(store, pad_token_id=0)([{"input_ids": ROWS[0]}])
    batch = rho1.Collator(store, pad_token_id=0, max_length=4)([{"input_ids": ROWS[0]}])
    assert batch["ref_nll"].isfinite().sum() == 3


def test_labels_of_ones_own_and_padding_of_a_tokenizer(store):
    row = {"input_ids": [0, 0, *ROWS[0]], "attention_mask": [0, 0, 1, 1, 1, 1, 1]}
    row["labels"] = [-100, -100, -100, -100, 7, 8, 9]
    batch = rho1.Collator(store, pad_token_id=0)([row])
    assert batch["input_ids"].tolist() == [ROWS[0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9]]
    assert batch["ref_nll"][0, :4].tolist() == [106, 107, 108, 109]


def test_one_token_and_no_store(store):
    batch = rho1.Collator(store, pad_token_id=0)([{"input_ids": [3]}])
    assert batch["ref_nll"].isnan().all()
    assert "ref_nll" not in rho1.Collator(pad_token_id=0)([{"input_ids": ROWS[0]}])


def test_what_a_data_set_keeps_is_not_written_to(store):
    kept = np.asarray(ROWS[0])
    batch = rho1.Collator(store, pad_token_id=0)([{"input_ids": kept}])
    batch["labels"][:] = -100
    assert kept.tolist() == ROWS[0]


@pytest.mark.parametrize(
    ("feature", "text"),
    [
        ({"input_ids": [5, 6, 7]}, "a document of 3 tokens that begins with 5, 6, 7 is not in the scores"),
        ({"input_ids": []}, "input_ids must have at least one token, got none"),
        ({"input_ids": ROWS[0], "labels": [1, 2]}, "labels must have 5 entries, as input_ids, got 2"),
        (
            {"input_ids": ROWS[0], "attention_mask": [1]},
            "attention_mask must have 5 entries, as input_ids, got 1",
        ),
    ],
)
def test_rows_that_do_not_fit(feature, text, store):
    with pytest.raises(InputError, match=text):
        rho1.Collator(store, pad_token_id=0)([feature])


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match="max_length must be at least 2 tokens, got 1"):
        rho1.Collator(pad_token_id=0, max_length=1)
    with pytest.raises(InputError, match="pad_to_multiple_of must be at least 1, got 0"):
        rho1.Collator(pad_token_id=0, pad_to_multiple_of=0)


def test_the_method_needs_torch_alone_and_names_the_extra():
    script = """
import sys
for name in ("transformers", "accelerate", "matplotlib"):
    sys.modules[name] = None
from fastlm.methods import rho1
from fastlm.methods.rho1 import document_key
rho1.Collator(pad_token_id=0)
try:
    rho1.Trainer
except ImportError as error:
    assert "fastlm[hf]" in str(error), error
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
