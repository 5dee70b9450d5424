"""Drop-in surfaces: code written for mamba_ssm, causal_conv1d or flash_attn runs on fastlm's operators.

`install("mamba_ssm")` makes `import mamba_ssm` work where that package is absent; the functions behind it are in
`fastlm.compat.mamba_ssm` and can be used from there as well. Importing this package imports none of them.
"""

from fastlm.compat._install import install, uninstall

__all__ = ["install", "uninstall"]
