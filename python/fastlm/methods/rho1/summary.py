"""What is in a folder of scores, in numbers and in a few lines."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlm.methods.rho1.store import ScoreStore

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_SAMPLE = 1 << 24  # values that quantiles are taken of; all of a smaller corpus


def summarize(store: ScoreStore) -> dict[str, Any]:
    """Facts of the manifest, means over all predictions, and quantiles (of every n-th value where there are more than 16 million)."""
    manifest = store.manifest
    names = ("nll", "entropy")[: 1 + manifest.entropy]
    stride = max(1, -(-manifest.predictions // _SAMPLE))
    values: dict[str, Any] = {}
    for name in names:
        parts = [store.part(name, number) for number in range(len(manifest.parts))]
        sample = np.concatenate([part[::stride] for part in parts])
        finite = sample[np.isfinite(sample)]
        quantiles = np.quantile(finite, QUANTILES) if len(finite) else [float("nan")] * len(QUANTILES)
        values[name] = {
            "mean": sum(float(part.sum(dtype=np.float64)) for part in parts) / max(1, manifest.predictions),
            "not_finite": sum(int((~np.isfinite(part)).sum()) for part in parts),
            "quantiles": {str(q): float(x) for q, x in zip(QUANTILES, quantiles, strict=True)},
        }
    facts = manifest.model_dump(mode="json", exclude={"parts"})
    return {
        "folder": str(store.folder),
        "digest": store.digest,
        **facts,
        "parts": len(manifest.parts),
        "values": values,
    }


def describe(summary: dict[str, Any]) -> str:
    """`summarize` for people."""
    context = "whole documents" if summary["context"] is None else f"pieces of {summary['context']} tokens"
    lines = [
        f"scores      {summary['folder']} ({summary['parts']} files, whole)",
        f"text        {summary['documents']:,} documents, {summary['tokens']:,} tokens, "
        f"{summary['predictions']:,} of them predicted",
        f"model       {summary['model_class']}, {summary['parameters']:,} parameters, {summary['model'][:16]}",
        f"tokenizer   {(summary['tokenizer'] or 'none: plain token ids')[:24]}",
        f"computed    {context}, {summary['dtype']}, {summary['threads']} threads, {summary['cpu_level']}",
    ]
    for name, label in (("nll", "loss"), ("entropy", "entropy")):
        if name in summary["values"]:
            found = summary["values"][name]
            shown = "  ".join(f"{float(q):.0%} {x:.3f}" for q, x in found["quantiles"].items())
            lines.append(f"{label:<11} mean {found['mean']:.4f} nats; quantiles {shown}")
            if found["not_finite"]:
                lines.append(f"            {found['not_finite']:,} are not finite and will never be selected")
    return "\n".join(lines)
