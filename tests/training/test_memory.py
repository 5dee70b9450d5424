"""Memory of the process: marks and what happens to freed memory."""

from __future__ import annotations

import platform
import subprocess
import sys

from fastlm.training.memory import peak_memory_bytes, reset_peak_memory, resident_memory_bytes

FREED = """
import sys, torch
from fastlm.training.memory import keep_freed_memory, resident_memory_bytes
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
blocks = [torch.ones(2**20) for _ in range(16)]
full = resident_memory_bytes()
del blocks
print(kept, full - resident_memory_bytes())
"""


def test_the_peak_is_of_the_phase_since_the_reset():
    import torch

    if not reset_peak_memory():
        assert platform.system() != "Linux"
        return
    before = peak_memory_bytes()
    block = torch.ones(2**23)
    assert peak_memory_bytes() - before > 2**24
    del block
    assert reset_peak_memory()
    assert peak_memory_bytes() <= max(before, resident_memory_bytes()) + 2**23


def test_freed_memory_is_kept_where_asked_for():
    def freed(word: str) -> tuple[str, int]:
        done = subprocess.run([sys.executable, "-c", FREED, word], capture_output=True, text=True, check=True)
        kept, size = done.stdout.split()
        return kept, int(size)

    kept, size = freed("keep")
    if platform.libc_ver()[0] != "glibc":
        assert kept == "False"
        return
    assert (kept, freed("default")[0]) == ("True", "None")
    assert size < 2**24, "64 MiB were freed and most of it must still be there"
    assert freed("default")[1] > 2**25
