"""The Mamba-1 part of state-spaces/mamba, on fastlm's operators.

Argument names, their order and defaults are that project's; what differs is said in docs/compat.md.
"""

from fastlm.compat.mamba_ssm.mamba import Mamba
from fastlm.compat.mamba_ssm.scan import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from fastlm.compat.mamba_ssm.state_update import selective_state_update, selective_state_update_ref

VERSION = "2.3.2.post1+fastlm"
MODULES = {
    "mamba_ssm": ("Mamba", "mamba_inner_fn", "selective_scan_fn"),
    "mamba_ssm.modules": (),
    "mamba_ssm.modules.mamba_simple": ("Mamba",),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.selective_scan_interface": (
        "mamba_inner_fn",
        "mamba_inner_ref",
        "selective_scan_fn",
        "selective_scan_ref",
    ),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update", "selective_state_update_ref"),
}

__all__ = [
    "MODULES",
    "VERSION",
    "Mamba",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
]
