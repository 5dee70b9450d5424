"""No copy of an activation for the sake of its layout, and graphs without breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.models.samba import SambaConfig, SambaForCausalLM

aten = torch.ops.aten
COPIES = (aten.clone.default, aten.copy_.default, aten.contiguous.default, aten.reshape.default)
CHANNEL_ARGUMENTS = {"causal_conv1d": ("x",), "selective_scan": ("u", "delta", "B", "C", "z")}
BATCH, LENGTH = 2, 40


class Watch(TorchDispatchMode):
    """Notes copies of at least `size` elements, and strides of what the operators get."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.copies: list[str] = []
        self.strides: dict[str, list[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in COPIES and isinstance(out, Tensor) and out.numel() >= self.size:
            self.copies.append(f"{func}{tuple(out.shape)}")
        if func is aten._to_copy.default and out.numel() >= self.size and out.dtype == args[0].dtype:
            self.copies.append(f"{func}{tuple(out.shape)}")
        if func.namespace == "fastlm":
            name = func._schema.name.split("::")[1]
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            for argument in CHANNEL_ARGUMENTS.get(name, ()):
                self.strides.setdefault(f"{name}.{argument}", []).append(given[argument].stride())
        return out


def make(**changes: object) -> SambaForCausalLM:
    torch.manual_seed(0)
    return SambaForCausalLM(SambaConfig.from_preset("tiny", **changes))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("pattern", [("mamba", "sliding_attention"), ("mamba+sliding_attention",)], ids=str)
def test_forward_copies_no_activation(autocast, grad, pattern):
    model = make(layer_pattern=pattern)
    ids = torch.randint(96, (BATCH, LENGTH))
    with (
        torch.set_grad_enabled(grad),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        Watch(BATCH * LENGTH * model.config.hidden_size // 4) as watch,
    ):
        model(ids, labels=ids)
    assert watch.copies == []
    assert set(watch.strides) == {f"{op}.{name}" for op, names in CHANNEL_ARGUMENTS.items() for name in names}
    for name, strides in watch.strides.items():
        assert all(stride[1] == 1 for stride in strides), f"{name}: {strides}"


def test_the_watch_sees_a_copy():
    with Watch(10) as watch:
        torch.zeros(4, 5).t().contiguous()
        torch.zeros(2, 2).t().contiguous()
    assert watch.copies == ["aten.clone.default(5, 4)"]


@pytest.mark.parametrize("chunk", [1, 9])
def test_continuation_copies_no_activation(chunk):
    model = make().eval()
    ids = torch.randint(96, (BATCH, 30))
    cache = model.new_cache(BATCH)
    with torch.no_grad():
        model(ids, cache=cache)
        with Watch(BATCH * chunk * 16) as watch:
            model(ids[:, :chunk], cache=cache)
    states = {f"aten.copy_.default{tuple(t.shape)}" for layer in cache.layers for t in layer.tensors()}
    assert [copy for copy in watch.copies if copy not in states] == []


@pytest.mark.slow
def test_compiled_training_step_equals_eager_without_graph_breaks():
    model = make()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (40, 23):
        ids = torch.randint(96, (BATCH, length))
        expected = model(ids, labels=ids).loss
        expected_grads = torch.autograd.grad(expected, list(model.parameters()))
        loss = compiled(ids, labels=ids).loss
        assert_close(loss, expected)
        for got, want in zip(
            torch.autograd.grad(loss, list(model.parameters())), expected_grads, strict=True
        ):
            assert_close(got, want)


@pytest.mark.slow
def test_compiled_packed_forward_equals_eager_without_graph_breaks():
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(96, (1, 30))
    cu_seqlens = torch.tensor([0, 4, 18, 30], dtype=torch.int32)
    with torch.no_grad():
        assert_close(compiled(ids, cu_seqlens=cu_seqlens).logits, model(ids, cu_seqlens=cu_seqlens).logits)
