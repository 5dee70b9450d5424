"""The functions of Dao-AILab/flash-attention (version 2), on fastlm's operators.

Argument names, their order and defaults are that project's; what differs is said in docs/compat.md.
"""

from fastlm.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
)
from fastlm.compat.flash_attn.dense import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from fastlm.compat.flash_attn.kv_cache import flash_attn_with_kvcache
from fastlm.compat.flash_attn.rotary import apply_rotary_emb
from fastlm.compat.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

VERSION = "2.8.4+fastlm"
_INTERFACE = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
)
MODULES = {
    "flash_attn": _INTERFACE,
    "flash_attn.bert_padding": ("index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"),
    "flash_attn.flash_attn_interface": _INTERFACE,
    "flash_attn.layers": (),
    "flash_attn.layers.rotary": ("apply_rotary_emb",),
}

__all__ = [
    "MODULES",
    "VERSION",
    "apply_rotary_emb",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
]
