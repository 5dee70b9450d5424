"""What a family module says about an operator under autocast; `_attach.py` registers it."""

from __future__ import annotations

from typing import NamedTuple


class Cast(NamedTuple):
    """The arguments that autocast casts. Everything else stays: float64, integers, None, arguments not named.

    Attributes:
        names: of the arguments.
        least_dim: tensors of fewer dimensions stay.
        like: the argument whose dtype they take; default autocast's own. For an argument that is written in place: it cannot be
            cast itself.
    """

    names: tuple[str, ...]
    least_dim: int = 0
    like: str | None = None
