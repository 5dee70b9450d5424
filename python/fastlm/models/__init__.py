"""Models made of `fastlm.layers`."""

from fastlm.models.samba import PRESETS, SambaCache, SambaConfig, SambaForCausalLM

__all__ = ["PRESETS", "SambaCache", "SambaConfig", "SambaForCausalLM"]
