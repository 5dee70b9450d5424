"""What the script for a GPU measures and checks, tried without one: inputs, floors, contenders, what is flushed, what may differ."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm.ops  # noqa: F401  (backward samples call the operators)
from bench.cases.samba_decode_step import pair
from bench.gpu import cases_model, cases_scan, edges, peers, report, timing
from bench.gpu.item import Context, Settings, SkipError
from bench.gpu.measure import measure_part
from bench.gpu.timing import Flush, Timed, interleave
from tests.support import samples

CPU = Context(Settings(device="cpu", rounds=1, compile=False))

# ---- samples on a device --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", samples.operators())
def test_samples_do_not_mix_devices(op):
    """Built for another device, no recipe adds a tensor of the CPU to one that is there: a GPU would refuse."""
    for sample in samples.of(op):
        with FakeTensorMode(allow_non_fake_inputs=True):
            sample.build("meta")


# ---- cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [128, 699, 700, 1024])
def test_the_window_of_a_decoded_token_is_full(window):
    inputs = pair("bf16", 2, 64, 2, 32, 100, window).inputs()
    seen = inputs["cache_seqlens"]
    assert bool((seen >= window).all())
    assert inputs["rotary_cos"].shape[0] == inputs["rotary_sin"].shape[0] == int(seen.max()) + 1
    assert inputs["k_cache"].shape[1] == window


def test_the_head_of_a_prompt_is_one_row():
    model = cases_model._model("tiny", "cpu")
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n)
    head = model.config.vocab_size * model.config.hidden_size
    assert cases_model.prompt_flops(model, 1000) == 2 * (1000 * weights + head)


def _zero_scan() -> dict[str, Any]:
    return {"selective_scan": cases_model._scan_by(lambda i: lambda: i["u"] * 0, lambda inputs: inputs)}


def _plain_scan() -> dict[str, Any]:
    return {"selective_scan": cases_model._scan_by(peers.chunked_scan, lambda inputs: inputs)}


@pytest.mark.parametrize(("scan", "status"), [(_zero_scan, "wrong"), (_plain_scan, "timed")])
def test_a_training_step_with_wrong_mixers_is_wrong(monkeypatch, scan, status):
    """The loss of a fresh model hardly depends on them."""
    monkeypatch.setattr(cases_model, "_field", scan)
    torch.manual_seed(0)
    problem = cases_model._training("tiny", 40, CPU)
    assert problem.outputs == ("loss", "din_proj", "dv_proj")
    ours, other = measure_part(problem, "step", CPU)["contenders"][:2]
    assert ours["status"] == "timed"
    assert other["status"] == status, other["reason"]
    if status == "wrong":
        assert other["errors"]["loss"] < problem.allowed


def test_every_contender_of_the_convolution_gets_the_layout_it_likes():
    (case,) = cases_scan.cases(tiny=True)[1:]
    for last in (True, False):
        problem = cases_scan._conv(1, 16, 70, last, CPU)
        (fla,) = [c for c in problem.contenders if c.name == "fla"]
        x = fla.prepare(problem.inputs)["x"]
        assert x.stride(1) == 1
        assert torch.equal(x, problem.inputs["x"])
    assert case.name.startswith("causal_conv1d/")


def test_the_scan_of_mamba_gets_gradients_with_unit_stride(monkeypatch):
    """Its backward pass refuses others, and a layer's projection behind the scan hands it transposed ones."""

    def fwd(u: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        return u * 1, u * 1, u * 1

    def bwd(*words: Any) -> list[torch.Tensor]:
        assert words[8].stride(-1) == 1
        return [torch.zeros_like(t) for t in (*words[:6], words[7], words[6])]

    monkeypatch.setitem(sys.modules, "selective_scan_cuda", SimpleNamespace(fwd=fwd, bwd=bwd))
    inputs = peers.channel_first(cases_scan.scan_inputs(1, 8, 5, 4, "cpu"))
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out = peers.mamba_scan(leaves)()
    upstream = torch.ones(1, 5, 8, dtype=out.dtype).mT
    assert upstream.stride(-1) != 1
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    assert all(g.shape == t.shape for g, t in zip(found, leaves.values(), strict=True))


def test_peers_can_be_left_out():
    problem = cases_scan._conv(1, 16, 70, True, CPU)
    alone = Context(CPU.settings, ours_only=True)
    rows = measure_part(problem, "forward", alone)["contenders"]
    assert [row["status"] for row in rows] == ["timed", "left out", "left out", "left out"]


# ---- timing ---------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Names of the operators that run, and where and how large their first argument is."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        t = args[0]
        self.calls.append((func.overloadpacket.__name__, t.data_ptr(), t.numel() * t.element_size()))
        return func(*args, **(kwargs or {}))


def test_the_flush_ends_with_reading_what_it_did_not_write():
    flush, l2 = Flush("cpu", 1 << 16, least=1 << 10), 1 << 16
    with _Recorder() as seen:
        flush()
    (first, written, size), (last, read, read_size) = seen.calls
    assert (first, last) == ("zero_", "sum")
    assert written != read
    assert min(size, read_size) >= 4 * l2


class _Clock:
    """In place of a clock of CUDA's: the flush covers 1 ms, calls take what they say."""

    hidden, can_sleep = 1e-3, True

    def __init__(self, device: str) -> None:
        pass

    def sample(self, call: Any, sleep: float = 0.0) -> tuple[float, float]:
        call.sleeps.append(sleep)
        return 1e-3, call.host


def _host_bound(monkeypatch, host: float, **attributes: Any) -> Timed:
    monkeypatch.setattr(timing, "Clock", type("Clock", (_Clock,), attributes))
    one = Timed("", SimpleNamespace(host=host, sleeps=[]))
    interleave([one], "cuda", rounds=4, seconds=1.0)
    return one


def test_the_device_sleeps_where_the_host_takes_longer_than_the_flush(monkeypatch):
    quick, slow = _host_bound(monkeypatch, 1e-4), _host_bound(monkeypatch, 5e-3)
    assert (quick.sleep, quick.hidden) == (0.0, 1e-3)
    assert (slow.sleep, slow.hidden) == (1e-2, 1.1e-2)
    assert slow.call.sleeps == [0.0] * 3 + [1e-2] * 4
    assert not report._host_shows(slow.data())


@pytest.mark.parametrize(("host", "attributes"), [(5e-3, {"can_sleep": False}), (0.2, {})])
def test_a_host_that_is_not_hidden_is_marked(monkeypatch, host, attributes):
    assert report._host_shows(_host_bound(monkeypatch, host, **attributes).data())


def test_on_the_cpu_no_host_is_marked():
    one = Timed("", lambda: None)
    interleave([one], "cpu", rounds=3, seconds=0.01)
    assert one.data()["hidden"] is None
    assert not report._host_shows(one.data())


# ---- checks at the edge ---------------------------------------------------------------------------------


def test_calls_with_one_tensor_mix_no_devices():
    with pytest.raises(SkipError, match="one tensor"):
        edges.check_mixed_devices("moe_plan", samples.of("moe_plan"), CPU)
    route = samples.of("grin_route")
    assert any(len(edges.filled_tensors("grin_route", s)) == 1 for s in route)
    assert any(len(edges.filled_tensors("grin_route", s)) > 1 for s in route)


def test_ids_that_only_the_cpu_looks_at_may_be_accepted(monkeypatch):
    """The device's answer is the CPU's, but that an id without its expert is accepted."""
    real, calls = edges._answer, [0]

    def answer(op: str, arguments: dict[str, Any]) -> str:
        calls[0] += 1
        found = real(op, arguments)
        is_device = calls[0] % 2 == 1
        return "accepted" if is_device and found.startswith("IndexError") else found

    monkeypatch.setattr(edges, "_answer", answer)
    sample = samples.of("grin_route_backward")[0]
    there = real(
        "grin_route_backward", edges._changed(sample.op, sample, "router_logits", edges._fewer, "cpu")
    )
    assert there.startswith("IndexError")
    assert edges.check_errors("grin_route_backward", sample, CPU)["bad_calls"] > 0
    assert not edges.agree("selective_scan", "accepted", there)
    assert not edges.agree("grin_route_backward", "accepted", "ValueError: no")
