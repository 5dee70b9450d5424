"""Memory of the process: marks and what happens to freed memory."""

from __future__ import annotations

import platform
import subprocess
import sys

FREED = """
import sys, torch
from fastlm.training.memory import keep_freed_memory, resident_memory_bytes
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
blocks = [torch.ones(2**20) for _ in range(16)]
full = resident_memory_bytes()
del blocks
print(kept, full - resident_memory_bytes())
"""


PEAK = """
import torch
from fastlm.training.memory import peak_memory_bytes, reset_peak_memory, resident_memory_bytes
counted = reset_peak_memory()
before = peak_memory_bytes()
block = torch.ones(2**24)
during = peak_memory_bytes()
del block
reset_peak_memory()
print(counted, during - before, peak_memory_bytes() - resident_memory_bytes())
"""


def run(code: str, *words: str) -> list[str]:
    """What `code` prints in a process of its own, whose memory nothing else has touched."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_peak_is_of_the_phase_since_the_reset():
    counted, grown, after = run(PEAK)
    assert counted == str(platform.system() == "Linux")
    assert int(grown) > 2**25, "64 MiB were written"
    assert counted == "False" or int(after) < 2**23


def test_freed_memory_is_kept_where_asked_for():
    def freed(word: str) -> tuple[str, int]:
        kept, size = run(FREED, word)
        return kept, int(size)

    kept, size = freed("keep")
    if platform.libc_ver()[0] != "glibc":
        assert kept == "False"
        return
    assert (kept, freed("default")[0]) == ("True", "None")
    assert size < 2**24, "64 MiB were freed and most of it must still be there"
    assert freed("default")[1] > 2**25
