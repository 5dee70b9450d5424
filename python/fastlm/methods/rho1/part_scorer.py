"""The losses of one part: which tokens go through the model together, and the model itself.

What is computed together depends on the part alone, never on who computes it or what came before, so a part has the same bits in
every run. No logits are stored: hidden states go into the fused loss (`ops.linear_nll`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.methods.rho1.gather import GatheredTokens
from fastlm.methods.rho1.head import captured_inputs, head_inputs, measure_logits, only, output_projection
from fastlm.methods.rho1.score_files import Layout, Manifest, Values
from fastlm.models.samba import SambaForCausalLM
from fastlm.training.errors import InputError

IGNORE_INDEX = -100
PADDING_SHARE = 16  # rows of a batch may differ in length by one sixteenth
_VOLATILE = ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype", "use_cache")
Between = Callable[[int], None]  # called after every batch with its number of predictions; may raise to stop
Piece = tuple[int, int, int]  # (document, first position, one past the last)


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class, parameters and fingerprint (sha256 of configuration and weights) of a model.

    Raises:
        InputError: it is neither a `SambaForCausalLM` nor a causal language model of transformers.
    """
    if isinstance(model, SambaForCausalLM):
        config = asdict(model.config)
    elif hasattr(getattr(model, "config", None), "to_dict"):
        try:
            output_projection(model)
        except ValueError as error:
            raise InputError(f"model: {error}") from error
        every = cast("Any", model).config.to_dict()
        config = {name: value for name, value in every.items() if name not in _VOLATILE}
    else:
        raise InputError(
            f"model: expected a SambaForCausalLM or a causal language model of transformers, got {type(model).__name__}"
        )
    total = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        total.update(content.numpy().data)
    return {
        "model": total.hexdigest(),
        "model_class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def check_fits(model: nn.Module, tokens: GatheredTokens, context: int | None) -> None:
    """Token ids and lengths are such that the model can read them.

    Raises:
        InputError: says which is too large, and what to do.
    """
    config: Any = model.config
    samba = isinstance(model, SambaForCausalLM)
    config = config if samba else config.get_text_config()
    if tokens.largest >= config.vocab_size:
        raise InputError(
            f"corpus: expected token ids below {config.vocab_size}, the model's vocabulary, got {tokens.largest}; "
            "use the tokenizer that the model was trained with"
        )
    positions = None if samba else getattr(config, "max_position_embeddings", None)
    if positions is None or "samba" in str(getattr(config, "model_type", "")):
        return  # nothing in a Samba depends on a position's number
    longest = int(tokens.lengths.max()) - 1 if context is None else context
    if longest > positions:
        given = "None, with documents of up to" if context is None else ""
        raise InputError(
            f"context: expected at most {positions} tokens, the positions of the model, got {given} {longest}".replace(
                "  ", " "
            )
        )


class PartScorer:
    """Computes the tensors of parts with one model.

    Args:
        model: in any mode; it is in evaluation mode while it scores.
        tokens, layout: of the corpus.
        manifest: what is computed, and in which batches.
    """

    def __init__(self, model: nn.Module, tokens: GatheredTokens, layout: Layout, manifest: Manifest) -> None:
        self.model: Any = model
        self.tokens, self.layout, self.manifest = tokens, layout, manifest
        self.device = next(model.parameters()).device
        self.is_samba = isinstance(model, SambaForCausalLM)
        if not self.is_samba:
            with self._arithmetic():
                try:
                    self.form = measure_logits(model, model.forward)
                except ValueError as error:
                    raise InputError(f"model: {error}") from error

    @torch.inference_mode()
    def score(self, part: int, between: Between) -> dict[str, Values]:
        """`nll`, and `entropy` if the manifest says so: `(values of the part,)` float32, in nats."""
        size = int(self.layout.bounds[part + 1] - self.layout.bounds[part])
        names = ("nll", "entropy")[: 1 + self.manifest.entropy]
        out = {name: np.empty(size, np.float32) for name in names}
        pieces = self.layout.pieces_of(part, self.manifest.context)
        batches = self._packed(pieces, out) if self.is_samba else self._rows(pieces, out)
        with evaluation_mode(self.model), self._arithmetic():
            for predictions in batches:
                between(predictions)
        return out

    def _arithmetic(self) -> AbstractContextManager[object]:
        weights = next(self.model.parameters()).dtype
        if self.manifest.dtype == "bf16" and weights == torch.float32:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    # Samba: pieces of any length, one after the other

    def _packed(self, pieces: list[Piece], out: dict[str, Values]) -> Iterator[int]:
        done = 0
        for batch in packed_batches(pieces, self.manifest.batch_tokens):
            ids, labels, ends = [], [], [0]
            for document, start, stop in batch:
                first = int(self.tokens.offsets[document]) + start
                block = self.tokens.tokens[first : first + stop - start + 1]
                ids.append(block[:-1])
                labels.append(block[1:])
                ends.append(ends[-1] + stop - start)
            hidden = self.model.model(
                self._tensor(np.concatenate(ids)).unsqueeze(0),
                cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=self.device),
            )
            found = self._losses(
                hidden[0],
                self.model.output_weight.to(hidden.dtype),
                self._tensor(np.concatenate(labels)),
                self.model.output_bias,
                0.0,
            )
            for name, values in found.items():
                out[name][done : done + ends[-1]] = values
            done += ends[-1]
            yield ends[-1]

    # transformers: rows of (nearly) equal length

    def _rows(self, pieces: list[Piece], out: dict[str, Values]) -> Iterator[int]:
        lengths = np.asarray([stop - start for _, start, stop in pieces], np.int64)
        places = np.cumsum(lengths) - lengths
        head = output_projection(self.model)
        for rows in row_batches(lengths, self.manifest.batch_tokens):
            longest = int(lengths[rows[0]])
            ids = np.zeros((len(rows), longest), np.int64)
            targets = np.full((len(rows), longest), IGNORE_INDEX, np.int64)
            mask = np.zeros((len(rows), longest), np.int64)
            for b, row in enumerate(rows):
                document, start, stop = pieces[row]
                first = int(self.tokens.offsets[document]) + start
                block = self.tokens.tokens[first : first + stop - start + 1]
                ids[b, : stop - start], targets[b, : stop - start] = block[:-1], block[1:]
                mask[b, : stop - start] = 1
            padded = int(lengths[rows[-1]]) < longest
            with captured_inputs(head) as found:
                self.model(
                    input_ids=self._tensor(ids),
                    attention_mask=self._tensor(mask) if padded else None,
                    use_cache=False,
                )
            parts = head_inputs(self.model, self.form, only(found, self.model), self._tensor(targets))
            losses = self._losses(
                parts.hidden.flatten(0, 1), parts.weight, parts.targets.flatten(), parts.bias, parts.softcap
            )
            for name, values in losses.items():
                table = values.reshape(len(rows), longest)
                for b, row in enumerate(rows):
                    out[name][places[row] : places[row] + lengths[row]] = table[b, : lengths[row]]
            yield int(lengths[rows].sum())

    def _losses(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float
    ) -> dict[str, Values]:
        if self.manifest.entropy:
            nll, entropy = ops.linear_nll(hidden, weight, labels, bias, softcap=softcap, return_entropy=True)
            return {"nll": _values(nll), "entropy": _values(entropy)}
        return {"nll": _values(ops.linear_nll(hidden, weight, labels, bias, softcap=softcap))}

    def _tensor(self, values: Any) -> Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(self.device)


def packed_batches(pieces: list[Piece], batch_tokens: int) -> Iterator[list[Piece]]:
    """Consecutive pieces, together at most `batch_tokens`; a longer piece is alone."""
    batch: list[Piece] = []
    held = 0
    for piece in pieces:
        size = piece[2] - piece[1]
        if batch and held + size > batch_tokens:
            yield batch
            batch, held = [], 0
        batch.append(piece)
        held += size
    if batch:
        yield batch


def row_batches(lengths: Any, batch_tokens: int) -> Iterator[Any]:
    """Rows for one forward pass, by number: the longest first, of nearly equal length, together at most `batch_tokens`."""
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        longest = int(lengths[order[at]])
        count = max(1, batch_tokens // longest)
        batch = order[at : at + count]
        batch = batch[lengths[batch] * PADDING_SHARE >= longest * (PADDING_SHARE - 1)]
        yield batch
        at += len(batch)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module of the model in evaluation mode, put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _values(tensor: Tensor) -> Values:
    values: Values = tensor.float().cpu().numpy()
    return values
