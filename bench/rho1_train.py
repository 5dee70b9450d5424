"""Runs of `bench.rho1`: what they share, training, evaluation, and what a run leaves for others."""

from __future__ import annotations

import io
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.rho1_corpus import DOCUMENT_KINDS, Documents, LabelledCorpus
from bench.rho1_noise import KINDS
from bench.rho1_select import SHOWN, VARIANTS, Batch, SelectionLog, chosen, score_of
from fastlm import ops
from fastlm.training.atomic import write_bytes
from fastlm.training.batches import IGNORE_INDEX, PackedRow, PackedSampler, evaluation_rows, pack
from fastlm.training.evaluation import autocast
from fastlm.training.schedule import learning_rate


@dataclass(frozen=True)
class Sizes:
    """What all runs share."""

    steps: int = 160
    batch_tokens: int = 2048
    seq_len: int = 128
    evaluations: int = 16  # at equal distances, the last one after the last step
    eval_tokens: int = 12_288  # of clean held-out text, watched during training
    noise_eval_tokens: int = 4_096
    final_eval_tokens: int = 65_536
    final_noise_eval_tokens: int = 32_768
    lr: float = 3e-3  # peak; see docs/methods/rho1_experiment.md
    warmup_steps: int = 16
    continual_steps: int = 80
    continual_lr: float = 1e-3
    hidden_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    sliding_window: int = 128
    intermediate_size: int = 384
    dtype: str = "bf16"

    def model(self, vocab_size: int) -> Any:
        """The configuration of every model."""
        from fastlm.models import SambaConfig

        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "sliding_window",
            "intermediate_size",
        )
        values = {name: getattr(self, name) for name in names}
        return SambaConfig(vocab_size=vocab_size, num_key_value_heads=self.num_attention_heads // 2, **values)


class Rows:
    """Batches by number; of one seed the same for every variant."""

    def __init__(self, side: Documents, sizes: Sizes, seed: int) -> None:
        # The order depends on lengths and seed alone, so the three samplers give the same pieces.
        cut = {"row_tokens": sizes.batch_tokens, "seq_len": sizes.seq_len, "seed": seed}
        self._samplers = [PackedSampler(view, **cut) for view in _views(side)]

    def batch(self, number: int) -> Batch:
        """The batch at position `number`."""
        return _batch([sampler.row(number) for sampler in self._samplers])


def held_out(side: Documents, sizes: Sizes, max_tokens: int) -> list[Batch]:
    """The fixed batches of an evaluation; whole documents, kinds of them mixed."""
    cut = {"row_tokens": sizes.batch_tokens, "seq_len": sizes.seq_len}
    rows = evaluation_rows(side, max_tokens=max_tokens, **cut)  # type: ignore[arg-type]
    return [_batch([pack(view, pieces) for view in _views(side)]) for pieces in rows]


def _views(side: Documents) -> Any:
    return [side.giving(which) for which in ("tokens", "labels", "kinds")]


def _batch(rows: list[PackedRow]) -> Batch:
    tokens = rows[0]
    borders = tokens.cu_seqlens.long()
    positions = torch.arange(int(borders[-1])) - borders[:-1].repeat_interleave(borders.diff())
    shifted = (row.shift_labels[0] for row in rows)
    return Batch(tokens.input_ids, tokens.cu_seqlens, *shifted, positions)


def token_losses(model: Any, batch: Batch, sizes: Sizes, *, entropy: bool = False) -> Any:
    """Nats of every target `(T,)` float32, 0 where there is none; with `entropy` also that of each prediction.

    Reference and trained model both go through here: pieces, arithmetic and rounding are the same.
    """
    with autocast(sizes.dtype):
        hidden = model.model(batch.input_ids, cu_seqlens=batch.cu_seqlens)[0]
        weight, bias = model.output_weight, model.output_bias
        return ops.linear_nll(hidden, weight, batch.labels, bias, return_entropy=entropy)


@torch.no_grad()
def evaluate(model: Any, batches: list[Batch], sizes: Sizes, byte_counts: Tensor) -> dict[str, Any]:
    """Loss on held-out batches: nats per token, bits per byte, and nats per token by kind."""
    model.eval()
    nats = torch.zeros(len(KINDS), dtype=torch.float64)
    tokens = torch.zeros(len(KINDS), dtype=torch.float64)
    num_bytes = 0
    for batch in batches:
        nll, seen = token_losses(model, batch, sizes), batch.eligible
        nats.index_add_(0, batch.kinds[seen], nll[seen].double())
        tokens += batch.kinds[seen].bincount(minlength=len(KINDS))
        num_bytes += int(byte_counts[batch.labels[seen]].sum())
    model.train()
    total = float(nats.sum())
    return {
        "loss": round(total / float(tokens.sum()), 5),
        "bits": round(total / math.log(2) / num_bytes, 5),
        "tokens": int(tokens.sum()),
        "by_kind": {
            kind: round(float(nats[i] / tokens[i]), 4) for i, kind in enumerate(KINDS) if tokens[i] > 0
        },
    }


def train(name: str, seed: int, sizes: Sizes, corpus: LabelledCorpus, work: Path) -> dict[str, Any]:
    """One run: its record. Leaves its final weights and, where others need them, its scores in `work`."""
    variant = VARIANTS[name]
    begin = time.process_time()
    model = new_model(sizes, corpus, seed)
    if variant.begin:
        model.load_state_dict(torch.load(weights_file(work, variant.begin, seed), weights_only=True))
    scores = None
    if variant.reference:
        with np.load(scores_file(work, variant.reference, seed), allow_pickle=False) as stored:
            scores = {key: torch.from_numpy(stored[key]) for key in stored.files}
    steps = sizes.continual_steps if variant.continued else sizes.steps
    peak = sizes.continual_lr if variant.continued else sizes.lr
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    # The second stage goes on where the first stopped reading.
    first = sizes.steps if variant.continued and variant.text == "train" else 0
    rows = Rows(corpus.sides[variant.text], sizes, seed)
    byte_counts = torch.tensor([len(piece) for piece in corpus.spelling])
    watched = {
        "clean": held_out(corpus.sides["held-out"], sizes, sizes.eval_tokens),
        "noise": held_out(corpus.sides["noise held-out"], sizes, sizes.noise_eval_tokens),
    }
    marks = {steps * (i + 1) // sizes.evaluations for i in range(sizes.evaluations)}
    log, curve = SelectionLog(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            warmup = min(sizes.warmup_steps, steps // 4)
            group["lr"] = learning_rate(step, warmup, steps, peak=peak, min_ratio=0.1)
        batch = rows.batch(first + step)
        nll = token_losses(model, batch, sizes)
        ref, entropy = (scores[key][step] for key in ("nll", "entropy")) if scores else (None, None)
        draw = torch.Generator().manual_seed(seed + 1_000_003 * (step + 1))
        score = score_of(variant.rule, batch.eligible, nll, ref, entropy, draw)
        mask = chosen(variant, batch, score)
        # The mean over the selected tokens: the gradient of the others is exactly 0.
        loss = torch.where(mask, nll, 0).sum() / mask.sum().clamp_min(1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log.add(batch, mask, nll, score)
        if step + 1 in marks:
            found = {side: evaluate(model, batches, sizes, byte_counts) for side, batches in watched.items()}
            losses = {f"{side}_{key}": found[side][key] for side in found for key in ("loss", "bits")}
            curve.append({"step": step + 1, **losses, **log.read()})
    record = {
        "variant": name,
        "seed": seed,
        "parameters": model.num_parameters(),
        "train_seconds": round(time.process_time() - begin, 1),
        "curve": curve,
        "final": {
            "clean": _final(model, corpus, sizes, "held-out", sizes.final_eval_tokens),
            "noise": _final(model, corpus, sizes, "noise held-out", sizes.final_noise_eval_tokens),
        },
    }
    if name in KEPT:
        save_weights(model, weights_file(work, name, seed))
    if variant.scores:
        number = sizes.steps if variant.scores == "first" else sizes.continual_steps
        start = 0 if variant.scores == "first" else sizes.steps
        write_scores(
            model,
            Rows(corpus.sides["train"], sizes, seed),
            range(start, start + number),
            sizes,
            scores_file(work, name, seed),
        )
    record["cpu_seconds"] = round(time.process_time() - begin, 1)
    return record


# Runs whose final weights others begin from, score with, or show.
KEPT = {name for variant in VARIANTS.values() for name in variant.needs} | {SHOWN}


def _final(model: Any, corpus: LabelledCorpus, sizes: Sizes, side: str, max_tokens: int) -> dict[str, Any]:
    byte_counts = torch.tensor([len(piece) for piece in corpus.spelling])
    return evaluate(model, held_out(corpus.sides[side], sizes, max_tokens), sizes, byte_counts)


def new_model(sizes: Sizes, corpus: LabelledCorpus, seed: int) -> Any:
    """The model that all runs of a seed begin with."""
    from fastlm.models import SambaForCausalLM

    torch.manual_seed(seed)
    return SambaForCausalLM(sizes.model(corpus.vocab_size)).train()


def weights_file(work: Path, name: str, seed: int) -> Path:
    """Final weights of a run."""
    return work / f"{name}-{seed}.pt"


def scores_file(work: Path, name: str, seed: int) -> Path:
    """Losses and entropies that the final model of a run gives the training rows, `(steps, T)` float32 each."""
    return work / f"{name}-{seed}-scores.npz"


def artefacts(work: Path, name: str, seed: int) -> list[Path]:
    """Files that a finished run has left."""
    return [weights_file(work, name, seed)] * (name in KEPT) + [scores_file(work, name, seed)] * bool(
        VARIANTS[name].scores
    )


def save_weights(model: Any, path: Path) -> None:
    """All or nothing, as the scores."""
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    write_bytes(path, content.getvalue())


@torch.no_grad()
def write_scores(model: Any, rows: Rows, numbers: range, sizes: Sizes, path: Path) -> None:
    """Scores of the batches `numbers`."""
    model.eval()
    found = [token_losses(model, rows.batch(number), sizes, entropy=True) for number in numbers]
    model.train()
    content = io.BytesIO()
    nll, entropy = (torch.stack(values).numpy() for values in zip(*found, strict=True))
    np.savez(content, nll=nll, entropy=entropy)
    write_bytes(path, content.getvalue())


@torch.no_grad()
def shown_documents(
    corpus: LabelledCorpus, sizes: Sizes, work: Path, seed: int, most: dict[str, int]
) -> list[dict[str, Any]]:
    """Held-out documents token by token: both models' losses and which tokens `SHOWN` would select of all.

    `most` are tokens by kind of document, that of `""` for all others. Every entry of `tokens` is (its bytes, written as Latin-1;
    loss, reference loss, selected, kind).
    """
    variant, side = VARIANTS[SHOWN], corpus.sides["page"]
    kinds_of = [DOCUMENT_KINDS[kind] for kind in side.document_kinds]
    batches, losses = [], []
    for i, (kind, length) in enumerate(zip(kinds_of, side.lengths.tolist(), strict=True)):
        end = min(length, most.get(kind, most[""]))
        pieces = [(i, start, min(start + sizes.seq_len, end)) for start in range(0, end, sizes.seq_len)]
        batches.append(_batch([pack(view, pieces) for view in _views(side)]))
    for name in (SHOWN, variant.reference):
        model = new_model(sizes, corpus, seed)
        model.load_state_dict(torch.load(weights_file(work, str(name), seed), weights_only=True))
        model.eval()
        losses.append(torch.cat([token_losses(model, batch, sizes) for batch in batches]))
    labels, kinds = (torch.cat([getattr(batch, part) for batch in batches]) for part in ("labels", "kinds"))
    mask = ops.select_tokens(losses[0] - losses[1], labels != IGNORE_INDEX, keep_ratio=variant.keep)
    documents, at = [], 0
    for i, batch in enumerate(batches):
        here = range(at, at + len(batch.labels))
        at = here.stop
        documents.append(
            {
                "name": corpus.manifest["page"][i],
                "kind": kinds_of[i],
                "tokens": [
                    [
                        corpus.spelling[int(labels[t])].decode("latin-1"),
                        round(float(losses[0][t]), 3),
                        round(float(losses[1][t]), 3),
                        int(mask[t]),
                        int(kinds[t]),
                    ]
                    for t in here
                    if int(labels[t]) != IGNORE_INDEX
                ],
            }
        )
    return documents
