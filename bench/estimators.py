"""Which estimator of a router's gradient trains a small mixture of experts best, on real text, over several seeds.

    python -m bench.estimators --json out.json --plot out.png --plot-load load.png --plot-affinity affinity.png
    python -m bench.estimators --from out.json --plot out.png     # the pictures and tables again, nothing trained

One architecture (Samba blocks: Mamba, then attention, each with its experts) is trained on the source of Python's own library, the
default text of `fastlm train`, once per variant and seed. Of one seed all variants see the same rows of text in the same order, and
those with experts begin with the same weights; so differences are taken by seed. Every variant is judged by the same held-out text,
in evaluation mode, where all routers pick the largest logits.

Each run is a job of one thread in a process of its own and leaves a file in `--work`; a second call does only those missing.
Jobs go seed by seed: whenever it is stopped, all variants have had (nearly) the same seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What differs from GRIN's router (v2, r = 0.01, load-balance loss), by name.
VARIANTS: dict[str, dict[str, Any]] = {
    "v2": {},
    "topk": {"router_estimator": "topk"},
    "v2_star": {"router_estimator": "v2_star"},
    "v1": {"router_estimator": "v1"},
    "v2_straight_through": {"expert_grad": "straight_through"},
    "v2_wide": {"router_jitter_noise": 0.1},
    "v2_no_balance": {"router_aux_loss_coef": 0.0},
    "dense": {"num_experts": 0},
}
BASE = "v2"


@dataclass(frozen=True)
class Sizes:
    """What all runs share."""

    steps: int = 600
    batch_tokens: int = 1024
    seq_len: int = 256
    evaluations: int = 8  # at equal distances, the last one after the last step
    eval_tokens: int = 8_192
    final_eval_tokens: int = 65_536
    lr: float = 6e-3  # peak; between the two rates tried, of which v2 preferred the lower and topk the higher
    warmup_steps: int = 50
    vocab_size: int = 2048
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    sliding_window: int = 128
    num_experts: int = 8
    num_experts_per_tok: int = 2
    intermediate_size: int = 128  # of one expert; the dense model's is as wide as all picks together
    dtype: str = "bf16"

    def model(self, variant: str, vocab_size: int) -> Any:
        """The configuration of a variant."""
        from fastlm.models import SambaConfig

        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "sliding_window")
        names += ("num_experts", "num_experts_per_tok", "intermediate_size")
        values = {name: getattr(self, name) for name in names} | VARIANTS[variant]
        if values["num_experts"] == 0:
            values["intermediate_size"] *= self.num_experts_per_tok
        return SambaConfig(vocab_size=vocab_size, num_key_value_heads=self.num_attention_heads // 2, **values)


class RoutingLog:
    """What the routers of all layers did since the last reading."""

    def __init__(self) -> None:
        self._sums: list[dict[str, Tensor]] = []
        self._tokens = 0

    @torch.no_grad()
    def add(self, routing: list[Any]) -> None:
        """Count one pass: picks, entropy of the router, tokens with a pick that was not the most likely one, picks with a rival."""
        if not self._sums:
            self._sums = [{} for _ in routing]
        self._tokens += routing[0].router_logits.shape[0]
        for sums, decided in zip(self._sums, routing, strict=True):
            logits = decided.router_logits
            log_p = logits.log_softmax(-1)
            seen = {
                "picks": decided.expert_counts.double(),
                "entropy": -(log_p.exp() * log_p).sum().double() / torch.tensor(2.0).log(),
                "unlikely": unlikely(logits, decided.topk_ids).sum().double(),
                "rivals": (decided.topk_weights < 1).double().mean(-1).sum(),
            }
            for name, value in seen.items():
                sums[name] = sums[name] + value if name in sums else value

    def read(self) -> dict[str, Any]:
        """Means per token, a list over layers each; starts anew. Empty where there are no routers."""
        if not self._sums:
            return {}
        found: dict[str, Any] = {
            name: [round(float(sums[name]) / self._tokens, 5) for sums in self._sums]
            for name in ("entropy", "unlikely", "rivals")
        }
        found["load"] = [
            [round(share, 5) for share in (sums["picks"] / sums["picks"].sum()).tolist()]
            for sums in self._sums
        ]
        self._sums, self._tokens = [], 0
        return found


def unlikely(logits: Tensor, ids: Tensor) -> Tensor:
    """Tokens `(T,)` with a pick that was not the most likely one of the experts left to it."""
    left = logits.detach().clone()
    found = torch.zeros(logits.shape[0], dtype=torch.bool)
    for picked in ids.long().unbind(1):
        found |= picked != left.argmax(-1)
        left.scatter_(1, picked.unsqueeze(1), float("-inf"))
    return found


def train(variant: str, seed: int, sizes: Sizes, data: Any) -> dict[str, Any]:
    """One run: the curve, what the routers did, the final loss, and where which token went."""
    from fastlm.models import SambaForCausalLM
    from fastlm.training.batches import PackedSampler
    from fastlm.training.evaluation import evaluate, held_out_rows, row_loss
    from fastlm.training.schedule import learning_rate

    begin = time.process_time()
    torch.manual_seed(seed)
    model = SambaForCausalLM(sizes.model(variant, data.vocab_size)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=sizes.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    cut = {"row_tokens": sizes.batch_tokens, "seq_len": sizes.seq_len}
    sampler = PackedSampler(data.train, seed=seed, **cut)
    watched = held_out_rows(data, max_tokens=sizes.eval_tokens, **cut)
    marks = {sizes.steps * (i + 1) // sizes.evaluations for i in range(sizes.evaluations)}
    log, rows, nats, targets = RoutingLog(), [], 0.0, 0
    for step in range(sizes.steps):
        # What a router draws must not depend on how much another variant drew before.
        torch.manual_seed(seed + 1_000_003 * (step + 1))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, sizes.warmup_steps, sizes.steps, peak=sizes.lr, min_ratio=0.1)
        row = sampler.row(step)
        routing: list[Any] = []
        loss = row_loss(model, row, sizes.dtype, routing)
        total = loss / row.num_targets
        if routing:
            total = total + model.auxiliary_loss(routing)
            log.add(routing)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        nats, targets = nats + float(loss.detach()), targets + row.num_targets
        if step + 1 in marks:
            found = evaluate(model, data, watched, dtype=sizes.dtype)
            rows.append(
                {
                    "step": step + 1,
                    "bits": round(found.bits_per_byte, 5),
                    "train_loss": round(nats / targets, 4),
                    **log.read(),
                }
            )
            nats, targets = 0.0, 0
    held_out = held_out_rows(data, max_tokens=sizes.final_eval_tokens, **cut)
    final = evaluate(model, data, held_out, dtype=sizes.dtype)
    return {
        "variant": variant,
        "seed": seed,
        "sizes": asdict(sizes),
        "parameters": model.num_parameters(),
        "bits": round(final.bits_per_byte, 5),
        "bytes": final.bytes,
        "curve": rows,
        "affinity": affinity(model, data, held_out, sizes.dtype) if model.config.num_experts else None,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


@torch.no_grad()
def affinity(model: Any, data: Any, rows: list[Any], dtype: str, most: int = 24) -> dict[str, Any]:
    """Shares of experts among the picks of a kind of token and of the most frequent tokens, per layer, in evaluation."""
    from bench.estimators_text import kind_of
    from fastlm.training.batches import pack
    from fastlm.training.evaluation import row_loss

    spelling = data.spelling()
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    picks = torch.zeros(layers, len(spelling), experts, dtype=torch.float64)
    model.eval()
    for pieces in rows:
        row, routing = pack(data.held_out, pieces), []
        row_loss(model, row, dtype, routing)
        for layer, decided in enumerate(routing):
            for ids in decided.topk_ids.long().unbind(1):
                one = torch.ones(ids.shape[0], dtype=torch.float64)
                picks[layer].index_put_((row.input_ids[0], ids), one, accumulate=True)
    model.train()
    seen = picks[0].sum(-1)
    by_kind: dict[str, Tensor] = {}
    for token in seen.nonzero().flatten().tolist():
        kind = kind_of(spelling[token])
        by_kind[kind] = by_kind.get(kind, 0) + picks[:, token]
    frequent = {
        f"{token} {spelling[token].decode('utf-8', 'replace')!r}": picks[:, token]
        for token in seen.topk(min(most, int((seen > 0).sum()))).indices.tolist()
        if spelling[token]
    }
    total = float(seen.sum())
    return {
        part: {
            name: {"share": round(float(p[0].sum()) / total, 4), "experts": _shares(p)}
            for name, p in table.items()
        }
        for part, table in (("kinds", by_kind), ("tokens", frequent))
    }


def _shares(picks: Tensor) -> list[list[float]]:
    return [[round(x, 3) for x in layer] for layer in (picks / picks.sum(-1, keepdim=True)).tolist()]


def prepare(work: Path, sizes: Sizes) -> Any:
    """The text as tokens, in `work/data`; made once, shared by all runs."""
    from fastlm.training.config import TrainConfig
    from fastlm.training.data import prepare_data

    work.mkdir(parents=True, exist_ok=True)
    return prepare_data(work / "data", TrainConfig(), sizes.vocab_size, print, print)


def job(variant: str, seed: int, sizes: Sizes, work: Path) -> dict[str, Any]:
    """A run in a process of its own: reads the prepared text, leaves its file."""
    torch.set_num_threads(1)
    from fastlm.training.atomic import write_json
    from fastlm.training.data import open_data

    found = train(variant, seed, sizes, open_data(work / "data"))
    write_json(file_of(work, variant, seed), found)
    return found


def file_of(work: Path, variant: str, seed: int) -> Path:
    """Where a run's result is kept."""
    return work / f"{variant}-{seed}.json"


def finished(work: Path, variant: str, seed: int, sizes: Sizes) -> dict[str, Any] | None:
    """The result of a run that is done; it must be of these sizes."""
    path = file_of(work, variant, seed)
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["sizes"] != asdict(sizes):
        raise ValueError(f"{path} is of a run with other sizes; give another --work or delete it")
    return found


def run_all(
    variants: list[str], seeds: list[int], sizes: Sizes, work: Path, workers: int
) -> list[dict[str, Any]]:
    """All runs, finished ones read, the others done by `workers` processes (0: in this one)."""
    jobs = [(variant, seed) for seed in seeds for variant in variants]
    done = {job: finished(work, *job, sizes) for job in jobs}
    left = [job for job, found in done.items() if found is None]
    begin = time.monotonic()

    def report(found: dict[str, Any]) -> None:
        done[found["variant"], found["seed"]] = found
        count = sum(value is not None for value in done.values())
        print(
            f"{count:>3} of {len(jobs)}  {found['variant']:<20} seed {found['seed']}  {found['bits']:.4f} bits per byte, "
            f"{found['cpu_seconds']:.0f} s of CPU, {time.monotonic() - begin:.0f} s since the start",
            flush=True,
        )

    if workers == 0:
        for variant, seed in left:
            report(job(variant, seed, sizes, work))
    else:
        os.environ["OMP_NUM_THREADS"] = "1"  # read when a worker loads torch
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(job, variant, seed, sizes, work) for variant, seed in left]
            for future in as_completed(futures):
                report(future.result())
    return [found for found in done.values() if found is not None]


def main() -> None:
    from bench import estimators_plot
    from bench.estimators_summary import summary, table

    parser = argparse.ArgumentParser(prog="python -m bench.estimators", description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=4, help="how many")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread; 0: this one")
    parser.add_argument("--work", type=Path, default=Path("runs/estimators"), help="folder of text and runs")
    parser.add_argument("--steps", type=int, default=Sizes.steps)
    parser.add_argument("--lr", type=float, default=Sizes.lr, help="peak learning rate of all variants")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument(
        "--from", dest="source", type=Path, help="a file written by --json, instead of training"
    )
    parser.add_argument("--finished", action="store_true", help="take the runs that are there, start none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="picture of curves and differences")
    parser.add_argument("--plot-load", type=Path, help="picture of the experts' load")
    parser.add_argument("--plot-affinity", type=Path, help="picture of which tokens go to which expert")
    options = parser.parse_args()
    if options.source:
        record = json.loads(options.source.read_text(encoding="utf-8"))
    else:
        import fastlm
        from bench.machine import git_commit, machine_facts, software_facts

        if options.dtype == "auto":  # elsewhere bf16 is slower and coarser
            options.dtype = "bf16" if fastlm.cpu_capability() == "avx512_bf16" else "fp32"
        sizes = Sizes(steps=options.steps, lr=options.lr, dtype=options.dtype)
        data = prepare(options.work, sizes)
        seeds = list(range(options.seeds))
        if options.finished:
            there = [
                finished(options.work, variant, seed, sizes) for seed in seeds for variant in options.variants
            ]
            runs = [run for run in there if run]
        else:
            runs = run_all(options.variants, seeds, sizes, options.work, options.workers)
        record = {
            "git": git_commit(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": machine_facts(),
            "software": software_facts(),
            "sizes": asdict(sizes),
            "text": {"digest": data.summary.digest, "train_tokens": data.summary.train_tokens},
            "summary": summary(runs, BASE),
            "runs": runs,
        }
    print(table(record["summary"]))
    if options.json:
        options.json.write_text(compact(record), encoding="utf-8")
    if options.plot:
        estimators_plot.curves(record, options.plot)
    if options.plot_load:
        estimators_plot.loads(record, options.plot_load)
    if options.plot_affinity:
        estimators_plot.affinities(record, options.plot_affinity)


def compact(record: dict[str, Any]) -> str:
    """JSON with one line per run; single tokens only of the run in the picture, the first of `BASE`."""
    head = json.dumps({**record, "runs": "RUNS"}, indent=1)
    runs = [{key: value for key, value in run.items() if key != "sizes"} for run in record["runs"]]
    pictured = min((run["seed"] for run in runs if run["variant"] == BASE), default=None)
    for run in runs:
        if run["affinity"] and (run["variant"], run["seed"]) != (BASE, pictured):
            run["affinity"] = {"kinds": run["affinity"]["kinds"]}
    lines = ",\n".join("  " + json.dumps(run, separators=(",", ":")) for run in runs)
    return head.replace('"RUNS"', f"[\n{lines}\n ]") + "\n"


if __name__ == "__main__":
    main()
