"""The coloured page of `bench.rho1`: which tokens of held-out documents the selection would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.rho1_noise import CLEAN, KINDS
from bench.rho1_select import SHOWN, VARIANTS
from fastlm.training.errors import InputError


def write_page(record: dict[str, Any], path: Path) -> None:
    """Writes the page of a record.

    Raises:
        InputError: the run whose tokens are shown is not in the record.
    """
    from fastlm.methods.rho1.page import TokenDocument, write_token_page

    shown = [found["documents"] for found in record["runs"] if "documents" in found]
    if not shown:
        raise InputError(
            f"--json: expected a run of {SHOWN} with seed 0, whose tokens are shown, found none; run it first"
        )
    documents = []
    for document in shown[0]:
        spelled, loss, reference, selected, kinds = zip(*document["tokens"], strict=True)
        documents.append(
            TokenDocument(
                f"{document['kind']}: {document['name']}",
                [text.encode("latin-1") for text in spelled],
                [a - b for a, b in zip(loss, reference, strict=True)],
                [bool(x) for x in selected],
                loss,
                reference,
                ["" if kind == CLEAN else f"noise: {KINDS[kind]}" for kind in kinds],
            )
        )
    sizes = record["sizes"]
    lead = (
        f"Held-out documents that neither model was trained on, first tokens of each. Loss: the final model of {SHOWN}, seed 0, "
        f"after {sizes['steps'] * sizes['batch_tokens']:,} tokens; reference: the model trained on clean text only. Selected are the "
        f"{VARIANTS[SHOWN].keep:.0%} of all tokens on this page with the largest excess loss."
    )
    write_token_page(path, documents, title="Rho-1: which tokens were chosen", lead=lead)
