"""The numbers of a demo: one JSON file, from which panel and report are made and nothing else."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class PeerNumbers(BaseModel):
    """One contender's training step."""

    name: str
    what: str
    tokens_per_second: float | None
    step_seconds: list[float]
    loss: float
    peak_bytes: int
    problem: str | None


class CompressorNumbers(BaseModel):
    """One compressor on the held-out bytes."""

    name: str
    bits_per_byte: float
    seen: str


class Sample(BaseModel):
    """A prompt and what the model made of it."""

    prompt: str
    text: str


class DemoResult(BaseModel):
    """Everything the report shows."""

    quick: bool
    created: str
    seconds: float  # of the whole demo
    command: str
    environment: dict[str, Any]
    preset: str
    parameters: int
    dtype: str
    threads: int
    data: dict[str, Any]
    train_tokens: int
    train_steps: int
    train_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    curve: list[tuple[int, float]]  # (tokens, bits per byte of the batch)
    held_out_curve: list[tuple[int, float]]
    bits_per_byte: float
    held_out_bytes: int
    compressors: list[CompressorNumbers]
    batch: tuple[int, int]  # rows, tokens per row, of the speed comparison
    peers: list[PeerNumbers]
    samples: list[Sample]
    generation_tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return self.model_dump(mode="json")

    def speed_up(self, name: str) -> float | None:
        """How many times faster than peer `name` the first contender trained, on the same batch."""
        ours = self.peers[0].tokens_per_second if self.peers else None
        theirs = next((peer.tokens_per_second for peer in self.peers if peer.name == name), None)
        return ours / theirs if ours and theirs else None

    def caveats(self) -> list[str]:
        """What was lost, and what the numbers do not say; worked out from the numbers."""
        lines = []
        better = [c for c in self.compressors if c.bits_per_byte <= self.bits_per_byte]
        for compressor in better:
            lines.append(
                f"{compressor.name} is ahead of the model on the held-out text: "
                f"{compressor.bits_per_byte:.3f} against {self.bits_per_byte:.3f} bits per byte."
            )
        read = self.train_tokens / max(1, self.data["train_tokens"])
        lines.append(
            f"The model read {read:.0%} of the {self.data['train_bytes'] / 1e6:.1f} MB of training text; "
            f"gzip and xz alone read "
            f"only the {self.held_out_bytes / 1e3:.0f} kB of held-out text."
        )
        lines.append(
            f"The model's own size ({self.parameters * 4 / 1e6:.0f} MB of weights) is in none of the bits "
            f"per byte; "
            "as a compressor it would also be far slower than xz."
        )
        for peer in self.peers[1:]:
            ours = self.peers[0]
            if peer.problem:
                lines.append(f"{peer.name} was {peer.problem}.")
            elif (
                peer.tokens_per_second
                and ours.tokens_per_second
                and peer.tokens_per_second > ours.tokens_per_second
            ):
                lines.append(f"{peer.name} trained faster than fastlm on this batch.")
            if peer.peak_bytes and ours.peak_bytes and peer.peak_bytes < ours.peak_bytes:
                lines.append(f"{peer.name} needed less memory for a step than fastlm.")
        if any(len(peer.step_seconds) == 1 for peer in self.peers):
            lines.append(
                "Slow contenders were timed once: a second step would have taken longer than the demo is "
                "worth."
            )
        lines.append(
            "torch.compile is not in the comparison: compiling the loops takes longer than this demo."
        )
        return lines
