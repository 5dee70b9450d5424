"""A whole model: the same bits from every run, and a program that torch.export makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fastlm.models import SambaConfig, SambaForCausalLM
from tests.support.conformance import num_threads


def make(dtype: torch.dtype) -> SambaForCausalLM:
    torch.manual_seed(0)
    return SambaForCausalLM(SambaConfig.from_preset("tiny", num_hidden_layers=4), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_have_the_same_bits_in_every_run(dtype, packed):
    model = make(dtype)
    ids = torch.randint(96, (1, 600) if packed else (2, 300))
    bounds = torch.tensor([0, 7, 200, 201, 600], dtype=torch.int32) if packed else None
    runs = []
    for _ in range(3):
        with num_threads(2):  # torch's own matrix products give other bits with other numbers of threads
            loss = model(ids, labels=ids, cu_seqlens=bounds).loss
            runs.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


class Logits(nn.Module):
    """Token ids in, logits out."""

    def __init__(self, model: SambaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.model(input_ids).logits
        assert logits is not None
        return logits


@pytest.mark.slow
def test_exported_model_runs_at_other_lengths():
    module = Logits(make(torch.float32)).eval()
    # The scan keeps a state for every 64 positions for its backward pass, and torch takes sizes of 0 and 1 for constants.
    dynamic = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=128)}}
    program = torch.export.export(module, (torch.randint(96, (2, 200)),), dynamic_shapes=dynamic).module()
    for batch, length in ((1, 128), (3, 300)):
        ids = torch.randint(96, (batch, length))
        assert_close(program(ids), module(ids))
