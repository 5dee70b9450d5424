"""Every published Samba size, GRIN-MoE and its siblings, and small ones for tests and demonstrations.

Sources: Ren et al., arXiv 2406.07522v3, Table 12, and the configurations of the public Samba code (heads of
the GQA and MQA variants, Mamba-SWA-MLP, Llama-SWA). Block counts are half of the paper's layer counts.
"""

from __future__ import annotations

from fastlm.models.samba.config import SambaConfig

_SAMBA_421M = SambaConfig()
_SAMBA_1_3B = SambaConfig(
    hidden_size=2304, num_hidden_layers=18, num_attention_heads=18, intermediate_size=6144
)
_MAMBA_SWA_MLP = ("mamba+sliding_attention",)
_SWA_ONLY = ("sliding_attention",)
# The small key/value variants spend the saved parameters on a wider feed-forward layer.
_FEW_KV_HEADS = _SAMBA_421M.changed(intermediate_size=4608)

# Liu et al., arXiv 2409.12136, Table 1 and the configuration on the hub: 41.87 billion parameters, 6.64 of them used by a token. The
# window is the paper's; the hub's 2047 is a kernel's left bound and means the same. The coefficient is that of the released
# configuration, for fine-tuning: the one of the training is not published.
_GRIN_MOE = SambaConfig(
    vocab_size=32064,
    hidden_size=4096,
    num_hidden_layers=32,
    layer_pattern=_SWA_ONLY,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=6400,
    sliding_window=2048,
    tie_word_embeddings=False,
    norm_type="layer_norm",
    attention_bias=True,
    lm_head_bias=True,
    num_experts=16,
    router_aux_loss_coef=0.0,
    eos_token_id=32000,
)

PRESETS: dict[str, SambaConfig] = {
    "Samba_421M": _SAMBA_421M,
    "Samba_1.3B": _SAMBA_1_3B,
    "Samba_1.7B": SambaConfig(
        vocab_size=50304,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=4,
        intermediate_size=8196,
    ),
    "Samba_3.8B": SambaConfig(
        vocab_size=32064,
        hidden_size=2816,
        num_hidden_layers=32,
        num_attention_heads=11,
        num_key_value_heads=1,
        intermediate_size=9984,
    ),
    "Samba_421M_mqa": _FEW_KV_HEADS.changed(num_key_value_heads=1),
    "Samba_421M_gqa2": _FEW_KV_HEADS.changed(num_key_value_heads=2),
    "Samba_421M_gqa4": _FEW_KV_HEADS.changed(num_key_value_heads=4),
    "Samba_421M_mqa6": _FEW_KV_HEADS.changed(num_attention_heads=6, num_key_value_heads=1),
    "Samba_421M_nope": _SAMBA_421M.changed(use_rope=False),
    "Samba_421M_1k_window": _SAMBA_421M.changed(sliding_window=1024),
    "Samba_421M_512_window": _SAMBA_421M.changed(sliding_window=512),
    "Samba_1.3B_nope": _SAMBA_1_3B.changed(use_rope=False),
    "Mamba_SWA_MLP_400M": _SAMBA_421M.changed(num_hidden_layers=8, layer_pattern=_MAMBA_SWA_MLP),
    "Mamba_SWA_MLP_1.3B": _SAMBA_1_3B.changed(num_hidden_layers=12, layer_pattern=_MAMBA_SWA_MLP),
    "LLaMA_438M_SWA": _SAMBA_421M.changed(num_hidden_layers=14, layer_pattern=_SWA_ONLY),
    "LLaMA_1.3B_SWA": _SAMBA_1_3B.changed(num_hidden_layers=20, layer_pattern=_SWA_ONLY),
    "GRIN_MoE": _GRIN_MOE,
    # Li et al., arXiv 2506.18349: GRIN's shape with slimmer experts and, in tiny, half the heads. Seen in copies of the tiny model's
    # configuration: its sizes, heads and expert width; of the mini model only the totals, which these sizes give. Window, special
    # tokens and noise of both are taken over from GRIN, unverified.
    "Phi_mini_MoE": _GRIN_MOE.changed(intermediate_size=960),
    "Phi_tiny_MoE": _GRIN_MOE.changed(
        intermediate_size=448, num_attention_heads=16, num_key_value_heads=4, head_dim=128
    ),
    # 2.1 million parameters, one group of Samba's layers: what learned most from text in two minutes on two CPU cores.
    "demo": SambaConfig(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=640,
        sliding_window=128,
    ),
    # For tests: every kind of odd size, milliseconds a step.
    "tiny": SambaConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=60,
        sliding_window=8,
        state_size=4,
    ),
}
PRESETS["tiny_moe"] = PRESETS["tiny"].changed(num_experts=4, intermediate_size=20)

_BY_KEY = {name.lower().replace("-", "_"): config for name, config in PRESETS.items()}


def preset(name: str) -> SambaConfig:
    """The configuration called `name`; upper and lower case, `-` and `_` are the same.

    Raises:
        ValueError: no such preset; the text lists all.
    """
    config = _BY_KEY.get(name.lower().replace("-", "_"))
    if config is None:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return config


def peak_learning_rate(name: str) -> float:
    """AdamW's peak learning rate for the preset `name`: Table 12's, or what trained best for the small ones.

    The published ones are for batches of millions of tokens, the small ones' for about a thousand. GRIN-MoE's and its siblings' are
    not published: theirs is a cautious choice for models of their width, tried by nobody here.

    Raises:
        ValueError: no such preset.
    """
    preset(name)
    key = name.lower().replace("-", "_")
    chosen = {"demo": 1e-2, "tiny": 2e-3, "tiny_moe": 2e-3}
    chosen |= dict.fromkeys(("grin_moe", "phi_mini_moe", "phi_tiny_moe"), 2e-4)
    return chosen.get(key, 6e-4 if key in ("samba_1.7b", "samba_3.8b") else 4e-4)
