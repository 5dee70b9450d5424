"""Train a small Samba on text, byte by byte, and let it continue a line. Runs on a CPU in seconds.

python examples/samba_train.py [--steps 150]
"""

from __future__ import annotations

import argparse
import time

import torch

from fastlm.models import SambaConfig, SambaForCausalLM

TEXT = """
the scan remembers what the window forgets, and the window recalls what the scan blurs.
two short memories in turn, one that fades and one that slides, read a long book in one pass.
""".strip()


def main(steps: int = 150, length: int = 96, batch: int = 4) -> float:
    """Train for `steps` steps; returns the last loss in nats per byte."""
    torch.manual_seed(0)
    config = SambaConfig.from_preset(
        "demo",
        vocab_size=256,
        hidden_size=96,
        num_attention_heads=4,
        intermediate_size=256,
        sliding_window=32,
    )
    model = SambaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters")
    data = torch.tensor(list(TEXT.encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.perf_counter()
    loss = torch.zeros(())
    for step in range(1, steps + 1):
        starts = torch.randint(len(data) - length, (batch,)).tolist()
        ids = torch.stack([data[s : s + length] for s in starts])
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            rate = step * batch * length / (time.perf_counter() - started)
            print(f"step {step:4d}  loss {loss.item():.3f}  {rate:,.0f} bytes/s")
    prompt = b"the scan remembers"
    out = model.eval().generate(torch.tensor([list(prompt)]), max_new_tokens=70)
    print(bytes(out[0].tolist()).decode(errors="replace"))
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    main(parser.parse_args().steps)
