"""Samba in plain PyTorch: the same model and parameter names without a single operator of fastlm.

It serves twice: as an independent oracle for tests, and as the peer that timings are compared with. Two
flavours of the scan:

* `plain`: the sequence is cut into chunks that advance side by side, 32 steps instead of L, then the chunks
  are joined. The fastest readable form we know without a kernel.
* `step_loop`: the form of transformers' Mamba without kernels: decays and inputs of all steps as `(B, D, L,
  N)` tensors, then a Python loop over L.

The rest is what one would write today: `functional.conv1d`, `functional.scaled_dot_product_attention` with a
window mask, `functional.cross_entropy` over all logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlm.models.samba import SambaConfig

CHUNK = 32  # steps of the `plain` scan that run one after the other

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def step_loop_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`h_t = exp(dt_t a) h_{t-1} + dt_t b_t u_t`, `y_t = c_t h_t`, one step after the other.

    Args:
        u, dt: `(B, D, L)`, dt positive.
        a: `(D, N)`.
        b, c: `(B, L, N)`.

    Returns:
        `(B, D, L)`.
    """
    decay = torch.exp(a[None, :, None, :] * dt[..., None])  # (B, D, L, N)
    inputs = dt[..., None] * b[:, None] * u[..., None]
    state = torch.zeros_like(decay[:, :, 0])
    outputs = []
    for t in range(u.shape[-1]):
        state = decay[:, :, t] * state + inputs[:, :, t]
        outputs.append((state @ c[:, t, :, None]).squeeze(-1))
    return torch.stack(outputs, dim=-1)


def plain_scan(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence of `step_loop_scan`, all chunks of the sequence in step; same arguments and result."""
    batch, inner, length = u.shape
    chunks = -(-length // CHUNK)
    fill = chunks * CHUNK - length

    def steps(x: Tensor) -> tuple[Tensor, ...]:
        """`(B, L, X)` to CHUNK tensors `(chunks, B, X)`; added steps have dt = 0 and change nothing."""
        return functional.pad(x, (0, 0, 0, fill)).view(batch, chunks, CHUNK, -1).transpose(0, 2).unbind(0)

    dts, cs = steps(dt.transpose(1, 2)), steps(c)
    state, elapsed = None, None
    states, times = [], []
    for dt_t, dtu_t, b_t in zip(dts, steps((dt * u).transpose(1, 2)), steps(b), strict=True):
        entering = dtu_t[..., None] * b_t[:, :, None]  # (chunks, B, D, N)
        state = entering if state is None else torch.exp(dt_t[..., None] * a) * state + entering
        elapsed = dt_t if elapsed is None else elapsed + dt_t
        states.append(state)
        times.append(elapsed)
    carry = torch.zeros_like(states[-1][0])
    carries = []
    for decay, end in zip(torch.exp(times[-1][..., None] * a).unbind(0), states[-1].unbind(0), strict=True):
        carries.append(carry)
        carry = decay * carry + end
    entered = torch.stack(carries)  # state at the start of every chunk
    outputs = [
        ((h + torch.exp(t[..., None] * a) * entered) @ c_t[..., None]).squeeze(-1)
        for h, t, c_t in zip(states, times, cs, strict=True)
    ]
    return (
        torch.stack(outputs).transpose(0, 2).reshape(batch, chunks * CHUNK, inner)[:, :length].transpose(1, 2)
    )


SCANS: dict[str, Scan] = {"plain": plain_scan, "step_loop": step_loop_scan}


class PlainNorm(nn.Module):
    """Root-mean-square norm in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class PlainMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: SambaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`w3(silu(w1 x) * w2 x)`."""
        out: Tensor = self.w3(functional.silu(self.w1(x)) * self.w2(x))
        return out


class PlainMamba(nn.Module):
    """Mamba-1 mixer."""

    def __init__(self, config: SambaConfig, scan: Scan) -> None:
        super().__init__()
        inner, rank = config.expand * config.hidden_size, config.time_step_rank or 1
        self.scan = scan
        self.sizes = [rank, config.state_size, config.state_size]
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(
            inner, inner, config.conv_kernel, groups=inner, padding=config.conv_kernel - 1
        )
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.zeros(inner, config.state_size))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(B, L, d)` to `(B, L, d)`."""
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        u = functional.silu(self.conv1d(x)[..., : x.shape[-1]])
        low, b, c = self.x_proj(u.transpose(1, 2)).split(self.sizes, dim=-1)
        dt = functional.softplus(self.dt_proj(low)).transpose(1, 2)
        y = self.scan(u, dt, -torch.exp(self.A_log), b, c) + self.D[:, None] * u
        out: Tensor = self.out_proj((y * functional.silu(z)).transpose(1, 2))
        return out


class PlainAttention(nn.Module):
    """Sliding-window attention with rotary positions, by a mask over all pairs."""

    def __init__(self, config: SambaConfig) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.head_dim = config.head_dim or config.hidden_size // heads
        self.window = config.sliding_window
        self.theta = config.rope_theta if config.use_rope else None
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(B, L, d)` to `(B, L, d)`."""
        projections = (self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projections)  # (B, H, L, K)
        length = hidden.shape[1]
        if self.theta is not None:
            q, k = self._rotated(q), self._rotated(k)
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        visible = (distance >= 0) & (distance < self.window)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(-2))
        return projected

    def _rotated(self, x: Tensor) -> Tensor:
        half = self.head_dim // 2
        frequency = (self.theta or 1.0) ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
        angle = torch.arange(x.shape[-2], dtype=torch.float64, device=x.device)[:, None] * frequency
        cos, sin = angle.cos().repeat(1, 2).to(x.dtype), angle.sin().repeat(1, 2).to(x.dtype)
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos + turned * sin


class PlainBlock(nn.Module):
    """Mixers and feed-forward layer, each behind its norm."""

    def __init__(self, config: SambaConfig, kind: str, scan: Scan) -> None:
        super().__init__()
        self.branches = []
        if "mamba" in kind:
            self.mamba_norm, self.mamba = (
                PlainNorm(config.hidden_size, config.rms_norm_eps),
                PlainMamba(config, scan),
            )
            self.branches.append("mamba")
        if "sliding_attention" in kind:
            self.attn_norm, self.attn = (
                PlainNorm(config.hidden_size, config.rms_norm_eps),
                PlainAttention(config),
            )
            self.branches.append("attn")
        self.mlp_norm, self.mlp = PlainNorm(config.hidden_size, config.rms_norm_eps), PlainMLP(config)
        self.branches.append("mlp")

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream in and out."""
        for name in self.branches:
            x = x + getattr(self, name)(getattr(self, f"{name}_norm")(x))
        return x


class PlainBackbone(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: SambaConfig, scan: Scan) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config, kind, scan) for kind in config.layer_types)
        self.norm = PlainNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids `(B, L)` to hidden states `(B, L, d)`."""
        x = self.embed_tokens(input_ids)
        for block in self.layers:
            x = block(x)
        hidden: Tensor = self.norm(x)
        return hidden


class PlainSamba(nn.Module):
    """A Samba language model that loads the `state_dict` of `SambaForCausalLM`.

    Args:
        config: sizes.
        scan: `"plain"` or `"step_loop"`, see the head of this file.

    Raises:
        ValueError: another word for `scan`.
    """

    def __init__(self, config: SambaConfig, *, scan: str = "plain") -> None:
        super().__init__()
        if scan not in SCANS:
            raise ValueError(f"PlainSamba: scan must be one of {', '.join(SCANS)}, got {scan!r}")
        self.model = PlainBackbone(config, SCANS[scan])
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """Loss and all logits `(B, L, V)`; position `t` is compared with label `t + 1`, -100 is left out."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits = functional.linear(self.model(input_ids), weight)
        if labels is None:
            return None, logits
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = functional.cross_entropy(
            precise[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        return loss, logits

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Greedy continuation without a cache: every token is a pass over all before it."""
        for _ in range(max_new_tokens):
            following = self(input_ids)[1][:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat((input_ids, following), dim=1)
        return input_ids
