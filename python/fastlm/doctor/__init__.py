"""What is built, what runs, and why not: the report behind `fastlm doctor`.

Every operator is looked up in torch's dispatcher (CPU, CUDA, fake, autograd kernels) and, where it has a
case, run against `fastlm.reference` forward and backward on a small shape and timed on a larger one: on the
CPU, and on the CUDA device if there is one. The reference runs on the CPU.
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
from fastlm.doctor.cases import CASES, Call

TOLERANCE = 1e-4  # float32, relative to the largest value of the reference
PACKAGES = ("fastlm", "torch", "numpy", "tokenizers", "safetensors", "transformers", "triton")
LEVELS = ("default", "avx2", "avx512", "avx512_bf16")
# An operator whose gradient is that of other operators.
COMPOSED = {"scan_swa"}


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
    cuda_forward_error: float | None = None
    cuda_backward_error: float | None = None
    cuda_gb_per_second: float | None = None
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
    has_gradient = has_backward or name in COMPOSED
    row = OperatorReport(
        name=name,
        cpu=_has_kernel(name, "CPU"),
        cuda=_has_kernel(name, "CUDA"),
        fake=_has_fake(name),
        autograd=_has_kernel(name, "Autograd") if has_gradient else None,
    )
    if not row.cpu and not row.cuda:
        row.ok, row.problem = False, "declared, but no kernel is built"
    elif name in CASES:
        for kind, device in _devices().items():
            if row.ok and getattr(row, kind):
                _test(row, kind, device, gradients=has_gradient)
    return row


def _devices() -> dict[str, torch.device]:
    """Where operators are tested: field of the report that says whether there is a kernel, and the device."""
    found = {"cpu": torch.device("cpu")}
    if torch.cuda.is_available():
        found["cuda"] = torch.device("cuda")
    return found


def _test(row: OperatorReport, kind: str, device: torch.device, *, gradients: bool) -> None:
    """Fills the fields of one kind of device."""
    before, where = ("", "") if kind == "cpu" else (f"{kind}_", f"on {kind}: ")
    case = CASES[row.name]
    try:
        torch.manual_seed(0)
        forward, backward = _compare(row.name, case.small, device, gradients=gradients)
        speed = _speed(row.name, case.large, device)
    except Exception as error:  # the report is about what goes wrong, whatever it is
        row.ok, row.problem = False, f"{where}{type(error).__name__}: {' '.join(str(error).split())}"
        return
    setattr(row, f"{before}forward_error", forward)
    setattr(row, f"{before}backward_error", backward)
    setattr(row, f"{before}gb_per_second", speed)
    worst = max(forward, backward or 0.0)
    if not worst <= TOLERANCE:
        row.ok, row.problem = False, f"{where}error {worst:.1e}, expected at most {TOLERANCE:.0e}"


# The self-test


def _compare(
    name: str, make: Callable[[], Call], device: torch.device, *, gradients: bool
) -> tuple[float, float | None]:
    """Largest relative errors of outputs (with tensors written in place) and of gradients."""
    args, kwargs = make()
    ours, ours_in = _run(getattr(ops, name), args, kwargs, device, gradients)
    expected, expected_in = _run(getattr(reference, name), args, kwargs, torch.device("cpu"), gradients)
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
    function: Callable[..., Any],
    args: list[Any],
    kwargs: dict[str, Any],
    device: torch.device,
    gradients: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Calls with copies of the arguments on a device; returns output tensors and the copied floating arguments."""
    copies: list[Tensor] = []

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().to(device, copy=True)
        if copy.is_floating_point():
            copies.append(copy.requires_grad_(gradients))
        return copy

    out = function(*(copied(a) for a in args), **{key: copied(a) for key, a in kwargs.items()})
    outputs = [out] if isinstance(out, Tensor) else list(out)
    if gradients:
        # Weights that differ from place to place, so that errors cannot cancel.
        loss = sum(
            (o * torch.linspace(-1, 1, o.numel(), device=device).view_as(o)).sum()
            for o in outputs
            if o.requires_grad
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
    error = (ours.detach().cpu().double() - expected.double()).abs().max() / scale
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def _speed(name: str, make: Callable[[], Call], device: torch.device) -> float:
    """Bytes of arguments and results over the best of a few forward runs."""
    made, named = make()
    args = [a.to(device) if isinstance(a, Tensor) else a for a in made]
    kwargs = {key: a.to(device) if isinstance(a, Tensor) else a for key, a in named.items()}
    function = getattr(ops, name)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(4):
            _wait_for(device)
            started = time.perf_counter()
            out = function(*args, **kwargs)
            _wait_for(device)
            best = min(best, time.perf_counter() - started)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    tensors = [t for t in (*args, *kwargs.values(), *outputs) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / best / 1e9


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
