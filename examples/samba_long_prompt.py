"""Read a long prompt in chunks: the memory stays that of one chunk, the result that of one pass.

python examples/samba_long_prompt.py [--tokens 20000]
"""

from __future__ import annotations

import argparse
import time

import torch

from fastlm.models import SambaConfig, SambaForCausalLM


@torch.inference_mode()
def main(tokens: int = 20_000, chunk: int = 1024) -> float:
    """Compare the last logits of the chunked pass with those of one pass; returns the largest difference."""
    torch.manual_seed(0)
    model = SambaForCausalLM(SambaConfig.from_preset("demo")).eval()
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    cache = model.new_cache(1)
    started = time.perf_counter()
    for piece in ids.split(chunk, dim=1):
        logits = model(piece, cache=cache, logits_to_keep=1).logits
    seconds = time.perf_counter() - started
    print(
        f"{tokens:,} tokens in chunks of {chunk}: {tokens / seconds:,.0f} tokens/s, "
        f"{cache.memory_bytes() / 1e6:.2f} MB of state"
    )
    difference = (model(ids, logits_to_keep=1).logits - logits).abs().max().item()
    print(f"largest difference from one pass: {difference:.1e}")
    return difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20_000)
    main(parser.parse_args().tokens)
