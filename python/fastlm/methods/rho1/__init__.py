"""Rho-1: selective language modelling. Training on the tokens whose loss exceeds that of a reference model the most.

Importing this needs torch alone; `Trainer` needs the extra `fastlm[hf]`, pictures of token dynamics the extra `fastlm[report]`.

Source: Lin et al., Rho-1: Not All Tokens Are What You Need, arXiv 2404.07965.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlm.methods.rho1.collator import Collator
from fastlm.methods.rho1.dynamics import TokenDynamics, token_dynamics
from fastlm.methods.rho1.objective import SelectiveLoss
from fastlm.methods.rho1.page import TokenDocument, write_token_page
from fastlm.methods.rho1.patch import patch_loss, unpatch_loss
from fastlm.methods.rho1.runs import resume, train
from fastlm.methods.rho1.score_files import tokenizer_digest
from fastlm.methods.rho1.scoring import ScoringStoppedError, score
from fastlm.methods.rho1.store import ScoreStore, document_key, open_scores
from fastlm.methods.rho1.text import score_text

if TYPE_CHECKING:
    from fastlm.methods.rho1.trainer import Trainer

__all__ = [
    "Collator",
    "ScoreStore",
    "ScoringStoppedError",
    "SelectiveLoss",
    "TokenDocument",
    "TokenDynamics",
    "Trainer",
    "document_key",
    "open_scores",
    "patch_loss",
    "resume",
    "score",
    "score_text",
    "token_dynamics",
    "tokenizer_digest",
    "train",
    "unpatch_loss",
    "write_token_page",
]


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # transformers is imported when it is asked for
        from fastlm.methods.rho1.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
