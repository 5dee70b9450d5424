"""Other packages' operators as contenders, and part `peers`: builds what is given as source and says what is there.

`--peers DIR` may hold wheels (they are unpacked into `DIR/site`), unpacked packages, and `mamba/`, a checkout of mamba whose
`csrc/selective_scan` is compiled into `DIR/build` where nvcc is found.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..case import UnavailableError
from ..peers import package
from .case import Call, Inputs
from .item import Context, Item, Settings, SkipError

_EXTENSION = "selective_scan_cuda"
_BLOCK = 128  # queries and keys of a block of flex_attention
_NAMES = {
    "mamba_ssm": "mamba_ssm",
    _EXTENSION: _EXTENSION,
    "causal_conv1d": "causal_conv1d",
    "flash_attn": "flash_attn",
    "flash_attn_interface": "flash_attn_interface",
    "fla": "fla",
    "liger_kernel": "liger_kernel.transformers",
    "cut_cross_entropy": "cut_cross_entropy",
    "scattermoe": "scattermoe",
    "triton": "triton",
}


def add_folder(folder: str) -> None:
    """Makes what lies in a folder importable."""
    for path in _places(folder):
        if path not in sys.path:
            sys.path.append(path)


def present(folder: str) -> str:
    """Names of the packages that can be imported, with those of a folder; none is loaded."""
    importlib.invalidate_caches()
    places = [*(_places(folder) if folder else []), *sys.path]
    tops = dict.fromkeys(name.partition(".")[0] for name in _NAMES.values())
    return " ".join(top for top in tops if PathFinder.find_spec(top, places) is not None)


def _places(folder: str) -> list[str]:
    """Where packages lie in a folder; its wheels are unpacked."""
    root = Path(folder).resolve()
    site, build = root / "site", root / "build"
    for wheel in sorted(root.glob("*.whl")):
        site.mkdir(exist_ok=True)
        stamp = site / f".{wheel.name}"
        if not stamp.exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            stamp.touch()
    return [str(path) for path in (root, site, build / _EXTENSION) if path.is_dir()]


def items(settings: Settings) -> list[Item]:
    """Builds the extension, then looks for every package."""
    found = [Item("build/selective_scan_cuda", _build_mamba, limit=580)]
    return [*found, *(Item(f"import/{name}", partial(_import, module)) for name, module in _NAMES.items())]


def _import(module: str, context: Context) -> dict[str, Any]:
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a package may die of anything while it is imported
        raise SkipError(f"{type(error).__name__}: {str(error)[:300]}") from error
    return {"version": str(getattr(found, "__version__", "")), "file": str(getattr(found, "__file__", ""))}


def _build_mamba(context: Context) -> dict[str, Any]:
    """mamba's Mamba-1 scan, compiled for this card alone."""
    folder = Path(context.settings.peers or ".") / "mamba" / "csrc" / "selective_scan"
    if not folder.is_dir():
        raise SkipError("no source of mamba was given (--peers DIR with DIR/mamba, or --mamba-source)")
    if context.device != "cuda":
        raise SkipError("it needs CUDA")
    from torch.utils import cpp_extension

    if shutil.which("nvcc") is None and cpp_extension.CUDA_HOME is None:
        raise SkipError("nvcc was not found")
    sources = [str(p) for p in sorted([*folder.glob("*.cpp"), *folder.glob("*.cu")])]
    target = Path(context.settings.peers).resolve() / "build" / _EXTENSION
    target.mkdir(parents=True, exist_ok=True)
    (target / "lock").unlink(missing_ok=True)  # of a build that was ended: the next one would wait for ever
    major, minor = torch.cuda.get_device_capability()
    flags = [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}", "-O3", "-std=c++20"]
    flags += ["--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
    flags += [f"-U__CUDA_NO_{t}__" for t in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")]
    context.stage("compiling; this takes minutes")
    cpp_extension.load(
        _EXTENSION,
        sources,
        extra_cflags=["-O3", "-std=c++20"],
        extra_cuda_cflags=flags,
        extra_include_paths=[str(folder)],
        build_directory=str(target),
    )
    return {"sources": len(sources), "folder": str(target)}


# ---- selective scan -------------------------------------------------------------------------------------


class _MambaScan(torch.autograd.Function):
    """mamba's kernels without its Python package: channel-first tensors, B and C with a dimension of groups."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        u, delta, A, B, C, D, z, bias = tensors
        module = ctx.module = importlib.import_module(_EXTENSION)
        out, x, out_z = _either(module.fwd, u, delta, A, B, C, D, z, bias, True)
        ctx.save_for_backward(*tensors, x, out)
        return out_z  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, D, z, bias, x, out = ctx.saved_tensors
        dout = upstream[0].contiguous()  # its kernels refuse other strides
        words = (u, delta, A, B, C, D, z, bias, dout, x, out, None, True, False)
        du, ddelta, dA, dB, dC, dD, dbias, dz = _either(ctx.module.bwd, *words)
        return du, ddelta, dA, dB, dC, dD, dz, dbias


def _either(function: Callable[..., Any], *words: Any) -> Any:
    """Some versions take sequence bounds as a last argument."""
    try:
        return function(*words)
    except TypeError:
        return function(*words, None)


def channel_first(inputs: Inputs) -> Inputs:
    """The scan's inputs as mamba's kernels want them."""
    return {name: a.contiguous() if a.dim() == 3 else a for name, a in inputs.items()}


def channel_last(inputs: Inputs) -> Inputs:
    """`(B, D, L)` inputs with their channels side by side."""
    return {name: a.mT.contiguous().mT if a.dim() == 3 else a for name, a in inputs.items()}


def mamba_scan(inputs: Inputs) -> Call:
    """mamba's CUDA kernels."""
    package(
        _EXTENSION, needs="mamba's Mamba-1 kernels: an installed mamba_ssm that has them, or --mamba-source"
    )

    def call() -> Tensor:
        maps = (inputs[name].unsqueeze(1) for name in ("B", "C"))
        names = ("D", "z", "delta_bias")
        out: Tensor = _MambaScan.apply(
            inputs["u"], inputs["delta"], inputs["A"], *maps, *(inputs[name] for name in names)
        )
        return out

    return call


def fla_scan(inputs: Inputs) -> Call:
    """fla's Mamba-1 layer calls mamba_ssm."""
    package("fla")
    raise UnavailableError("fla has no Mamba-1 scan of its own: its layer calls mamba_ssm")


def around(scan: Callable[..., Tensor], inputs: Inputs) -> Call:
    """`scan(u, dt, A, B, C)` in float32 between softplus and gate."""

    def call() -> Tensor:
        u, z = inputs["u"].float(), inputs["z"].float()
        dt = functional.softplus(inputs["delta"].float() + inputs["delta_bias"][:, None])
        maps = (inputs[name].float().transpose(1, 2) for name in ("B", "C"))
        y = scan(u, dt, inputs["A"], *maps)
        out: Tensor = ((y + inputs["D"][:, None] * u) * functional.silu(z)).to(inputs["u"].dtype)
        return out

    return call


def chunked_scan(inputs: Inputs) -> Call:
    """Plain PyTorch: all chunks of 32 positions advance in step."""
    from fastlm.demo.plain_samba import plain_scan

    return around(plain_scan, inputs)


def step_loop(inputs: Inputs) -> Call:
    """Plain PyTorch: one position after the other."""
    from ..cases.selective_scan import step_loop as loop

    return around(loop, inputs)


def associative_scan(inputs: Inputs) -> Call:
    """torch's associative scan, which torch.compile turns into one Triton kernel."""
    module = package("torch._higher_order_ops.associative_scan")
    if inputs["u"].device.type != "cuda":
        raise UnavailableError("torch compiles it for CUDA alone")

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        steps = dt.transpose(1, 2)[..., None]  # (B, L, D, 1)
        entering = steps * b[:, :, None] * u.transpose(1, 2)[..., None]
        pair = (torch.exp(steps * a), entering)
        _, states = module.associative_scan(combine, pair, dim=1, combine_mode="pointwise")
        out: Tensor = (states * c[:, :, None]).sum(-1)
        return out.transpose(1, 2)

    compiled: Call = torch.compile(lambda: around(scan, inputs)())
    return compiled


# ---- convolution ----------------------------------------------------------------------------------------


def conv1d(inputs: Inputs) -> Call:
    """F.conv1d and F.silu."""
    from ..cases.causal_conv1d import conv_and_silu

    return lambda: conv_and_silu(inputs["x"], inputs["weight"], inputs["bias"])


def causal_conv1d(inputs: Inputs) -> Call:
    """Dao's CUDA kernels."""
    function = package("causal_conv1d").causal_conv1d_fn
    return lambda: function(inputs["x"], inputs["weight"], inputs["bias"], activation="silu")


def fla_conv(inputs: Inputs) -> Call:
    """fla's Triton kernels, `(B, L, D)`."""
    function = package("fla.modules.convolution").causal_conv1d

    def call() -> Tensor:
        found = function(inputs["x"].transpose(1, 2), inputs["weight"], inputs["bias"], activation="silu")
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    return call


# ---- attention ------------------------------------------------------------------------------------------


def window_mask(length: int, window: int, device: Any) -> Tensor:
    """`(L, L)`, True where a query sees a key."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


def sdpa(window: int | None) -> Callable[[Inputs], Call]:
    """SDPA with a mask made beforehand, or full causal attention, for orientation."""

    def build(inputs: Inputs) -> Call:
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        mask = None if window is None else window_mask(q.shape[1], window, q.device)
        grouped = q.shape[2] != k.shape[2]

        def call() -> Tensor:
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            out = functional.scaled_dot_product_attention(
                *heads_first, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )
            return out.transpose(1, 2)

        return call

    return build


def block_mask(length: int, window: int, device: Any) -> Any:
    """flex_attention's mask from the blocks themselves: by `create_block_mask`, long rows would take `L * L` numbers.

    A block of keys is full where every one of its pairs is visible, and then needs no look at the pairs.
    """
    module = package("torch.nn.attention.flex_attention")

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    first = torch.arange(0, length, _BLOCK, device=device)
    last = (first + _BLOCK - 1).clamp_max(length - 1)
    least, most = first[:, None] - last, last[:, None] - first  # distances of a query to a key in the block
    some, full = (most >= 0) & (least < window), (least >= 0) & (most < window)

    def lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
        return blocks.sum(-1).int()[None, None], order[None, None].contiguous()

    return module.BlockMask.from_kv_blocks(
        *lists(some & ~full), *lists(full), BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def flex(window: int) -> Callable[[Inputs], Call]:
    """flex_attention with a block mask, compiled."""
    masks: dict[int, Any] = {}
    compiled: list[Any] = []

    def build(inputs: Inputs) -> Call:
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        length, grouped = q.shape[1], q.shape[2] != k.shape[2]
        if not compiled:
            function = package("torch.nn.attention.flex_attention").flex_attention
            compiled.append(torch.compile(function, dynamic=False))
        if length not in masks:
            masks[length] = block_mask(length, window, q.device)

        def call() -> Tensor:
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            out: Tensor = compiled[0](*heads_first, block_mask=masks[length], enable_gqa=grouped)
            return out.transpose(1, 2)

        return call

    return build


def flash_attn(window: int, module: str) -> Callable[[Inputs], Call]:
    """flash-attn 2 (`flash_attn`) or 3 (`flash_attn_interface`)."""

    def build(inputs: Inputs) -> Call:
        function = package(module).flash_attn_func

        def call() -> Tensor:
            words = (inputs[name] for name in ("q", "k", "v"))
            found = function(*words, causal=True, window_size=(window - 1, 0))
            out: Tensor = found[0] if isinstance(found, tuple) else found
            return out

        return call

    return build
