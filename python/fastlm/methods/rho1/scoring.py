"""Scores a corpus with a reference model: one loss per token, in files that survive whatever happens to those who write them.

`score` may be called again with the same arguments at any time, and by several processes at once: parts that are there are kept,
parts that somebody is working on are left alone, and the rest is computed. Every part has the same bits whoever computed it.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import fastlm
from fastlm.methods.rho1.claims import Claims, FolderLock, is_free
from fastlm.methods.rho1.crew import run_workers
from fastlm.methods.rho1.gather import GatheredTokens, gather
from fastlm.methods.rho1.part_scorer import PartScorer, check_fits, describe_model
from fastlm.methods.rho1.score_files import (
    DOCUMENTS,
    MANIFEST,
    TOKENIZER,
    Layout,
    Manifest,
    check_content,
    corpus_digest,
    load_manifest,
    open_part,
    part_name,
    tokenizer_digest,
    write_tensors,
)
from fastlm.methods.rho1.store import ScoreStore, check_tokenizer, load_layout, open_scores
from fastlm.methods.rho1.worker import unfinished_parts, work
from fastlm.training.atomic import TEMPORARY_MARK, is_leftover, write_bytes, write_json
from fastlm.training.config import reason
from fastlm.training.data import PreparedData
from fastlm.training.errors import InputError, RunError
from fastlm.training.progress import QuietReporter, Reporter, WorkRate
from fastlm.training.stopping import StopRequestedError, StopRequests

BATCH_TOKENS = 4096
PART_TOKENS = 1 << 20


class ScoringStoppedError(RunError):
    """SIGINT or SIGTERM ended the scoring between two batches; finished parts are kept.

    Attributes:
        exit_code: 130 or 143, as a shell has it.
    """

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + number


def score(
    model: nn.Module,
    corpus: Any,
    out_dir: str | Path,
    *,
    context: int | None = None,
    entropy: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    part_tokens: int = PART_TOKENS,
    workers: int = 1,
    threads: int | None = None,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    reporter: Reporter | None = None,
    tokenizer: Any = None,
    check: bool = False,
    command: str | None = None,
) -> ScoreStore:
    """Writes the loss of every token of a corpus under a model, or goes on with it.

    Args:
        model: a `SambaForCausalLM` or a causal language model of transformers.
        corpus: a `PreparedData` (both its sides), or an iterable of documents: flat sequences of token ids, or rows with `input_ids`.
            The model sees nothing but a document's own tokens, so documents should begin with the mark that the model knows.
        out_dir: new or empty folder, or one with scores of the same model, corpus and settings.
        context: tokens of a piece; the model starts anew at each multiple of it. None: whole documents. For training it must be
            the run's `seq_len`. The first token of a piece is predicted from the end of the one before it.
        entropy: also store the entropy of each prediction.
        batch_tokens: tokens that go through the model together; a piece is never divided, so a longer one is more.
        part_tokens: most predictions in a file. A process that dies loses the file it was at, no more.
        workers: processes.
        threads: CPU threads of each worker; default: torch's number divided by `workers`. Part of the settings: torch's matrix
            products depend on it in the last bits.
        dtype: `fp32`, `bf16` (autocast over fp32 weights), or `auto`: bf16 where the CPU multiplies it natively. Weights in
            bfloat16 are bf16.
        reporter: sees the progress.
        tokenizer: of the token ids, a `tokenizers.Tokenizer`, a fast tokenizer of transformers, or the path of a tokenizer.json;
            default: that of a `PreparedData`, else none. It is copied into the folder.
        check: read finished parts through and compare them with their digests; otherwise only sizes and headers are looked at.
        command: a shell command that goes on with this; told by errors.

    Returns:
        store: the finished scores, opened.

    Raises:
        InputError: an argument cannot be used, or the folder holds scores of another model, corpus or setting.
        ScoringStoppedError: SIGINT or SIGTERM; the same call goes on.
        RunError: disk full, or every worker died.

    Note:
        Results have the same bits for any number of workers and any interruptions, on machines of one CPU level with one version of
        torch. Temporary files in `out_dir`: 4 bytes per token, and with several workers a copy of the model.

    Source: Lin et al., arXiv 2404.07965, equation 1; entropy: equation 8.
    """
    for name, value in (
        ("context", context),
        ("batch_tokens", batch_tokens),
        ("part_tokens", part_tokens),
        ("workers", workers),
        ("threads", threads),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}: expected an integer of at least 1, got {value!r}")
    folder, reporter = Path(out_dir), reporter or QuietReporter()
    saved = saved_manifest(folder)
    described = describe_model(model)
    resolved = _resolve_dtype(model, dtype, saved)
    if threads is None:
        threads = max(1, torch.get_num_threads() // workers) if saved is None else saved.threads
    own_tokenizer = _tokenizer_of(corpus, tokenizer)
    try:
        with temporary_folder(folder, "work") as temporary, StopRequests() as stop:
            reporter.stage("reading the corpus")
            tokens = gather(corpus, temporary, stop.check)
            check_fits(model, tokens, context)
            layout = Layout.plan(tokens.keys, tokens.lengths, context=context, part_tokens=part_tokens)
            manifest = Manifest(
                fastlm=_version("fastlm"),
                torch=torch.__version__,
                **described,
                tokenizer=None if own_tokenizer is None else tokenizer_digest(own_tokenizer),
                corpus=corpus_digest(tokens.keys, tokens.lengths),
                documents=len(tokens.keys),
                tokens=int(tokens.lengths.sum()),
                predictions=int(layout.starts[-1]),
                context=context,
                dtype=resolved,
                entropy=entropy,
                batch_tokens=batch_tokens,
                part_tokens=part_tokens,
                threads=threads,
                cpu_level=fastlm.cpu_capability(),
                parts=layout.entries(),
                command=command,
            )
            claims = Claims(folder)
            try:
                manifest = _agree(folder, manifest, layout, own_tokenizer, claims, reporter)
                _drop_damaged(folder, manifest, layout, claims, reporter, check)
                _score_all(
                    model, tokens, folder, temporary, manifest, layout, claims, workers, stop, reporter
                )
            finally:
                claims.close()
    except StopRequestedError:
        raise ScoringStoppedError(
            f"scoring: stopped by {signal.Signals(stop.signal_number or signal.SIGINT).name}; "
            f"finished parts are kept. To go on, {_go_on(command)}",
            stop.signal_number or signal.SIGINT,
        ) from None
    except OSError as error:
        raise RunError(
            f"scoring: could not write to {folder}: {reason(error)}; finished parts are untouched. Make room; then "
            f"{_go_on(command)}"
        ) from error
    return open_scores(folder)


def _go_on(command: str | None) -> str:
    return "call score again with the same arguments" if command is None else f"run: {command}"


def _score_all(
    model: nn.Module,
    tokens: GatheredTokens,
    folder: Path,
    temporary: Path,
    manifest: Manifest,
    layout: Layout,
    claims: Claims,
    workers: int,
    stop: StopRequests,
    reporter: Reporter,
) -> None:
    missing = unfinished_parts(folder, layout)
    if not missing:
        return
    sizes = layout.bounds[1:] - layout.bounds[:-1]
    reporter.stage(
        f"scoring {int(sizes[missing].sum()):,} tokens in {len(missing)} of {layout.num_parts} parts"
    )
    rate = WorkRate(int(sizes.sum()), int(sizes.sum() - sizes[missing].sum()), "tokens")
    if workers > 1:
        run_workers(
            model, folder, temporary, manifest, layout, min(workers, len(missing)), stop, reporter, rate
        )
        return
    before = torch.get_num_threads()
    torch.set_num_threads(manifest.threads)

    def between(predictions: int) -> None:
        if predictions:
            reporter.work(rate.advanced(predictions))
        stop.check()

    try:
        work(folder, manifest, layout, PartScorer(model, tokens, layout, manifest), claims, between)
    finally:
        torch.set_num_threads(before)


# Folder


def saved_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder with scores, None for a new one.

    Raises:
        InputError: the folder holds something else, or cannot be made.
    """
    if (folder / MANIFEST).exists():
        return load_manifest(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = sorted(entry.name for entry in folder.iterdir() if not _is_ours(entry.name))
    except OSError as error:
        raise InputError(f"out_dir: cannot make folder {folder}: {reason(error)}") from error
    if strangers:
        raise InputError(
            f"out_dir: expected a new or empty folder, or one with scores, found {', '.join(strangers[:3])} in {folder}"
        )
    return None


def _is_ours(name: str) -> bool:
    """What a process that was killed before the manifest leaves behind."""
    return name in (".lock", DOCUMENTS, TOKENIZER) or is_leftover(name) or name.startswith("scores-")


@contextmanager
def temporary_folder(folder: Path, name: str) -> Iterator[Path]:
    """A folder of this process inside the scores' folder, gone afterwards with those of processes that died."""
    path = folder / f"{name}{TEMPORARY_MARK}-{os.getpid()}"
    claims = Claims(folder)
    try:
        with (
            claims.setup()
        ):  # else another process could take a folder that is not locked yet for an abandoned one
            _remove_abandoned(folder)
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            lock = FolderLock(path)
    finally:
        claims.close()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.release()
        _remove_abandoned(folder)


def _remove_abandoned(folder: Path) -> None:
    for entry in folder.iterdir():
        if is_leftover(entry.name) and entry.is_dir() and is_free(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _agree(
    folder: Path, manifest: Manifest, layout: Layout, tokenizer: Any, claims: Claims, reporter: Reporter
) -> Manifest:
    """Writes the manifest, or finds that the one there says the same.

    Raises:
        InputError: it does not; names the first difference.
    """
    with claims.setup():
        if not (folder / MANIFEST).exists():
            _write_index(folder, layout)
            if tokenizer is not None:
                write_bytes(folder / TOKENIZER, tokenizer.to_str(pretty=True).encode())
            write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
            return manifest
        saved = load_manifest(folder)
        _compare(folder, saved, manifest, reporter)
        try:
            load_layout(folder, saved)
        except InputError:
            reporter.warn(f"{folder / DOCUMENTS} was lost or damaged: written again")
            _write_index(folder, layout)
        try:
            check_tokenizer(folder, saved)
        except InputError:
            reporter.warn(f"{folder / TOKENIZER} was lost or changed: written again")
            write_bytes(folder / TOKENIZER, tokenizer.to_str(pretty=True).encode())
    return saved


def _write_index(folder: Path, layout: Layout) -> None:
    write_tensors(
        folder / DOCUMENTS, {"keys": layout.keys, "lengths": layout.lengths}, {"format": "documents"}
    )


_WORDS = {
    "model": "a model with fingerprint",
    "tokenizer": "a tokenizer with digest",
    "corpus": "a corpus with digest",
    "context": "context",
    "dtype": "dtype",
    "entropy": "entropy",
    "batch_tokens": "batch_tokens",
    "part_tokens": "part_tokens",
    "threads": "threads",
}


def _compare(folder: Path, saved: Manifest, wanted: Manifest, reporter: Reporter) -> None:
    for name, words in _WORDS.items():
        expected, found = getattr(saved, name), getattr(wanted, name)
        if expected != found:
            detail = ""
            if name == "corpus":
                detail = (
                    f" ({saved.documents:,} documents of {saved.tokens:,} tokens there, "
                    f"{wanted.documents:,} of {wanted.tokens:,} here)"
                )
            raise InputError(
                f"out_dir: the scores in {folder} were begun with {words} {expected}, got {found}{detail}; "
                "use the same, or another folder"
            )
    for name, what in (("cpu_level", "CPU level"), ("torch", "torch")):
        expected, found = getattr(saved, name), getattr(wanted, name)
        if expected != found:
            reporter.warn(
                f"the scores were begun with {what} {expected}, now it is {found}: last bits may differ"
            )


def _drop_damaged(
    folder: Path, manifest: Manifest, layout: Layout, claims: Claims, reporter: Reporter, check: bool
) -> None:
    """Removes files that are not the part their name says, so that they are scored again."""
    digest = manifest.digest()

    def damage(number: int) -> str | None:
        try:
            file = open_part(folder, manifest, number, digest)
            if check:
                check_content(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            return reason(error)
        return None

    for number in range(layout.num_parts):
        if damage(number) is None or not claims.take(number):
            continue
        try:
            found = damage(number)  # perhaps another process has just written it again
            if found is not None:
                (folder / part_name(number)).unlink(missing_ok=True)
                reporter.warn(f"{part_name(number)}: {found}; it is scored again")
        finally:
            claims.give(number)


# Arguments


def _resolve_dtype(model: nn.Module, dtype: str, saved: Manifest | None) -> Literal["fp32", "bf16"]:
    if dtype not in ("auto", "fp32", "bf16"):
        raise InputError(f"dtype: expected auto, fp32 or bf16, got {dtype!r}")
    weights = next(model.parameters()).dtype
    if weights == torch.bfloat16:
        if dtype == "fp32":
            raise InputError(
                "dtype: expected bf16 for a model with bfloat16 weights, got fp32; convert it with .float()"
            )
        return "bf16"
    if weights != torch.float32:
        raise InputError(f"model: expected weights in float32 or bfloat16, got {weights}")
    if dtype == "auto" and saved is not None:
        return saved.dtype
    if dtype == "auto":
        return "bf16" if fastlm.cpu_capability() == "avx512_bf16" else "fp32"
    return "fp32" if dtype == "fp32" else "bf16"


def _tokenizer_of(corpus: Any, tokenizer: Any) -> Any:
    from tokenizers import Tokenizer

    if tokenizer is None:
        return corpus.tokenizer if isinstance(corpus, PreparedData) else None
    if isinstance(tokenizer, str | Path):
        tokenizer_digest(tokenizer)  # says what is wrong with the file
        return Tokenizer.from_file(str(tokenizer))
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(
            f"tokenizer: expected a tokenizers.Tokenizer, a fast tokenizer of transformers or a path, got {type(tokenizer).__name__}"
        )
    return tokenizer


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
