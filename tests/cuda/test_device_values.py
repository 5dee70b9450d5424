"""Values that a CUDA operator cannot look at before it runs: whatever they are, nothing outside of the tensors is touched.

On a GPU, run under compute-sanitizer as well; the emulated device runs under the address sanitizer.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastlm
from tests.support import samples

OFFSETS = {
    "negative": lambda n, total: [-5, -3, -(2**40), *([0] * n)][:n],
    "beyond": lambda n, total: [total + 7 + i for i in range(n)],
    "far": lambda n, total: [2**40 + i for i in range(n)],
    "falling": lambda n, total: [total - i for i in range(n)],
    "jumping": lambda n, total: [(i * 7919) % (2 * total + 1) - total // 2 for i in range(n)],
}
NAMES = (
    "cu_seqlens",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cache_seqlens",
    "conv_state_indices",
    "state_batch_indices",
    "seq_idx",
    "offsets",
    "topk_ids",
)
OPERATORS = (
    "causal_conv1d",
    "causal_conv1d_backward",
    "causal_conv1d_update",
    "selective_scan",
    "selective_scan_backward",
    "selective_state_update",
    "sliding_window_attention",
    "sliding_window_attention_backward",
    "sliding_window_attention_update",
    "scan_swa",
    "samba_decode_step",
    "grouped_gemm",
    "grouped_gemm_backward",
    "moe_experts",
    "moe_experts_backward",
)


def cases() -> list:
    """Each operator with each of its index arguments and each kind of wrong values, on its first fitting sample."""
    found = []
    for op in OPERATORS:
        names = [a.name for a in getattr(torch.ops.fastlm, op).default._schema.arguments]
        for name in NAMES:
            if name not in names:
                continue
            for sample in samples.of(op):
                call = sample.build()
                given = dict(zip(names, call.args, strict=False)) | call.kwargs
                if isinstance(given.get(name), Tensor) and given[name].numel() > 1:
                    found += [pytest.param(sample, name, kind, id=f"{op}-{name}-{kind}") for kind in OFFSETS]
                    break
    return found


def test_there_are_cases():
    assert len(cases()) >= 50


@pytest.mark.parametrize(("sample", "name", "kind"), cases())
def test_wrong_values_touch_nothing_else(sample, name, kind):
    """The call comes back with outputs of the right shapes; the numbers in them may be anything."""
    cuda = torch.cuda.is_available() and fastlm.build_info()["cuda"]["built"]
    if not cuda and not fastlm.build_info()["cuda"]["emulated"]:
        pytest.skip("the CPU operators refuse these values")
    good = sample.build("cuda" if cuda else "cpu")
    operator = getattr(torch.ops.fastlm, sample.op)
    names = [a.name for a in operator.default._schema.arguments]
    given = dict(zip(names, good.args, strict=False)) | good.kwargs
    want = operator(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()})
    index = given[name]
    total = max(t.shape[-1] if t.dim() > 1 else 8 for t in good.args if isinstance(t, Tensor))
    values = torch.tensor(OFFSETS[kind](index.numel(), total)).clamp(
        torch.iinfo(index.dtype).min, torch.iinfo(index.dtype).max
    )
    got = operator(**given | {name: values.to(index).reshape(index.shape)})
    shapes = [[t.shape for t in (r if isinstance(r, tuple) else (r,))] for r in (want, got)]
    assert shapes[0] == shapes[1]
    if cuda:
        torch.cuda.synchronize()
