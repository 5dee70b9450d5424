"""Batches of documents with their reference losses, for `Trainer` and for loops of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlm.methods.rho1.store import ScoreStore, document_key, open_scores
from fastlm.training.errors import InputError


class Collator:
    """Pads rows of one document each into a batch, and puts the reference loss of every prediction beside it.

    Documents are found in the store by their content, so order, splits and repetitions do not matter; but they must be the very token
    sequences that were scored. What is longer than `max_length` is cut here, after it was found.

    Args:
        store: what `rho1.score` wrote, opened or as its folder; None: no reference losses, for scores that need none.
        pad_token_id: what fills rows up; the model does not see it, `attention_mask` is 0 there.
        label_pad: label of padding. transformers and `Trainer` leave out -100, and nothing else.
        max_length: most tokens of a row.
        pad_to_multiple_of: row lengths are rounded up to it.

    Returns (on call):
        batch: of `features`, mappings with `input_ids` and perhaps `labels` (-100 where nothing is to be learnt, for instance
        in a prompt) and `attention_mask` (whose zeros are dropped):

        * `input_ids`: `(B, L)` int64.
        * `attention_mask`: `(B, L)` int64, 1 for tokens.
        * `labels`: `(B, L)` int64, not shifted: the model does that.
        * `ref_nll`: `(B, L)` float32, nats, **shifted**: `ref_nll[b, i]` belongs to the prediction that position i makes of
          `input_ids[b, i + 1]`. NaN in a row's last position and in padding: never eligible. Only with a store.

    Raises:
        InputError: a document that is not in the store, a row of fewer than one token, labels of another length, a row longer than
            the context that the reference model saw.
    """

    def __init__(
        self,
        store: ScoreStore | str | Path | None = None,
        *,
        pad_token_id: int,
        label_pad: int = -100,
        max_length: int | None = None,
        pad_to_multiple_of: int = 1,
    ) -> None:
        if max_length is not None and max_length < 2:
            raise InputError(f"Collator: max_length must be at least 2 tokens, got {max_length}")
        if pad_to_multiple_of < 1:
            raise InputError(f"Collator: pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
        if isinstance(store, str | Path):
            store = open_scores(store)
        self.store: ScoreStore | None = store
        self.pad_token_id, self.label_pad = pad_token_id, label_pad
        self.max_length, self.pad_to_multiple_of = max_length, pad_to_multiple_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [self._row(feature) for feature in features]
        longest = max(len(row.ids) for row in rows)
        multiple = self.pad_to_multiple_of
        shape = (len(rows), -(-longest // multiple) * multiple)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, self.label_pad, dtype=torch.int64),
        }
        if self.store is not None:
            batch["ref_nll"] = torch.full(shape, float("nan"), dtype=torch.float32)
        for b, row in enumerate(rows):
            length = len(row.ids)
            batch["input_ids"][b, :length] = torch.from_numpy(row.ids)
            batch["attention_mask"][b, :length] = 1
            batch["labels"][b, :length] = torch.from_numpy(row.labels)
            if row.ref_nll is not None:
                batch["ref_nll"][b, : length - 1] = torch.from_numpy(row.ref_nll)
        return batch

    def _row(self, feature: Mapping[str, Any]) -> _Row:
        ids = _integers(feature["input_ids"])
        labels = ids if feature.get("labels") is None else _integers(feature["labels"])
        if len(labels) != len(ids):
            raise InputError(
                f"Collator: labels must have {len(ids)} entries, as input_ids, got {len(labels)}"
            )
        if feature.get("attention_mask") is not None:
            real = _integers(feature["attention_mask"]) != 0
            if len(real) != len(ids):
                raise InputError(
                    f"Collator: attention_mask must have {len(ids)} entries, as input_ids, got {len(real)}"
                )
            ids, labels = ids[real], labels[real]
        if len(ids) == 0:
            raise InputError("Collator: input_ids must have at least one token, got none")
        kept = len(ids) if self.max_length is None else min(len(ids), self.max_length)
        context = None if self.store is None else self.store.context
        if context is not None and kept > context:
            raise InputError(
                f"Collator: expected rows of at most {context} tokens, since the reference model started anew every {context}, got a "
                f"row of {kept}; cut rows with max_length={context}, or score whole documents"
            )
        return _Row(ids[:kept], labels[:kept], self._scores(ids, kept))

    def _scores(self, ids: Any, kept: int) -> Any:
        if self.store is None:
            return None
        if kept < 2:
            return np.empty(0, np.float32)
        key = document_key(ids)
        if key not in self.store:
            beginning = ", ".join(str(token) for token in ids[:8])
            raise InputError(
                f"Collator: a document of {len(ids)} tokens that begins with {beginning} is not in the scores; expected the token "
                "sequences that were scored, whole (cut them with max_length)"
            )
        scores = np.asarray(self.store.nll(key, 0, kept - 1), np.float32)
        if len(scores) != kept - 1:
            raise InputError(
                f"Collator: expected {kept - 1} reference losses for a document of {len(ids)} tokens, found {len(scores)}"
            )
        return scores


class _Row:
    """One document's share of a batch."""

    def __init__(self, ids: Any, labels: Any, ref_nll: Any) -> None:
        self.ids, self.labels, self.ref_nll = ids, labels, ref_nll


def _integers(values: Any) -> Any:
    if isinstance(values, Tensor):
        values = values.cpu().numpy()
    # a copy, so that what a data set keeps is never written to
    return np.array(values, dtype=np.int64).reshape(-1)
