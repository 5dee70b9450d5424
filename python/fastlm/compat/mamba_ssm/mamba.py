"""The Mamba-1 module under the words of mamba_ssm: constructor, cache and decoding step."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from fastlm import layers
from fastlm.layers import MambaState


class InferenceParams(Protocol):
    """What a generation loop passes to every layer: its cache, and how many tokens are in it."""

    key_value_memory_dict: MutableMapping[int, tuple[Tensor, Tensor]]
    seqlen_offset: int


class Mamba(layers.Mamba):
    """`fastlm.layers.Mamba` with the constructor and the calls of `mamba_ssm.modules.mamba_simple.Mamba`.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init_floor, conv_bias, bias: as in
            `fastlm.layers.Mamba`; `expand` a whole number.
        dt_init: `"random"`: uniform weights of the step size's projection; `"constant"`: one value.
        dt_scale: factor of their bound, or of that value.
        use_fast_path: both values give the same computation here.
        layer_idx: key of this layer in `inference_params`.
        device, dtype: of the parameters. `A_log`, `D` and `dt_proj.bias` are float32 even when `dtype` is a half
            type (the original rounds the last one).

    Raises:
        ValueError: a size is out of range, `expand` is not a whole number, or `dt_init` is unknown.

    Note:
        The state dict has the original's names and shapes.

    Source: state-spaces/mamba, `Mamba`; Gu and Dao, arXiv 2312.00752, section 3.4.

    Example:
        >>> import torch
        >>> mamba = Mamba(32, layer_idx=0)
        >>> conv_state, ssm_state = mamba.allocate_inference_cache(2, max_seqlen=16)
        >>> out, _, _ = mamba.step(torch.randn(2, 1, 32), conv_state, ssm_state)
        >>> out.shape
        torch.Size([2, 1, 32])
    """

    # Read by the initialisation that runs inside the parent's constructor.
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if expand != int(expand):
            raise ValueError(f"Mamba: expand must be a whole number, got {expand}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba: dt_init must be 'random' or 'constant', got {dt_init!r}")
        super().__init__(
            d_model,
            d_state,
            d_conv,
            int(expand),
            dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            conv_bias=conv_bias,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.expand = int(expand)
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.activation = "silu"
        self.act = nn.SiLU()
        self.conv1d.padding = (d_conv - 1,)  # for callers that run the convolution themselves
        self.dt_init, self.dt_scale = dt_init, dt_scale
        self._scale_step_projection()
        # Marks that training scripts look for.
        for parameter, mark in (
            (self.dt_proj.bias, "_no_reinit"),
            (self.A_log, "_no_weight_decay"),
            (self.D, "_no_weight_decay"),
        ):
            setattr(parameter, mark, True)

    def reset_state_parameters(self) -> None:
        """Initial values of the recurrence, with `dt_init` and `dt_scale`."""
        super().reset_state_parameters()
        self._scale_step_projection()

    @torch.no_grad()
    def _scale_step_projection(self) -> None:
        if self.dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, self.dt_scale * self.dt_rank**-0.5)
        else:
            self.dt_proj.weight.mul_(self.dt_scale)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, inference_params: InferenceParams | None = None
    ) -> Tensor:
        """Mix a whole sequence; with `inference_params`, also fill this layer's cache, or decode from it.

        Args:
            hidden_states: `(B, L, d)`; `L` is 1 when `inference_params.seqlen_offset` is positive.
            inference_params: the cache of all layers. At offset 0 the sequence starts from zero and this layer's
                states are written; else one token is decoded and they are updated.

        Returns:
            out: shape of `hidden_states`.

        Raises:
            ValueError: `inference_params` without `layer_idx`; several tokens at a positive offset.
        """
        if inference_params is None:
            return cast(Tensor, super().forward(hidden_states))
        conv_state, ssm_state = self._states(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        mixed = super().forward(hidden_states, return_state=True)
        out, state = cast("tuple[Tensor, MambaState]", mixed)
        with torch.no_grad():
            # The cache holds one input more than the convolution looks back at.
            conv_state[..., 1:] = state.conv
            conv_state[..., 0] = 0
            if hidden_states.shape[1] >= self.d_conv:
                oldest = self.in_proj(hidden_states[:, -self.d_conv])
                conv_state[..., 0] = oldest[..., : self.d_inner]
            ssm_state.copy_(state.scan)
        return out

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix one more token per row and write both states in place. No gradients.

        Args:
            hidden_states: `(B, 1, d)`.
            conv_state: `(B, D, S)` with `S >= d_conv - 1`, dtype of the activations.
            ssm_state: `(B, D, N)`.

        Returns:
            out, conv_state, ssm_state: `(B, 1, d)`, and the two tensors passed in.

        Raises:
            ValueError: not one token per row.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
            raise ValueError(
                f"Mamba.step: hidden_states must have shape (B, 1, {self.d_model}), got {tuple(hidden_states.shape)}"
            )
        out = super().step(hidden_states, MambaState(conv_state, ssm_state))
        return out, conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Zero states for `batch_size` rows.

        Args:
            batch_size: rows.
            max_seqlen: not used: the states do not grow with the sequence. Nor are further keywords, which
                generation loops pass to layers of every kind.
            dtype: of both states; default: that of the weights. A half-precision scan state loses small
                contributions.

        Returns:
            conv_state, ssm_state: `(B, D, d_conv)` and `(B, D, N)`.
        """
        conv_state = torch.zeros(
            (batch_size, self.d_inner, self.d_conv),
            device=self.out_proj.weight.device,
            dtype=dtype or self.conv1d.weight.dtype,
        )
        ssm_state = torch.zeros(
            (batch_size, self.d_inner, self.d_state),
            device=self.out_proj.weight.device,
            dtype=dtype or self.dt_proj.weight.dtype,
        )
        return conv_state, ssm_state

    def _states(self, inference_params: InferenceParams, batch_size: int) -> tuple[Tensor, Tensor]:
        """This layer's entry in the cache, made when it is not there yet."""
        if self.layer_idx is None:
            raise ValueError("Mamba: layer_idx must be given when inference_params is, got None")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        return cache[self.layer_idx]
