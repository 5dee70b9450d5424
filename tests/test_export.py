"""Every public operator inside a `torch.export` program gives what it gives in eager mode, for other sizes too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm import ops
from tests.support import samples
from tests.support.conformance import tensors_of
from tests.support.samples import Sample

PUBLIC = [op for op in samples.operators() if not op.endswith("_backward")]
SAMPLES = [sample for op in PUBLIC for sample in samples.of(op)]

# The sample, and the dimension of each of its tensors, that grows when the text (or, in decoding, the batch) does.
GROWING = {
    "causal_conv1d": ("silu", {"x": 2}),
    "causal_conv1d_update": ("one_input", {"x": 0, "conv_state": 0}),
    "selective_scan": ("everything", {"u": 2, "delta": 2, "B": 2, "C": 2, "z": 2}),
    "selective_state_update": ("everything", {"state": 0, "x": 0, "dt": 0, "B": 0, "C": 0, "z": 0}),
    "sliding_window_attention": ("window_both_sides", {"q": 1, "k": 1, "v": 1}),
    "sliding_window_attention_update": (
        "rotary",
        {"q": 0, "k": 0, "v": 0, "k_cache": 0, "v_cache": 0, "cache_seqlens": 0},
    ),
    "scan_swa": ("hybrid", {"u": 2, "delta": 2, "B": 2, "C": 2, "z": 2}),
    "samba_decode_step": (
        "model",
        {"hidden": 0, "conv_state": 0, "scan_state": 0, "k_cache": 0, "v_cache": 0, "cache_seqlens": 0},
    ),
    "grin_route": ("padding", {"router_logits": 0, "noise": 0, "valid": 0}),
    "moe_plan": ("plain", {"topk_ids": 0}),
    "grouped_gemm": ("rows_behind", {"a": 0}),
    "moe_experts": (
        "everything",
        {"hidden_states": 0, "topk_ids": 0, "topk_weights": 0, "grad_weights": 0},
    ),
    "linear_nll": ("entropy", {"hidden": 0, "labels": 0}),
    "select_tokens": ("plain", {"score": 0, "eligible": 0}),
}


class Calls(torch.nn.Module):
    """One call of a public function; options that are no tensors belong to the module."""

    def __init__(self, op: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.options = op, options

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        return getattr(ops, self.op)(**tensors, **self.options)


def _build(sample: Sample) -> tuple[dict[str, Tensor], dict[str, Any]]:
    call = sample.build()
    names = [a.name for a in getattr(torch.ops.fastlm, sample.op).default._schema.arguments]
    arguments = dict(zip(names, call.args, strict=False)) | call.kwargs
    tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
    return tensors, {name: a for name, a in arguments.items() if name not in tensors}


def _assert_same(program: Any, module: Calls, given: dict[str, Tensor], same: dict[str, Tensor]) -> None:
    """Outputs, and what is left in the arguments: some are written."""
    got, want = program(given), module(same)
    for a, b in zip(tensors_of((got, given)), tensors_of((want, same)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_export(sample):
    example, options = _build(sample)
    module = Calls(sample.op, options)
    program = torch.export.export(module, (example,)).module()
    _assert_same(program, module, _build(sample)[0], _build(sample)[0])


def _grown(sample: Sample, growing: dict[str, int], times: int) -> dict[str, Tensor]:
    tensors = _build(sample)[0]
    return {
        name: torch.cat([t] * times, growing[name]) if name in growing else t for name, t in tensors.items()
    }


@pytest.mark.parametrize("op", PUBLIC)
def test_export_of_a_dynamic_size(op):
    name, growing = GROWING[op]
    (sample,) = [s for s in samples.of(op, name) if s.name == name]
    # The scan keeps a state every 64 positions, and torch has a guard on whether a size is 0, 1 or more.
    least, times = (128, 10) if op in ("selective_scan", "scan_swa") else (2, 1)
    example, module = _grown(sample, growing, times), Calls(op, _build(sample)[1])
    size = torch.export.Dim("size", min=least)
    dynamic = {name: {growing[name]: size} if name in growing else None for name in example}
    program = torch.export.export(module, (example,), dynamic_shapes=(dynamic,)).module()
    other, same = (_grown(sample, growing, 3 * times) for _ in range(2))
    _assert_same(program, module, other, same)
