"""What is built, what runs, and why not: the report behind `fastlm doctor`.

Every operator is looked up in torch's dispatcher (CPU, CUDA, fake, autograd kernels) and, where it has a
case here, run against `fastlm.reference` forward and backward on a small shape and timed on a larger one.
The times are rough: a few repetitions and no pinning; `fastlm bench` measures properly.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlm
from fastlm import ops, reference

TOLERANCE = 1e-4  # float32, relative to the largest value of the reference
PACKAGES = ("fastlm", "torch", "numpy", "tokenizers", "safetensors", "transformers", "triton")
Call = tuple[list[Any], dict[str, Any]]
LEVELS = ("default", "avx2", "avx512", "avx512_bf16")


@dataclass
class OperatorReport:
    """One row of the table."""

    name: str
    cpu: bool
    cuda: bool
    fake: bool
    autograd: bool | None  # None: an in-place step, which has no gradient by design
    forward_error: float | None = None
    backward_error: float | None = None
    gb_per_second: float | None = None
    ok: bool = True
    problem: str = ""


def examine() -> dict[str, Any]:
    """The whole report as plain data; `ok` says whether everything that is built works.

    Returns:
        A dict with `ok`, `problem`, `versions`, `facts` (name → sentence), `operators` (rows), `build_info`.
    """
    operators = [_examine(name) for name in _operator_names()]
    broken = [row.name for row in operators if not row.ok]
    missing = sorted(set(CASES) - {row.name for row in operators})
    problems = [f"self-test failed: {', '.join(broken)}"] if broken else []
    problems += [f"operator not built: {', '.join(missing)}"] if missing else []
    return {
        "ok": not problems,
        "problem": "; ".join(problems),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "facts": _facts(),
        "operators": [asdict(row) for row in operators],
        "build_info": fastlm.build_info(),
    }


def _facts() -> dict[str, str]:
    info = fastlm.build_info()
    return {
        "machine": f"{_processor()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
        "CPU level": _cpu_level(info),
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads(); OMP_NUM_THREADS="
        f"{os.environ.get('OMP_NUM_THREADS', 'unset')})",
        "torch": f"{torch.__version__}; the operators were built against {info.get('torch')}",
        "CUDA": _cuda(info),
        "CUTLASS": _version_or_reason(info.get("cutlass")),
        "built with": f"{info.get('compiler')}, {info.get('build_type')}",
    }


def _cpu_level(info: dict[str, Any]) -> str:
    level = fastlm.cpu_capability()
    built = list(info.get("cpu_levels", []))
    forced = os.environ.get("FASTLM_CPU_CAPABILITY")
    if forced:
        why = f"FASTLM_CPU_CAPABILITY={forced}"
    elif level == LEVELS[-1]:
        why = "the CPU has everything"
    else:
        above = [name for name in LEVELS[LEVELS.index(level) + 1 :] if name in built]
        if above:
            why = f"the highest that both the CPU and the build have; this CPU cannot run {', '.join(above)}"
        else:
            why = "the highest that was built"
    return f"{level}: {why} (built: {', '.join(built)})"


def _cuda(info: dict[str, Any]) -> str:
    cuda = info.get("cuda", {})
    if not cuda.get("built"):
        return f"not built: {cuda.get('why_not') or 'no reason recorded'}"
    if not torch.cuda.is_available():
        return f"built for {cuda.get('architectures')}, not usable: torch sees no device"
    return f"built for {cuda.get('architectures')}, usable: {torch.cuda.get_device_name(0)}"


def _version_or_reason(part: Any) -> str:
    if not isinstance(part, dict):
        return str(part)
    return str(part.get("version") or f"not used: {part.get('why_not') or 'no reason recorded'}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# What is registered


def _operator_names() -> list[str]:
    """Public operators in torch's dispatcher; `_backward` operators belong to the row of their forward."""
    names = {name.partition("::")[2].partition(".")[0] for name in _registered()}
    return sorted(name for name in names if not name.endswith("_backward"))


def _registered() -> list[str]:
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastlm::")]


def _has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlm::{name}", key))


def _has_fake(name: str) -> bool:
    from torch._library.simple_registry import singleton

    return _has_kernel(name, "Meta") or singleton.find(f"fastlm::{name}").fake_impl.kernel is not None


def _examine(name: str) -> OperatorReport:
    has_backward = f"fastlm::{name}_backward" in {found.partition(".")[0] for found in _registered()}
    row = OperatorReport(
        name=name,
        cpu=_has_kernel(name, "CPU"),
        cuda=_has_kernel(name, "CUDA"),
        fake=_has_fake(name),
        autograd=_has_kernel(name, "Autograd") if has_backward else None,
    )
    if not row.cpu and not row.cuda:
        row.ok, row.problem = False, "declared, but no kernel is built"
        return row
    case = CASES.get(name)
    if case is None or not row.cpu:
        return row
    try:
        torch.manual_seed(0)
        row.forward_error, row.backward_error = _compare(name, case.small, gradients=has_backward)
        row.gb_per_second = _speed(name, case.large)
    except Exception as error:  # the report is about what goes wrong, whatever it is
        row.ok, row.problem = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
        return row
    worst = max(row.forward_error, row.backward_error or 0.0)
    if not worst <= TOLERANCE:
        row.ok, row.problem = False, f"error {worst:.1e}, expected at most {TOLERANCE:.0e}"
    return row


# The self-test


def _compare(name: str, make: Callable[[], Call], *, gradients: bool) -> tuple[float, float | None]:
    """Largest relative errors of outputs (with tensors written in place) and of gradients."""
    args, kwargs = make()
    ours, ours_in = _run(getattr(ops, name), args, kwargs, gradients)
    expected, expected_in = _run(getattr(reference, name), args, kwargs, gradients)
    outputs = [*ours, *(t for t in ours_in if not t.requires_grad)]
    wanted = [*expected, *(t for t in expected_in if not t.requires_grad)]
    forward = max(_error(a, b) for a, b in zip(outputs, wanted, strict=True))
    if not gradients:
        return forward, None
    pairs = [
        (a.grad, b.grad)
        for a, b in zip(ours_in, expected_in, strict=True)
        if a.grad is not None and b.grad is not None
    ]
    if len(pairs) != sum(tensor.requires_grad for tensor in expected_in):
        return forward, float("inf")  # a gradient is missing
    return forward, max(_error(a, b) for a, b in pairs)


def _run(
    function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], gradients: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Calls with copies of the arguments; returns output tensors and the copied floating arguments."""
    copies: list[Tensor] = []

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        if copy.is_floating_point():
            copies.append(copy.requires_grad_(gradients))
        return copy

    out = function(*(copied(a) for a in args), **{key: copied(a) for key, a in kwargs.items()})
    outputs = [out] if isinstance(out, Tensor) else list(out)
    if gradients:
        # Weights that differ from place to place, so that errors cannot cancel.
        loss = sum(
            (o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outputs if o.requires_grad
        )
        assert isinstance(loss, Tensor)
        loss.backward()
    return [o.detach() for o in outputs], copies


def _error(ours: Tensor, expected: Tensor) -> float:
    if ours.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().clamp_min(1e-6)
    error = (ours.double() - expected.double()).abs().max() / scale
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def _speed(name: str, make: Callable[[], Call]) -> float:
    """Bytes of arguments and results over the best of a few forward runs."""
    args, kwargs = make()
    function = getattr(ops, name)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(4):
            started = time.perf_counter()
            out = function(*args, **kwargs)
            best = min(best, time.perf_counter() - started)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    tensors = [t for t in (*args, *kwargs.values(), *outputs) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / best / 1e9


@dataclass(frozen=True)
class Case:
    """Arguments of one operator: a small odd shape for the comparison, a larger one for the time."""

    small: Callable[[], Call]
    large: Callable[[], Call]


def _conv(b: int, d: int, length: int) -> Call:
    return [torch.randn(b, d, length), torch.randn(d, 4), torch.randn(d)], {"activation": "silu"}


def _conv_update(b: int, d: int) -> Call:
    return [torch.randn(b, d), torch.randn(b, d, 3), torch.randn(d, 4), torch.randn(d)], {
        "activation": "silu"
    }


def _scan(b: int, d: int, length: int, n: int) -> Call:
    u, delta, z = (torch.randn(b, d, length) for _ in range(3))
    shared = [torch.randn(b, n, length) for _ in range(2)]
    arguments = [u, delta, -torch.rand(d, n) - 0.5, *shared, torch.randn(d), z, torch.randn(d) - 2]
    return arguments, {"delta_softplus": True, "return_last_state": True}


def _state_update(b: int, d: int, n: int) -> Call:
    state, a = torch.randn(b, d, n), -torch.rand(d, n) - 0.5
    x, dt, z = (torch.randn(b, d) for _ in range(3))
    shared = [torch.randn(b, n) for _ in range(2)]
    return [state, x, dt, a, *shared, torch.randn(d), z, torch.randn(d) - 2], {"dt_softplus": True}


def _attention(b: int, length: int, window: int) -> Call:
    heads = [torch.randn(b, length, count, 32) for count in (4, 2, 2)]
    return heads, {"window_size": (window - 1, 0)}


def _attention_update(b: int, window: int) -> Call:
    heads = [torch.randn(b, 1, count, 32) for count in (4, 2, 2)]
    caches = [torch.randn(b, window, 2, 32) for _ in range(2)]
    seen = torch.arange(b, dtype=torch.int32) * 5 + 3
    return [*heads, *caches, seen], {"window_size": (window - 1, 0)}


def _route(tokens: int, experts: int) -> Call:
    return [torch.randn(tokens, experts)], {"jitter_eps": 0.2}


def _plan(tokens: int, experts: int) -> Call:
    return [torch.randint(-1, experts, (tokens, 2)), experts], {}


def _grouped_gemm(rows: int, depth: int, columns: int) -> Call:
    offsets = torch.tensor([0, rows // 3, rows // 3, rows])  # one group is empty
    return [torch.randn(rows, depth), torch.randn(3, columns, depth), offsets], {}


def _experts(tokens: int, hidden: int, inner: int, experts: int) -> Call:
    weights, ids = torch.randn(tokens, experts).softmax(-1).topk(2)
    gate_up, down = torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)
    return [torch.randn(tokens, hidden), gate_up * 0.1, down * 0.1, ids, weights], {}


def _linear_nll(tokens: int, hidden: int, vocab: int) -> Call:
    labels = torch.randint(vocab, (tokens,))
    labels[::7] = -100
    return [torch.randn(tokens, hidden), torch.randn(vocab, hidden) * 0.1, labels], {}


def _select_tokens(tokens: int) -> Call:
    arguments = [torch.randn(tokens), torch.rand(tokens) < 0.9]
    return arguments, {"keep_ratio": 0.6}


CASES: dict[str, Case] = {
    "causal_conv1d": Case(lambda: _conv(2, 19, 37), lambda: _conv(1, 512, 2048)),
    "causal_conv1d_update": Case(lambda: _conv_update(3, 19), lambda: _conv_update(16, 1024)),
    "selective_scan": Case(lambda: _scan(2, 19, 37, 5), lambda: _scan(1, 512, 2048, 16)),
    "selective_state_update": Case(lambda: _state_update(3, 19, 5), lambda: _state_update(16, 1024, 16)),
    "sliding_window_attention": Case(lambda: _attention(2, 37, 9), lambda: _attention(1, 2048, 256)),
    "sliding_window_attention_update": Case(
        lambda: _attention_update(3, 9), lambda: _attention_update(16, 256)
    ),
    "grin_route": Case(lambda: _route(37, 5), lambda: _route(4096, 16)),
    "moe_plan": Case(lambda: _plan(37, 5), lambda: _plan(4096, 16)),
    "grouped_gemm": Case(lambda: _grouped_gemm(37, 19, 23), lambda: _grouped_gemm(512, 256, 256)),
    "moe_experts": Case(lambda: _experts(37, 19, 23, 5), lambda: _experts(512, 256, 256, 8)),
    "linear_nll": Case(lambda: _linear_nll(37, 19, 53), lambda: _linear_nll(512, 256, 4096)),
    "select_tokens": Case(lambda: _select_tokens(37), lambda: _select_tokens(32768)),
}
