"""Results in float64 on the device, in pieces that fit its memory: what contenders are held to at full size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .case import BACKWARD, FORWARD, Inputs, Results

_SCAN_ELEMENTS = 1 << 26  # channels x positions x states of a piece: half a gigabyte each tensor
_ALONG_CHANNELS = {"u": 1, "delta": 1, "z": 1, "A": 0, "D": 0, "delta_bias": 0}


def scan(inputs: Inputs, part: str, upstream: tuple[Tensor, ...], gradients: tuple[str, ...]) -> Results:
    """A selective scan with softplus and gate, some channels at a time; B and C gather their gradients from all."""
    from fastlm.demo.plain_samba import plain_scan

    B, D, L = inputs["u"].shape
    N = inputs["A"].shape[1]
    step = max(1, min(D, _SCAN_ELEMENTS // (B * L * N)))
    pieces: dict[str, list[Tensor]] = {name: [] for name in ("out", *(f"d{g}" for g in gradients))}
    sums: Results = {}
    for begin in range(0, D, step):
        part_of = {
            name: _piece(a, name, begin, min(step, D - begin)).double().detach() for name, a in inputs.items()
        }
        if part == BACKWARD:
            part_of = {name: a.requires_grad_(name in gradients) for name, a in part_of.items()}
        with torch.set_grad_enabled(part == BACKWARD):
            dt = functional.softplus(part_of["delta"] + part_of["delta_bias"][:, None])
            maps = (part_of[name].transpose(1, 2) for name in ("B", "C"))
            y = plain_scan(part_of["u"], dt, part_of["A"], *maps)
            out = (y + part_of["D"][:, None] * part_of["u"]) * functional.silu(part_of["z"])
        if part != BACKWARD:
            pieces["out"].append(out)
            continue
        dout = upstream[0][:, begin : begin + step].double()
        found = torch.autograd.grad(out, [part_of[g] for g in gradients], dout)
        for name, g in zip(gradients, found, strict=True):
            if name in _ALONG_CHANNELS:
                pieces[f"d{name}"].append(g)
            else:
                sums[f"d{name}"] = sums[f"d{name}"] + g if f"d{name}" in sums else g
    if part != BACKWARD:
        return {"out": torch.cat(pieces["out"], dim=1).float()}
    joined = {
        f"d{name}": torch.cat(pieces[f"d{name}"], dim=_ALONG_CHANNELS[name]).float()
        for name in gradients
        if name in _ALONG_CHANNELS
    }
    return joined | sums


def _piece(a: Tensor, name: str, begin: int, count: int) -> Tensor:
    return a.narrow(_ALONG_CHANNELS[name], begin, count) if name in _ALONG_CHANNELS else a


def attention(inputs: Inputs, window: int, part: str, upstream: tuple[Tensor, ...]) -> Results:
    """Causal attention over a window of `window` tokens, some queries and one group of heads at a time."""
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    _, L, H, K = q.shape
    group = H // k.shape[2]
    rows = min(L, 1024)
    results = {"out": torch.empty(q.shape, dtype=torch.float32, device=q.device)}
    if part == BACKWARD:
        results = {
            name: torch.zeros(t.shape, dtype=torch.float64, device=q.device)
            for name, t in (("dq", q), ("dk", k), ("dv", v))
        }
    for head in range(k.shape[2]):
        heads = slice(head * group, (head + 1) * group)
        for begin in range(0, L, rows):
            end = min(L, begin + rows)
            first = max(0, begin - window + 1)
            qs = q[:, begin:end, heads].double().detach()
            ks, vs = (t[:, first:end, head : head + 1].double().detach() for t in (k, v))
            leaves = [t.requires_grad_(part == BACKWARD) for t in (qs, ks, vs)]
            with torch.set_grad_enabled(part == BACKWARD):
                scores = torch.einsum("bihk,bjgk->bhij", qs, ks) * K**-0.5
                distance = torch.arange(begin, end, device=q.device)[:, None] - torch.arange(
                    first, end, device=q.device
                )
                hidden = (distance < 0) | (distance >= window)
                p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
                out = torch.einsum("bhij,bjgk->bihk", p, vs)
            if part != BACKWARD:
                results["out"][:, begin:end, heads] = out.float()
                continue
            dout = upstream[0][:, begin:end, heads].double()
            dq, dk, dv = torch.autograd.grad(out, leaves, dout)
            results["dq"][:, begin:end, heads] += dq
            results["dk"][:, first:end, head : head + 1] += dk
            results["dv"][:, first:end, head : head + 1] += dv
    return results


def conv(inputs: Inputs, part: str, upstream: tuple[Tensor, ...], gradients: tuple[str, ...]) -> Results:
    """Depthwise causal convolution and silu, some channels at a time."""
    x = inputs["x"]
    B, D, L = x.shape
    step = max(1, min(D, (1 << 27) // (B * L)))
    pieces: dict[str, list[Tensor]] = {}
    for begin in range(0, D, step):
        end = min(D, begin + step)
        leaves = {
            "x": x[:, begin:end].double().detach(),
            "weight": inputs["weight"][begin:end].double().detach(),
            "bias": inputs["bias"][begin:end].double().detach(),
        }
        leaves = {name: t.requires_grad_(part == BACKWARD) for name, t in leaves.items()}
        with torch.set_grad_enabled(part == BACKWARD):
            width = leaves["weight"].shape[1]
            y = functional.conv1d(
                leaves["x"], leaves["weight"][:, None], leaves["bias"], padding=width - 1, groups=end - begin
            )
            out = functional.silu(y[..., :L])
        found: dict[str, Any] = {"out": out.float()}
        if part == BACKWARD:
            grads = torch.autograd.grad(
                out, [leaves[g] for g in gradients], upstream[0][:, begin:end].double()
            )
            found = {f"d{name}": g for name, g in zip(gradients, grads, strict=True)}
        for name, t in found.items():
            pieces.setdefault(name, []).append(t)
    along = {"out": 1, "dx": 1, "dweight": 0, "dbias": 0}
    return {name: torch.cat(parts, dim=along[name]) for name, parts in pieces.items()}


def experts(inputs: Inputs, part: str, upstream: tuple[Tensor, ...], gradients: tuple[str, ...]) -> Results:
    """Gated experts and the weighted sum, one expert at a time."""
    x, ids = inputs["hidden_states"], inputs["topk_ids"]
    exact = {"hidden_states": x.double(), "topk_weights": inputs["topk_weights"].double()}
    backward = part == BACKWARD
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    found: Results = {f"d{name}": torch.zeros_like(exact[name]) for name in exact} if backward else {}
    shared = {
        name: torch.zeros_like(inputs[name], dtype=torch.float32) for name in ("gate_up_proj", "down_proj")
    }
    for e in range(len(inputs["down_proj"])):
        token, pick = (ids == e).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        leaves = [
            exact["hidden_states"][token],
            exact["topk_weights"][token, pick],
            inputs["gate_up_proj"][e].double(),
            inputs["down_proj"][e].double(),
        ]
        leaves = [t.detach().requires_grad_(backward) for t in leaves]
        rows, weights, gate_up, down = leaves
        with torch.set_grad_enabled(backward):
            gate, up = functional.linear(rows, gate_up).chunk(2, -1)
            y = functional.linear(functional.silu(gate) * up, down) * weights[:, None]
        if not backward:
            out.index_add_(0, token, y)
            continue
        drows, dweights, dgate_up, ddown = torch.autograd.grad(y, leaves, upstream[0][token].double())
        found["dhidden_states"].index_add_(0, token, drows)
        found["dtopk_weights"][token, pick] = dweights
        shared["gate_up_proj"][e], shared["down_proj"][e] = dgate_up.float(), ddown.float()
    if not backward:
        return {"out": out.float()}
    found |= {f"d{name}": t for name, t in shared.items()}
    return {f"d{name}": found[f"d{name}"].float() for name in gradients}


def grouped(inputs: Inputs, part: str, upstream: tuple[Tensor, ...]) -> Results:
    """A grouped product, one group at a time."""
    a, b = inputs["a"], inputs["b"]
    ends = inputs["offsets"].tolist()
    results: Results = {"out": torch.zeros(len(a), b.shape[1], device=a.device)}
    if part == BACKWARD:
        results = {
            "da": torch.zeros_like(a, dtype=torch.float32),
            "db": torch.zeros_like(b, dtype=torch.float32),
        }
    for e, (begin, end) in enumerate(pairwise(ends)):
        rows, matrix = a[begin:end].double(), b[e].double()
        if part != BACKWARD:
            results["out"][begin:end] = (rows @ matrix.mT).float()
            continue
        dout = upstream[0][begin:end].double()
        results["da"][begin:end], results["db"][e] = (dout @ matrix).float(), (dout.mT @ rows).float()
    return results


def head(inputs: Inputs, part: str, scale: Tensor | None, reduction: str) -> Results:
    """Losses of a linear head, some tokens at a time.

    `scale`: for "nll" the gradient of each loss, for "mean" which tokens count (None: all).
    """
    hidden, weight, labels = inputs["hidden"], inputs["weight"].double(), inputs["labels"]
    counts = torch.ones_like(labels, dtype=torch.float64) if scale is None else scale.double()
    factor = counts / counts.sum() if reduction == "mean" else counts
    nll, dhidden = torch.empty_like(factor), torch.empty_like(hidden, dtype=torch.float32)
    dweight = torch.zeros_like(weight) if part != FORWARD else None
    for begin in range(0, len(labels), 1024):
        piece = slice(begin, begin + 1024)
        rows, wanted = hidden[piece].double(), labels[piece, None]
        logits = rows @ weight.mT
        lse = logits.logsumexp(-1, keepdim=True)
        nll[piece] = (lse - logits.gather(-1, wanted))[:, 0]
        if dweight is None:
            continue
        dlogits = logits.sub_(lse).exp_()
        dlogits.scatter_add_(-1, wanted, torch.full_like(lse, -1.0))
        dlogits *= factor[piece, None]
        dhidden[piece] = (dlogits @ weight).float()
        dweight += dlogits.mT @ rows
    if dweight is None:
        return {"nll": nll}
    gradients = {"dhidden": dhidden, "dweight": dweight}
    return gradients if part == BACKWARD else {"loss": (nll * factor).sum()} | gradients
