"""The Mamba-1 mixer: projection, causal convolution, selective scan, gate, projection.

Everything stays in `(B, L, D)` memory. The operators get transposed views `(B, D, L)` with unit stride over
`D`, which they take without a copy, and answer in the same layout; the split of `in_proj` and of `x_proj` are
views too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlm import ops
from fastlm.layers.rms_norm import RMSNorm, at_least_float32


@dataclass(frozen=True)
class MambaState:
    """What one Mamba layer carries from one token to the next, per row of the batch.

    Attributes:
        conv: `(B, D, W-1)`, the last inputs of the convolution, oldest first, in the activation dtype.
        scan: `(B, D, N)`, the recurrent state, float32.
    """

    conv: Tensor
    scan: Tensor


class ScanInputs(NamedTuple):
    """Arguments of `selective_scan` in its order, `(B, D, L)` and `(B, N, L)`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    delta_bias: Tensor


class Mamba(nn.Module):
    """Selective state-space mixer (S6) with the parameter names of `mamba_ssm`.

    `x, z = in_proj(h)`; `u = silu(conv1d(x))`; `dt, B, C = x_proj(u)`; `y = scan(u, dt_proj(dt), A, B, C, D)
    * silu(z)`; `out_proj(y)`, with `A = -exp(A_log)` and `softplus` on `dt` inside the scan.

    Args:
        d_model: width `d` of input and output.
        d_state: `N`, states per channel.
        d_conv: `W`, taps of the convolution, at least 2.
        expand: inner width `D = expand * d_model`.
        dt_rank: rank of the step size; `"auto"` is `ceil(d_model / 16)`.
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.
        dt_init_floor: smallest initial step size.
        conv_bias: bias in the convolution.
        bias: bias in `in_proj` and `out_proj`.
        bcdt_rms_norm: normalise the low-rank step, `B` and `C` before the scan: `"affine"` with the weights
            `dt_layernorm`, `b_layernorm` and `c_layernorm` (Jamba), `"plain"` without (Falcon-Mamba).
        bcdt_rms_eps: of these norms.
        device, dtype: of the parameters. `A_log`, `D` and `dt_proj.bias` are float32 even when `dtype` is a
            half type: rounding them changes the decay of long memories.

    Raises:
        ValueError: a size is out of range.

    Note:
        `dt_proj.bias` goes to the scan as `delta_bias`; it is not added by the projection.

    Source: Gu and Dao, arXiv 2312.00752, section 3.4; words and initialisation of `mamba_ssm`; norms of
    Lieber et al., arXiv 2403.19887 (Jamba), and Zuo et al., arXiv 2410.05355 (Falcon-Mamba).

    Example:
        >>> import torch
        >>> mamba = Mamba(32)
        >>> out, state = mamba(torch.randn(2, 7, 32), return_state=True)
        >>> mamba.step(torch.randn(2, 1, 32), state).shape
        torch.Size([2, 1, 32])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        bcdt_rms_norm: Literal["affine", "plain"] | None = None,
        bcdt_rms_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        sizes = {"d_model": d_model, "d_state": d_state, "expand": expand, "dt_rank": rank, "d_conv": d_conv}
        for name, size in sizes.items():
            least = 2 if name == "d_conv" else 1
            if size < least:
                raise ValueError(f"Mamba: {name} must be at least {least}, got {size}")
        if bcdt_rms_norm not in (None, "affine", "plain"):
            raise ValueError(f"Mamba: bcdt_rms_norm must be 'affine', 'plain' or None, got {bcdt_rms_norm!r}")
        self.d_model, self.d_state, self.d_conv, self.dt_rank = d_model, d_state, d_conv, rank
        self.d_inner = inner = expand * d_model
        self.dt_limits = (dt_min, dt_max, dt_init_floor)
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, device=device, dtype=dtype)
        self.conv1d = nn.Conv1d(
            inner, inner, d_conv, groups=inner, bias=conv_bias, device=device, dtype=dtype
        )
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, device=device, dtype=dtype)
        self.dt_layernorm: nn.Module | None = None
        self.b_layernorm: nn.Module | None = None
        self.c_layernorm: nn.Module | None = None
        if bcdt_rms_norm is not None:

            def norm(size: int) -> nn.Module:
                if bcdt_rms_norm == "affine":
                    return RMSNorm(size, bcdt_rms_eps, device=device, dtype=dtype)
                return nn.RMSNorm(size, bcdt_rms_eps, elementwise_affine=False)

            self.dt_layernorm, self.b_layernorm, self.c_layernorm = norm(rank), norm(d_state), norm(d_state)
        self.dt_proj = nn.Linear(rank, inner, bias=True, device=device, dtype=dtype)
        self.dt_proj.bias = nn.Parameter(torch.empty(inner, device=device, dtype=full))
        self.A_log = nn.Parameter(torch.empty(inner, d_state, device=device, dtype=full))
        self.D = nn.Parameter(torch.empty(inner, device=device, dtype=full))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, device=device, dtype=dtype)
        self.reset_state_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew: PyTorch's defaults, then the state parameters."""
        for module in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            module.reset_parameters()
        for norm in (self.dt_layernorm, self.b_layernorm, self.c_layernorm):
            if isinstance(norm, (RMSNorm, nn.RMSNorm)):
                norm.reset_parameters()
        self.reset_state_parameters()

    @torch.no_grad()
    def reset_state_parameters(self) -> None:
        """Initial values of the recurrence.

        `A_log[:, n] = log(n + 1)`, `D = 1`, `dt_proj.weight ~ U(+-rank^-1/2)`, and `dt_proj.bias` such that
        its softplus is log-uniform between `dt_min` and `dt_max`.
        """
        low, high, floor = self.dt_limits
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        step = (
            torch.empty_like(self.dt_proj.bias)
            .uniform_(math.log(low), math.log(high))
            .exp_()
            .clamp_(min=floor)
        )
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
        n = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=self.A_log.dtype)
        self.A_log.copy_(n.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def new_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """A zero state for `batch_size` rows; `dtype` is that of the activations, default the weights'."""
        device = device or self.A_log.device
        conv_shape = (batch_size, self.d_inner, self.d_conv - 1)
        return MambaState(
            conv=torch.zeros(conv_shape, device=device, dtype=dtype or self.in_proj.weight.dtype),
            scan=torch.zeros(
                batch_size,
                self.d_inner,
                self.d_state,
                device=device,
                dtype=at_least_float32(self.A_log).dtype,
            ),
        )

    def forward(
        self,
        hidden_states: Tensor,
        state: MambaState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MambaState]:
        """Mix a whole sequence, or continue one.

        Args:
            hidden_states: `(B, L, d)`; with `cu_seqlens`, `(1, T, d)`.
            state: where to start, one row per sequence; default zeros. It is read, not written.
            cu_seqlens: `(S+1,)` int, bounds of packed sequences; nothing leaks from one into the next.
            return_state: also return the state after the last token.

        Returns:
            out: shape of `hidden_states`.
            state: with `return_state`, `B` rows (`S` rows with `cu_seqlens`). Gradients flow through it.
        """
        inputs, conv = self.before_scan(hidden_states, state, cu_seqlens=cu_seqlens)
        y, scan = ops.selective_scan(
            *inputs,
            delta_softplus=True,
            return_last_state=True,
            initial_state=None if state is None else state.scan,
            cu_seqlens=cu_seqlens,
        )
        out = self.after_scan(y)
        return (out, MambaState(conv, scan)) if return_state else out

    def before_scan(
        self, hidden_states: Tensor, state: MambaState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[ScanInputs, Tensor]:
        """What the scan of `forward` takes (with `delta_softplus`), and the convolution's state afterwards.

        With `after_scan` around a scan of your own this is `forward`.
        """
        # Split where it is contiguous in the gradient, then (B, D, L) views.
        x, z = (half.transpose(1, 2) for half in self.in_proj(hidden_states).chunk(2, dim=-1))
        u, conv = ops.causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_states=None if state is None else state.conv,
            return_final_states=True,
            activation="silu",
            cu_seqlens=cu_seqlens,
        )
        delta, b, c = self._step_inputs(u.transpose(1, 2))
        inputs = ScanInputs(
            u,
            delta.transpose(1, 2),
            self._a(),
            b.transpose(1, 2),
            c.transpose(1, 2),
            at_least_float32(self.D),
            z,
            at_least_float32(self.dt_proj.bias),
        )
        return inputs, conv

    def after_scan(self, y: Tensor) -> Tensor:
        """The layer's result `(B, L, d)` for that of the scan, `y (B, D, L)`."""
        out: Tensor = self.out_proj(y.transpose(1, 2))
        return out

    def step(self, hidden_states: Tensor, state: MambaState) -> Tensor:
        """Mix one more token per row, `hidden_states (B, 1, d)`, and write `state` in place. No gradients."""
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)  # (B, D) views
        u = ops.causal_conv1d_update(
            x, state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu"
        )
        delta, b, c = self._step_inputs(u)
        y = ops.selective_state_update(
            state.scan,
            u,
            delta,
            self._a(),
            b,
            c,
            at_least_float32(self.D),
            z,
            dt_bias=at_least_float32(self.dt_proj.bias),
            dt_softplus=True,
        )
        out: Tensor = self.out_proj(y)
        return out.unsqueeze(1)

    def _a(self) -> Tensor:
        """`A = -exp(A_log)`, formed in float32."""
        return -torch.exp(at_least_float32(self.A_log))

    def _step_inputs(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`delta` without its bias, `B` and `C` for `u (..., D)`."""
        low, b, c = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.dt_layernorm is not None:
            assert self.b_layernorm is not None
            assert self.c_layernorm is not None
            low, b, c = self.dt_layernorm(low), self.b_layernorm(b), self.c_layernorm(c)
        return functional.linear(low, self.dt_proj.weight), b, c
