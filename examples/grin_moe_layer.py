"""Train one mixture-of-experts layer to be two functions at once, and look at who does what. Runs on a CPU in seconds.

python examples/grin_moe_layer.py
"""

from __future__ import annotations

import torch

from fastlm import ops
from fastlm.layers import GrinMoE


def main(steps: int = 300) -> tuple[float, float]:
    """Returns the share of the variance that is left, and the largest share of the picks that one expert has."""
    torch.manual_seed(0)
    targets = torch.randn(2, 16, 16) / 4  # the sign of the first number decides which of two maps is wanted
    layer = GrinMoE(16, 32, num_experts=4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(512, 16)
        return x, torch.einsum("th,thi->ti", x, targets[(x[:, 0] > 0).long()])

    for x, wanted in (batch() for _ in range(steps)):
        y, routing = layer.forward_with_routing(x)  # in training mode experts are sampled
        balance = ops.load_balance_loss(routing.router_logits, routing.expert_counts, alpha=0.01)
        ((y - wanted).square().mean() + balance).backward()
        optimizer.step()
        optimizer.zero_grad()
    x, wanted = batch()
    with torch.no_grad():
        y, routing = layer.eval().forward_with_routing(x)
    left = float((y - wanted).square().mean() / wanted.square().mean())
    print(f"{left:.1%} of the variance left; picks of the experts: {routing.expert_counts.tolist()}")
    return left, float(routing.expert_counts.max() / routing.expert_counts.sum())


if __name__ == "__main__":
    main()
