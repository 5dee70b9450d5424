"""Sample inputs of every operator, by name: `samples.of("selective_scan")`.

A sample is a recipe: `build` makes fresh tensors each time, since some operators write into their arguments.
    Its arguments suit
`torch.ops.fastlm.<op>`, and by the same names the public function and the reference. One module per family
lists the recipes.
"""

from __future__ import annotations

from tests.support.samples import (
    causal_conv1d,
    grin_route,
    moe_dispatch,
    samba_decode_step,
    scan_swa,
    selective_scan,
    sliding_window_attention,
    slm_loss,
)
from tests.support.samples.sample import Call, Recipe, Sample

FAMILIES = {
    "causal_conv1d": causal_conv1d,
    "selective_scan": selective_scan,
    "sliding_window_attention": sliding_window_attention,
    "samba_decode_step": samba_decode_step,
    "scan_swa": scan_swa,
    "grin_route": grin_route,
    "moe_dispatch": moe_dispatch,
    "slm_loss": slm_loss,
}

# Arguments that the public function gives its operator by itself: no sample has them, the tests of the family do.
SET_BY_THE_FUNCTION = {"moe_experts": ("keep_gate_up",)}


def operators() -> tuple[str, ...]:
    """Names of the operators that have samples."""
    return tuple(op for family in FAMILIES.values() for op in family.RECIPES)


def of(op: str, *words: str) -> list[Sample]:
    """Samples of operator `op`, those whose name has every one of `words` in it."""
    for family in FAMILIES.values():
        if op in family.RECIPES:
            found = [
                Sample(op, name, recipe)
                for name, recipe in family.RECIPES[op].items()
                if all(word in name for word in words)
            ]
            if not found:
                raise LookupError(f"no sample of {op} has all of {words} in its name")
            return found
    raise LookupError(f"no samples for operator {op}: add them to tests/support/samples/<family>.py")


__all__ = ["FAMILIES", "SET_BY_THE_FUNCTION", "Call", "Recipe", "Sample", "of", "operators"]
