"""Save and load a Samba, then generate: ragged prompts, streaming, a conversation that keeps its state.

The weights are random, so the tokens mean nothing; the calls are what matters.

    python examples/samba_generate.py
"""

from __future__ import annotations

import tempfile

import torch

from fastlm.models import SambaConfig, SambaForCausalLM


def main() -> None:
    """Print what each way of generating returns."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        SambaForCausalLM(SambaConfig.from_preset("demo")).save_pretrained(directory)
        model = SambaForCausalLM.from_pretrained(directory)

    # Prompts of different lengths need no padding: each row decodes at its own position.
    prompts = [[1, 2, 3], [7] * 40, [5]]
    for row in model.generate(prompts, max_new_tokens=5):
        print(f"{len(row):3d} tokens, the last five: {row[-5:]}")

    # The same seed gives the same sample; tokens can be read as they come.
    options = {"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.95, "seed": 1}
    streamed = [int(token) for token in model.generate(torch.tensor([[1, 2, 3]]), stream=True, **options)]
    whole = model.generate(torch.tensor([[1, 2, 3]]), **options)[0, 3:].tolist()
    assert streamed == whole
    print("sampled:", whole)

    # A cache carries a conversation: its size does not depend on how much has been said.
    cache = model.new_cache(1)
    reply = model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=6, cache=cache)
    before = cache.memory_bytes()
    turn = torch.cat([reply[:, -1:], torch.randint(512, (1, 3000))], dim=1)
    model.generate(turn, max_new_tokens=6, cache=cache)
    assert cache.memory_bytes() == before
    print(f"{cache.lengths[0]} tokens seen, {before / 1e6:.2f} MB of state")


if __name__ == "__main__":
    main()
