"""Token dynamics: how the loss of each single token moves while a model trains.

A line is fitted to a token's losses over the checkpoints. Where it falls by more than 0.2 nats between the first and the last
checkpoint the token was learnt (H→L), where it rises by as much it was unlearnt (L→H); the others stay as they are, low (L→L)
if their last loss is at most the mean of all tokens' last losses, high (H→H) if not.

Source: Lin et al., arXiv 2404.07965, section 2.1 and appendix D.1. What the last loss is compared with, we read as the mean over
all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from fastlm.models.samba import SambaForCausalLM
from fastlm.training.batches import IGNORE_INDEX, Piece, evaluation_rows, pack
from fastlm.training.checkpoint import CheckpointFolder
from fastlm.training.corpus import find_corpus, read_documents
from fastlm.training.data import open_data
from fastlm.training.errors import InputError
from fastlm.training.evaluation import autocast
from fastlm.training.loading import load_run
from fastlm.training.shards import ShardWriter, TokenStore
from fastlm.training.tokenizer import mark_of, spelling_of

CLASSES = ("H→L", "L→H", "L→L", "H→H")
MEANINGS = ("learnt", "unlearnt", "known throughout", "never learnt")
THRESHOLD = 0.2  # nats
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenDynamics:
    """Tokens by the course of their loss.

    Attributes:
        classes: `(tokens,)` int8, index into `CLASSES`.
        change: `(tokens,)` nats, of the fitted line from the first to the last checkpoint.
        mean_loss: `(4, checkpoints)` nats, mean over each class; NaN for a class without tokens.
        threshold: nats.
    """

    classes: npt.NDArray[np.int8]
    change: Floats
    mean_loss: Floats
    threshold: float

    @property
    def counts(self) -> dict[str, int]:
        """Tokens of each class."""
        found = np.bincount(self.classes, minlength=len(CLASSES))
        return {name: int(count) for name, count in zip(CLASSES, found, strict=True)}

    @property
    def shares(self) -> dict[str, float]:
        """The same as shares of all tokens."""
        return {name: count / len(self.classes) for name, count in self.counts.items()}


def token_dynamics(
    losses: npt.ArrayLike, *, positions: Sequence[float] | None = None, threshold: float = THRESHOLD
) -> TokenDynamics:
    """Sorts tokens into four classes by the course of their loss.

    Args:
        losses: `(checkpoints, tokens)` nats, in the order of training; at least 2 checkpoints and 1 token, all finite.
        positions: of the checkpoints, ascending (steps, or tokens read); default: evenly spaced, as in the paper.
        threshold: change of the fitted line, in nats, that counts as one.

    Returns:
        dynamics: see `TokenDynamics`.

    Raises:
        ValueError: another shape, losses that are not finite, positions that do not ascend, a negative threshold.

    Example:
        >>> import numpy as np
        >>> losses = np.array([[5.0, 1.0, 0.5, 6.0], [3.0, 2.0, 0.6, 6.1], [1.0, 3.0, 0.5, 6.0]])
        >>> [CLASSES[c] for c in token_dynamics(losses).classes]
        ['H→L', 'L→H', 'L→L', 'H→H']
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 1:
        raise ValueError(
            "token_dynamics: losses must have shape (checkpoints, tokens) with at least 2 checkpoints and 1 token, "
            f"got {values.shape}"
        )
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise ValueError(f"token_dynamics: losses must be finite, got {wrong} that are not")
    if not threshold >= 0:
        raise ValueError(f"token_dynamics: threshold must be at least 0, got {threshold}")
    x = np.arange(len(values), dtype=np.float64) if positions is None else np.asarray(positions, np.float64)
    if x.shape != (len(values),) or not (np.diff(x) > 0).all():
        raise ValueError(
            f"token_dynamics: positions must be {len(values)} ascending numbers, one per checkpoint, got {list(x)}"
        )
    centred = x - x.mean()
    slope = centred @ (values - values.mean(0)) / (centred @ centred)  # least squares
    change = slope * (x[-1] - x[0])
    low = values[-1] <= values[-1].mean()
    classes = np.where(change < -threshold, 0, np.where(change > threshold, 1, np.where(low, 2, 3))).astype(
        np.int8
    )
    means = np.full((len(CLASSES), len(values)), np.nan)
    for number in range(len(CLASSES)):
        members = classes == number
        if members.any():
            means[number] = values[:, members].mean(1)
    return TokenDynamics(classes, change, means, threshold)


@dataclass(frozen=True)
class LossHistory:
    """Losses of the same tokens by several models.

    Attributes:
        names: of the models, in the order of training.
        steps: of the checkpoints, or None where they are not those of one run.
        losses: `(models, tokens)` float32, nats.
        tokens: `(tokens,)` int64, the predicted tokens.
        documents: `(first, stop)` in `tokens` for every document or part of one; `before[i]` is the token before `first`.
        before: see there.
        spelling: bytes of every token of the vocabulary.
    """

    names: tuple[str, ...]
    steps: tuple[int, ...] | None
    losses: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int64]
    documents: tuple[tuple[int, int], ...]
    before: tuple[int, ...]
    spelling: tuple[bytes, ...]


def losses_over_training(
    runs: Sequence[Path],
    data: Path | None = None,
    *,
    max_tokens: int = 65_536,
    seq_len: int = 512,
    batch_tokens: int = 2048,
    dtype: str = "fp32",
    report: Callable[[str], None] | None = None,
) -> LossHistory:
    """Losses of the tokens of a text by every checkpoint of a run, or by several models one after the other.

    Args:
        runs: one folder of a run, whose checkpoints are taken (train with `--keep-checkpoints 0` to have them all), or at least
            two folders of runs, checkpoints or models in the order of training.
        data: folder or file of text that no model was trained on; None: the held-out text of the first run.
        max_tokens: most tokens that are read, from a fixed mixture of the documents.
        seq_len: tokens of one piece; the model's state restarts with every piece.
        batch_tokens: tokens of one forward pass.
        dtype: `fp32` or `bf16`.
        report: called with one line per model.

    Returns:
        history: see `LossHistory`.

    Raises:
        InputError: fewer than two models, different tokenizers, no text.
    """
    folders, steps = _models(runs)
    with TemporaryDirectory() as scratch:
        first = load_run(folders[0])
        store = _text(runs[0], data, first.tokenizer, Path(scratch))
        rows = evaluation_rows(store, row_tokens=batch_tokens, seq_len=seq_len, max_tokens=max_tokens)
        tokens, documents, before = _layout(store, rows)
        if not len(tokens):
            raise InputError("--data: expected text of at least two tokens, found less")
        losses = np.empty((len(folders), len(tokens)), np.float32)
        for number, folder in enumerate(folders):
            loaded = first if number == 0 else load_run(folder)
            if loaded.tokenizer.to_str() != first.tokenizer.to_str():
                raise InputError(
                    f"RUN: expected models of one tokenizer, that of {folders[0]}, found another one in {folder}"
                )
            losses[number] = _losses(loaded.model, store, rows, dtype)
            if report is not None:
                report(f"{folder.name}: {losses[number].mean():.3f} nats per token")
    names = tuple(folder.name for folder in folders)
    return LossHistory(
        names if len(set(names)) == len(names) else tuple(str(folder) for folder in folders),
        steps,
        losses,
        tokens,
        documents,
        before,
        tuple(spelling_of(first.tokenizer)),
    )


def _models(runs: Sequence[Path]) -> tuple[list[Path], tuple[int, ...] | None]:
    """Folders of the models in order, and their steps if they are one run's."""
    if len(runs) > 1:
        return list(runs), None
    if not runs:
        raise InputError("RUN: expected a run, or several models in the order of training, got none")
    checkpoints = CheckpointFolder(runs[0])
    steps = checkpoints.steps()
    if len(steps) < 2:
        raise InputError(
            f"RUN: expected a run with at least 2 checkpoints in {runs[0]}, found {len(steps)}; a run keeps them "
            "with --keep-checkpoints 0 and --checkpoint-steps"
        )
    return [checkpoints.folder(step) for step in steps], tuple(steps)


def _text(run: Path, data: Path | None, tokenizer: Tokenizer, scratch: Path) -> TokenStore:
    """The documents to read."""
    if data is None:
        if not (run / "data").is_dir():
            raise InputError(f"--data: expected text, since {run} is no run with held-out text of its own")
        return open_data(run / "data").held_out
    corpus = find_corpus(data, held_out=0.5)  # both sides are read, so the share does not matter
    mark = mark_of(tokenizer)
    writer = ShardWriter(scratch, "text", tokenizer.get_vocab_size())
    for file in sorted((*corpus.train, *corpus.held_out), key=lambda file: (file.name, file.start)):
        for text in read_documents(file):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            writer.add([mark, *ids, mark], len(text.encode()))
    writer.close()
    return TokenStore(scratch, "text")


def _layout(
    store: TokenStore, rows: list[list[Piece]]
) -> tuple[npt.NDArray[np.int64], tuple[tuple[int, int], ...], tuple[int, ...]]:
    """The predicted tokens, where each document's begin and end among them, and the token before."""
    parts: list[npt.NDArray[np.int64]] = []
    documents: list[tuple[int, int]] = []
    before: list[int] = []
    total, open_document, next_token = 0, -1, -1
    for document, start, stop in (piece for row in rows for piece in row):
        text = store.tokens(document, start, stop + 1)
        if document == open_document and start == next_token:
            documents[-1] = (documents[-1][0], total + len(text) - 1)
        elif len(text) > 1:
            documents.append((total, total + len(text) - 1))
            before.append(int(text[0]))
        parts.append(text[1:])
        total += len(text) - 1
        open_document, next_token = document, stop
    return np.concatenate(parts) if parts else np.empty(0, np.int64), tuple(documents), tuple(before)


@torch.no_grad()
def _losses(
    model: SambaForCausalLM, store: TokenStore, rows: list[list[Piece]], dtype: str
) -> npt.NDArray[np.float32]:
    """Loss of every predicted token, in the order of `_layout`."""
    found = []
    for pieces in rows:
        row = pack(store, pieces)
        with autocast(dtype):
            hidden = model.model(row.input_ids, cu_seqlens=row.cu_seqlens)
            nll = model.loss(hidden, shift_labels=row.shift_labels, reduction="none")
        found.append(nll.flatten()[row.shift_labels.flatten() != IGNORE_INDEX].float())
    return torch.cat(found).numpy()
