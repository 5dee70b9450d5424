"""Samba: Mamba and sliding-window attention in turn (Ren et al., arXiv 2406.07522).

config.py      SambaConfig          sizes, checked
presets.py     PRESETS, preset      every published size
modeling.py    SambaForCausalLM     blocks, loss
cache.py       SambaCache           state between calls
generation.py  generate             prefill in chunks, decode, sampling
checkpoint.py                       config.json and model.safetensors
phimoe.py      load_phimoe          weights of GRIN-MoE and its siblings, both ways
"""

from fastlm.models.samba.cache import LayerCache, SambaCache
from fastlm.models.samba.config import SambaConfig
from fastlm.models.samba.generation import Sampling
from fastlm.models.samba.modeling import SambaForCausalLM, SambaModel, SambaOutput
from fastlm.models.samba.phimoe import load_phimoe, save_phimoe
from fastlm.models.samba.presets import PRESETS, peak_learning_rate, preset

__all__ = [
    "PRESETS",
    "LayerCache",
    "SambaCache",
    "SambaConfig",
    "SambaForCausalLM",
    "SambaModel",
    "SambaOutput",
    "Sampling",
    "load_phimoe",
    "peak_learning_rate",
    "preset",
    "save_phimoe",
]
