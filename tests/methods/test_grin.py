"""The method's name leads to the layers, operators and weights that make it up."""

import torch

from fastlm import layers, ops
from fastlm.methods import grin
from fastlm.models import samba


def test_every_piece_is_the_one_of_its_own_module():
    for name in grin.__all__:
        home = next(m for m in (layers, ops, samba) if hasattr(m, name))
        assert getattr(grin, name) is getattr(home, name), name


def test_a_layer_and_its_load_balance_loss_train_together():
    torch.manual_seed(0)
    moe = grin.GrinMoE(16, 32, num_experts=4)
    y, routing = moe.forward_with_routing(torch.randn(6, 16))
    balance = grin.load_balance_loss(routing.router_logits, routing.expert_counts, alpha=0.01)
    (y.square().mean() + balance).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in moe.parameters())
