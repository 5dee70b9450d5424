"""The whole demo in its quick form, and the comparison of speed with a contender that cheats."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastlm.demo import peers as peers_module
from fastlm.demo.peers import measure_peers
from fastlm.demo.plain_samba import PlainSamba
from fastlm.demo.result import DemoResult
from fastlm.demo.run import run_demo
from fastlm.models.samba import SambaConfig, SambaForCausalLM
from fastlm.training import InputError, load_record

LOSS_ERROR = {"fp32": 1e-4, "bf16": 2e-2}  # relative
LIMIT_SECONDS = 90.0  # about 20 on two free cores; tests share them


@pytest.mark.slow
def test_the_quick_demo_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "fastlm_cli", "demo", "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < LIMIT_SECONDS
    result = DemoResult.model_validate_json((out / "demo.json").read_text())
    assert [peer.problem for peer in result.peers] == [None, None, None]
    losses = [peer.loss for peer in result.peers]
    assert losses == pytest.approx([losses[0]] * 3, rel=LOSS_ERROR[result.dtype])
    assert all(result.speed_up(peer.name) is not None for peer in result.peers[1:])
    assert result.bits_per_byte < result.held_out_curve[0][1], "it learned, however slow the machine"
    assert result.bits_per_byte == load_record(out / "run").result["bits_per_byte"]  # type: ignore[index]
    assert {item.name for item in result.compressors} == {"gzip -9", "xz -9e", "xz, training text first"}
    assert result.samples[0].text
    page = (out / "report.html").read_text()
    assert f"{result.bits_per_byte:.3f}" in page
    assert f"{result.bits_per_byte:.3f}" in done.stdout
    assert "fastlm demo (quick form)" in done.stdout
    assert "Traceback" not in done.stderr

    with pytest.raises(InputError, match=r"already holds a demo; add --replace"):
        run_demo(out, quick=True)
    (out / "mine.txt").touch()
    with pytest.raises(InputError, match=r"expected a new or empty folder, found mine.txt"):
        run_demo(out, quick=True, replace=True)
    assert json.loads((out / "demo.json").read_text())["quick"] is True


@pytest.fixture
def model() -> SambaForCausalLM:
    return SambaForCausalLM(SambaConfig.from_preset("tiny"))


@pytest.mark.parametrize("dtype", LOSS_ERROR)
def test_contenders_do_the_same_work_and_leave_the_model_alone(model: SambaForCausalLM, dtype: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(96, (2, 24))
    found = measure_peers(model, ids, dtype=dtype, rounds=3, budget=60.0, report=lambda text: None)
    assert [peer.name for peer in found] == ["fastlm", "plain PyTorch", "transformers-style step loop"]
    assert [len(peer.seconds) for peer in found] == [3, 3, 3]
    assert all(peer.problem is None for peer in found)
    expected = model(ids, labels=ids).loss.item()
    assert [peer.loss for peer in found] == pytest.approx([expected] * 3, rel=LOSS_ERROR[dtype])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    once = measure_peers(model, ids, dtype=dtype, rounds=3, budget=0.0, report=lambda text: None)
    assert [len(peer.seconds) for peer in once] == [1, 1, 1], "no budget: the checked step is the only one"


@pytest.mark.parametrize("cheat", ["loss", "gradient"])
def test_a_contender_with_another_result_is_reported_not_timed(
    model: SambaForCausalLM, monkeypatch: pytest.MonkeyPatch, cheat: str
) -> None:
    def cheating(source: SambaForCausalLM, scan: str) -> PlainSamba:
        other = PlainSamba(source.config, scan=scan)
        other.load_state_dict(source.state_dict())
        if scan == "plain" and cheat == "loss":
            with torch.no_grad():
                other.model.norm.weight.mul_(1.5)
        elif scan == "plain":
            other.model.embed_tokens.requires_grad_(False)
        return other

    monkeypatch.setattr(peers_module, "_plain", cheating)
    ids = torch.randint(96, (1, 20))
    found = measure_peers(model, ids, dtype="fp32", rounds=2, budget=60.0, report=lambda text: None)
    what = "loss" if cheat == "loss" else "gradient norm"
    assert found[1].problem is not None
    assert f"not timed: its {what} is" in found[1].problem
    assert found[1].tokens_per_second(20) is None
    assert found[2].problem is None
    assert found[2].tokens_per_second(20) is not None
