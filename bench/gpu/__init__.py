"""Checks and measures the CUDA operators on one GPU: `python -m bench.gpu --help`.

Parts: `check`, `sanitize`, `ceilings`, `bench`, `report`. Every case runs in a worker process, so that one that crashes or hangs is
recorded and the rest goes on; results are kept in one file as they come, and a second call continues where the first stopped.
"""

from __future__ import annotations

__all__: list[str] = []
