"""Selective scan of the Mamba mixer: whole sequences and one decoding step, softplus and gate included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..case import BOTH, DECODE, DTYPES, FORWARD, Build, Call, Case, Contender, Inputs, Target, Work
from ..peers import definition, member, operator, package
from .causal_conv1d import W, plain_update

N = 16  # states per channel
_REFERENCE_STEPS = 16  # positions per piece of the float64 reference


def cases() -> list[Case]:
    """Shapes of the design notes (D=4096 is Samba-1.7B), of the demo model, and of Samba-1.3B's decoding
    step.
    """
    found = []
    for dtype in ("fp32", "bf16"):
        found += [
            sequence(dtype, 1, 512, 256, quick=True),
            sequence(dtype, 2, 512, 512),
            sequence(dtype, 1, 2048, 512),
            sequence(dtype, 1, 4096, 2048),
            _decode(dtype, 1, 4608, quick=True),
            _decode(dtype, 64, 4608),
            _conv_and_state(dtype, 1, 4608, quick=True),
        ]
    return found


def sequence(dtype: str, B: int, D: int, L: int, *, quick: bool = False) -> Case:
    def inputs() -> Inputs:
        """Channel-last activations, step sizes between 1e-3 and 1e-1, A as Mamba starts it."""
        cast = DTYPES[dtype]
        activations = {name: torch.randn(B, L, D).to(cast).transpose(1, 2) for name in ("u", "delta", "z")}
        maps = {name: torch.randn(B, L, N).to(cast).transpose(1, 2) for name in ("B", "C")}
        return activations | maps | _parameters(D)

    steps, channels = B * D * L * N, B * D * L
    large = D >= 2048
    targets = [Target(FORWARD, "rate", 3.5e9), Target(BOTH, "rate", 1.0e9)] if large else []
    if large and dtype == "fp32":
        targets += [
            Target(FORWARD, "speedup", 60, "step loop"),
            Target(FORWARD, "speedup", 140, "mambapy pscan"),
            Target(BOTH, "speedup", 60, "mambapy pscan"),
        ]
    element = DTYPES[dtype].itemsize
    return Case(
        op="selective_scan",
        name=f"B{B}_D{D}_L{L}_N{N}",
        dtype=dtype,
        shape={"B": B, "D": D, "L": L, "N": N},
        inputs=inputs,
        reference=_reference_by_pieces,
        contenders=(
            Contender("fastlm", operator("selective_scan", delta_softplus=True), ours=True),
            Contender("step loop", _step_loop),
            Contender("chunks in step", _chunks_in_step),
            Contender("step loop compiled", _compiled_step_loop, compiled=True),
            Contender("mambapy pscan", _mambapy),
            Contender("mamba_ssm", _mamba_ssm),
        ),
        # Per state and step: exp(dt A), and four multiply-adds or products (dt A, a h + x, (dt u) B, C h).
        # Per channel and step: softplus (exp and log) and the gate. The backward pass computes the states
        # again and goes back with about twice the arithmetic.
        work={
            FORWARD: Work(
                steps, "state-steps", {"exp2": steps + 4 * channels, "fma": 8 * steps}, 4 * channels * element
            ),
            BOTH: Work(
                steps,
                "state-steps",
                {"exp2": 2 * steps + 6 * channels, "fma": 32 * steps},
                12 * channels * element,
            ),
        },
        gradients=("u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
        targets=tuple(targets),
        quick=quick,
    )


def _parameters(D: int) -> Inputs:
    """A, D and the bias of the step sizes, float32 as in training."""
    steps = torch.exp(torch.empty(D).uniform_(-6.9, -2.3))
    return {
        "A": -torch.arange(1.0, N + 1).repeat(D, 1),
        "D": torch.randn(D),
        "delta_bias": steps + torch.log(-torch.expm1(-steps)),  # softplus(delta_bias) = steps
    }


def _reference_by_pieces(inputs: Inputs) -> Call:
    """The definition, a few positions at a time with the state carried over: its backward pass goes through a
    whole input for every position, which would take hours for long rows."""
    scan = member("fastlm.reference", "selective_scan")
    along_time = ("u", "delta", "z", "B", "C")

    def piece(state: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        cut = dict(zip(inputs, tensors, strict=True))
        out, last = scan(**cut, delta_softplus=True, return_last_state=True, initial_state=state)
        return out, last

    def call() -> Tensor:
        u, A = inputs["u"], inputs["A"]
        state = torch.zeros(u.shape[0], *A.shape, dtype=torch.float64)
        count = -(-u.shape[2] // _REFERENCE_STEPS)
        cuts = [
            t.split(_REFERENCE_STEPS, dim=-1) if name in along_time else (t,) * count
            for name, t in inputs.items()
        ]
        outs = []
        for tensors in zip(*cuts, strict=True):
            out, state = checkpoint(piece, state, *tensors, use_reentrant=False)
            outs.append(out)
        return torch.cat(outs, dim=2)

    return call


def step_loop(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """All decays and inputs as `(L, B, D, N)`, then one position after the other, as the field's reference
    function.

    Positions are taken by `unbind`: by indexing, the backward pass would fill a zero tensor of full length
    for each.
    """
    steps = dt.permute(2, 0, 1)[..., None]  # (L, B, D, 1)
    decays = torch.exp(steps * a)
    entering = steps * b.transpose(0, 1)[:, :, None] * u.permute(2, 0, 1)[..., None]
    state = torch.zeros_like(decays[0])
    outputs = []
    for decay, new, c_t in zip(decays.unbind(), entering.unbind(), c.unbind(1), strict=True):
        state = decay * state + new
        outputs.append((state @ c_t[..., None]).squeeze(-1))
    return torch.stack(outputs, dim=-1)


def _around(scan: Callable[..., Tensor], inputs: Inputs) -> Call:
    """`scan(u, dt, A, B, C)` in float32 between softplus and gate, as the field's reference function does
    it.
    """

    def call() -> Tensor:
        u, z = inputs["u"].float(), inputs["z"].float()
        dt = functional.softplus(inputs["delta"].float() + inputs["delta_bias"][:, None])
        y = scan(u, dt, inputs["A"], inputs["B"].float().transpose(1, 2), inputs["C"].float().transpose(1, 2))
        return ((y + inputs["D"][:, None] * u) * functional.silu(z)).to(inputs["u"].dtype)

    return call


def _step_loop(inputs: Inputs) -> Call:
    return _around(step_loop, inputs)


def _chunks_in_step(inputs: Inputs) -> Call:
    return _around(member("fastlm.demo.plain_samba", "plain_scan"), inputs)


def _compiled_step_loop(inputs: Inputs) -> Call:
    return _around(torch.compile(step_loop), inputs)


def _mambapy(inputs: Inputs) -> Call:
    pscan = package("mambapy.pscan").pscan

    def scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        steps = dt.transpose(1, 2)[..., None]  # (B, L, D, 1)
        states = pscan(torch.exp(steps * a), steps * b[:, :, None] * u.transpose(1, 2)[..., None])
        out: Tensor = (states @ c[..., None]).squeeze(-1)
        return out.transpose(1, 2)

    return _around(scan, inputs)


def _mamba_ssm(inputs: Inputs) -> Call:
    needs = "its Mamba-1 scan is CUDA only"
    scan = package("mamba_ssm.ops.selective_scan_interface", needs=needs).selective_scan_fn
    return lambda: scan(**inputs, delta_softplus=True)


def _decode(dtype: str, B: int, D: int, *, quick: bool = False) -> Case:
    return Case(
        op="selective_scan",
        name=f"update_B{B}_D{D}_N{N}",
        dtype=dtype,
        shape={"B": B, "D": D, "N": N},
        inputs=lambda: _step_inputs(dtype, B, D),
        reference=definition("selective_state_update", dt_softplus=True),
        contenders=(
            Contender(
                "fastlm", operator("selective_state_update", dt_softplus=True), ours=True, mode="inference"
            ),
            Contender("plain PyTorch", plain_state_update, mode="inference"),
        ),
        work={DECODE: Work(B * D * N, "state-steps", _step_floor(B, D), 8 * B * D * N)},
        part=DECODE,
        mutated=("state",),
        quick=quick,
    )


def _step_inputs(dtype: str, B: int, D: int) -> Inputs:
    cast = DTYPES[dtype]
    parameters = _parameters(D)
    return {
        "state": torch.randn(B, D, N),
        **{name: torch.randn(B, D).to(cast) for name in ("x", "dt", "z")},
        **{name: torch.randn(B, N).to(cast) for name in ("B", "C")},
        "A": parameters["A"],
        "D": parameters["D"],
        "dt_bias": parameters["delta_bias"],
    }


def _step_floor(B: int, D: int) -> dict[str, float]:
    return {"exp2": B * D * (N + 4), "fma": 8 * B * D * N}


def plain_state_update(inputs: Inputs) -> Call:
    """The usual form of one decoding step, in float32."""
    state, A = inputs["state"], inputs["A"]

    def call() -> Tensor:
        x, z = inputs["x"].float(), inputs["z"].float()
        dt = functional.softplus(inputs["dt"].float() + inputs["dt_bias"])[..., None]
        entering = dt * inputs["B"].float()[:, None] * x[..., None]
        state.mul_(torch.exp(dt * A)).add_(entering)
        y = (state @ inputs["C"].float()[..., None]).squeeze(-1) + inputs["D"] * x
        return (y * functional.silu(z)).to(inputs["x"].dtype)

    return call


def _conv_and_state(dtype: str, B: int, D: int, *, quick: bool = False) -> Case:
    """What a mixer does between its projections for one token: convolution step, then state step on its
    output.
    """

    def inputs() -> Inputs:
        cast = DTYPES[dtype]
        conv = {
            "conv_state": torch.randn(B, D, W - 1).to(cast),
            "weight": torch.randn(D, W).to(cast) / W,
            "bias": torch.randn(D).to(cast) / W,
        }
        return _step_inputs(dtype, B, D) | conv

    floor = _step_floor(B, D)
    floor = {"exp2": floor["exp2"] + B * D, "fma": floor["fma"] + 2 * W * B * D}
    return Case(
        op="selective_scan",
        name=f"conv_and_update_B{B}_D{D}_N{N}",
        dtype=dtype,
        shape={"B": B, "D": D, "N": N, "W": W},
        inputs=inputs,
        reference=_both_steps("fastlm.reference"),
        contenders=(
            Contender("fastlm", _both_steps("fastlm.ops"), ours=True, mode="inference"),
            Contender("plain PyTorch", _plain_both_steps, mode="inference"),
        ),
        work={DECODE: Work(B * D * N, "state-steps", floor, 8 * B * D * N)},
        part=DECODE,
        mutated=("state", "conv_state"),
        targets=(Target(DECODE, "time", 25e-6),),
        quick=quick,
    )


def _both_steps(module: str) -> Build:
    def build(inputs: Inputs) -> Call:
        conv, update = member(module, "causal_conv1d_update"), member(module, "selective_state_update")
        state, x, dt, A, B, C, D, z, dt_bias = (
            inputs[name] for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
        )
        conv_state, weight, bias = (inputs[name] for name in ("conv_state", "weight", "bias"))

        def call() -> Tensor:
            u = conv(x, conv_state, weight, bias, "silu")
            out: Tensor = update(state, u, dt, A, B, C, D, z, dt_bias, True)
            return out

        return call

    return build


def _plain_both_steps(inputs: Inputs) -> Call:
    conv = plain_update(inputs)
    after = dict(inputs)
    update = plain_state_update(after)

    def call() -> Tensor:
        after["x"] = conv()  # type: ignore[assignment]
        return update()  # type: ignore[return-value]

    return call
