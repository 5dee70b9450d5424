"""Every operator under autocast: the bits of casting by hand, gradients in the dtype of the inputs, float64 untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm import ops
from tests.support import samples
from tests.support.compile import assert_compiled_equals_eager
from tests.support.conformance import tensors_of
from tests.support.samples import Call, Sample

# Which arguments take autocast's dtype; a decoding step that writes into caches of the main dtype takes theirs.
CAST = {
    "causal_conv1d": ("x", "initial_states"),
    "causal_conv1d_update": ("x",),
    "selective_scan": ("u", "delta", "B", "C", "z"),
    "selective_state_update": ("x", "dt", "B", "C", "z"),
    "sliding_window_attention": ("q", "k", "v"),
    "sliding_window_attention_update": ("q", "k", "v"),
    "samba_decode_step": (),
    "scan_swa": ("u", "delta", "B", "C", "z", "q", "k", "v"),
    "grin_route": (),
    "grouped_gemm": ("a", "b"),
    "moe_experts": ("hidden_states", "gate_up_proj", "down_proj"),
    "linear_nll": ("hidden", "weight"),
}
NOT_CAST = {"moe_plan", "select_tokens"}  # indices, and scores that are compared in their own dtype
TAKES_THE_DTYPE_OF = {"causal_conv1d_update": "conv_state", "sliding_window_attention_update": "k_cache"}
WRITES = [op for op in CAST if op.endswith(("_update", "_step"))]


def _sample(op: str, *words: str) -> Sample:
    return samples.of(op, *words)[0]


def _named(op: str, call: Call) -> dict[str, Any]:
    """The arguments of a call by name; every operator takes its tensors by name too."""
    names = [a.name for a in getattr(torch.ops.fastlm, op).default._schema.arguments]
    return dict(zip(names, call.args, strict=False)) | call.kwargs


def _cast_by_hand(op: str, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that the operator should see in a region of this dtype."""
    if op in TAKES_THE_DTYPE_OF:
        dtype = arguments[TAKES_THE_DTYPE_OF[op]].dtype

    def cast(name: str, a: Any) -> Any:
        if name not in CAST[op] or not isinstance(a, Tensor) or a.dtype == torch.float64:
            return a
        constant = op in ("selective_scan", "scan_swa") and a.dim() == 2
        return a if constant else a.to(dtype)

    return {name: cast(name, a) for name, a in arguments.items()}


def _everything(outputs: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """Outputs, arguments (some are written) and the gradients of the leaves among them."""
    results = tensors_of(outputs)
    leaves = [a for a in arguments.values() if isinstance(a, Tensor) and a.requires_grad]
    roots = [t for t in results if t.requires_grad and t.numel() > 0]
    found: list[Tensor] = []
    if leaves and roots:
        total = torch.stack([torch.where(t.isfinite(), t, 0).double().square().sum() for t in roots]).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                assert gradient.dtype == leaf.dtype
                found.append(gradient)
    return [t.detach() for t in (*results, *found, *tensors_of(arguments))]


def _assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _assert_casts_like_by_hand(
    op: str, build: Any, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """`build()` gives fresh arguments by name, with the same values each time."""
    operator = getattr(torch.ops.fastlm, op)
    given, same = build(), build()
    with torch.autocast(torch.device(device).type, dtype=dtype):
        outputs = operator(**given)
    by_hand = operator(**_cast_by_hand(op, same, dtype))
    _assert_same(_everything(outputs, given), _everything(by_hand, same))


def _fresh(sample: Sample) -> dict[str, Any]:
    call = sample.build()
    return _named(sample.op, call if sample.op in WRITES else call.requires_grad())


def test_every_operator_has_a_rule():
    public = {op for op in samples.operators() if not op.endswith("_backward")}
    assert set(CAST) == public - NOT_CAST


@pytest.mark.parametrize("op", CAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_like_by_hand(op, dtype):
    """All samples: every dtype, layout and combination of optional arguments."""
    for sample in samples.of(op):
        _assert_casts_like_by_hand(op, lambda s=sample: _fresh(s), dtype)


@pytest.mark.parametrize("op", CAST)
@pytest.mark.parametrize("first", [0, 1])
def test_takes_a_mixture(op, first):
    """Every second one of the cast arguments is bfloat16 already."""
    sample = samples.of(op)[0]
    lower = CAST[op][first::2]

    def build() -> dict[str, Any]:
        return {
            name: a.detach().bfloat16().requires_grad_(a.requires_grad)
            if name in lower and isinstance(a, Tensor)
            else a
            for name, a in _fresh(sample).items()
        }

    _assert_casts_like_by_hand(op, build, torch.bfloat16)


@pytest.mark.parametrize("op", CAST)
def test_float64_stays(op):
    sample = _sample(op, "float64")
    operator = getattr(torch.ops.fastlm, op)
    given, same = _fresh(sample), _fresh(sample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = operator(**given)
    _assert_same(_everything(outputs, given), _everything(operator(**same), same))
    assert tensors_of(outputs)[0].dtype == torch.float64


@pytest.mark.parametrize("op", CAST)
def test_a_disabled_region_casts_nothing(op):
    sample = samples.of(op)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        outputs = getattr(ops, op)(**_fresh(sample))
    assert tensors_of(outputs)[0].dtype == torch.float32


# What a decoding step writes into keeps its dtype and its place, whatever the activations are.
@pytest.mark.parametrize("op", [op for op in WRITES if CAST[op]])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_steps_write_into_the_state_they_got(op, kept, given):
    sample = samples.of(op)[0]
    states = [a.name for a in getattr(torch.ops.fastlm, op).default._schema.arguments if a.alias_info]

    def build() -> dict[str, Any]:
        arguments = _fresh(sample)
        dtypes = dict.fromkeys(CAST[op], given) | dict.fromkeys(states, kept)
        return {name: a.to(dtypes[name]) if name in dtypes else a for name, a in arguments.items()}

    arguments, before = build(), build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = getattr(ops, op)(**arguments)
    assert out.dtype == (kept if op in TAKES_THE_DTYPE_OF else torch.bfloat16)
    for name in states:
        assert arguments[name].dtype == kept
        assert not torch.equal(arguments[name].nan_to_num(), before[name].nan_to_num()), f"{name} not written"
    _assert_casts_like_by_hand(op, build, torch.bfloat16)


@pytest.mark.parametrize("op", CAST)
def test_compile(op):
    sample = samples.of(op)[0]

    def step(**arguments: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return getattr(ops, op)(**arguments)

    assert_compiled_equals_eager(step, **_fresh(sample))


class _UnderAutocast(torch.nn.Module):
    def __init__(self, op: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.options = op, options

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return getattr(ops, self.op)(**tensors, **self.options)


@pytest.mark.parametrize("op", CAST)
def test_export(op):
    def build() -> tuple[dict[str, Tensor], dict[str, Any]]:
        arguments = _named(op, samples.of(op)[0].build())
        tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
        return tensors, {name: a for name, a in arguments.items() if name not in tensors}

    example, options = build()
    given, same = build()[0], build()[0]
    module = _UnderAutocast(op, options)
    program = torch.export.export(module, (example,)).module()
    _assert_same(_everything(program(given), given), _everything(module(same), same))


# ---- CUDA -----------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("op", ["causal_conv1d", "causal_conv1d_update"])
def test_cuda_casts_like_by_hand(op):
    for sample in samples.of(op):
        _assert_casts_like_by_hand(
            op, lambda s=sample: _named(op, s.build("cuda")), torch.bfloat16, device="cuda"
        )
