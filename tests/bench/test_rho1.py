"""The experiment with selective training in small: runs, resuming, statistics, what is chosen and counted, pictures, page."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from bench import rho1, rho1_summary
from bench.rho1_corpus import CorpusSizes, build_corpus, open_corpus
from bench.rho1_noise import CLEAN, KINDS
from bench.rho1_select import VARIANTS, Batch, SelectionLog, chosen, score_of
from bench.rho1_train import Rows, Sizes, artefacts, held_out, new_model, scores_file, token_losses, train
from fastlm.training.batches import IGNORE_INDEX
from fastlm.training.errors import InputError, RunError

TINY = Sizes(
    steps=6,
    batch_tokens=128,
    seq_len=32,
    evaluations=3,
    eval_tokens=128,
    noise_eval_tokens=128,
    final_eval_tokens=256,
    final_noise_eval_tokens=256,
    warmup_steps=2,
    continual_steps=3,
    hidden_size=16,
    num_attention_heads=2,
    sliding_window=8,
    intermediate_size=16,
    dtype="fp32",
)
TEXT = CorpusSizes(12_000, 3_000, 2_000, 3_000, 2_000, vocab_size=320, max_bytes=400_000)
NAMES = ["slm_60", "random_60", "self_intersection_60", "continued_slm_60"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a small corpus."""
    folder = tmp_path_factory.mktemp("rho1")
    build_corpus(folder / "corpus", TEXT, lambda _: None)
    return folder


@pytest.fixture(scope="module")
def corpus(work):
    return open_corpus(work / "corpus", TEXT)


def _run(work, path, names=NAMES, seeds=2, sizes=TINY):
    threads = torch.get_num_threads()  # a job sets its own, here in the process of the tests
    try:
        return rho1.run(names, seeds, sizes, TEXT, work=work, path=path, processes=0, report=lambda _: None)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def record(work):
    return _run(work, work / "out.json")


def test_every_run_has_its_curve_and_what_it_selected(record):
    done = [(found["variant"], found["seed"]) for found in record["runs"]]
    names = ["reference", "slm_60", "random_60", "ce", "self_intersection_60", "continued_reference"]
    assert done == [(name, seed) for seed in (0, 1) for name in [*names, "continued_slm_60"]]
    for found in record["runs"]:
        last = TINY.continual_steps if found["variant"].startswith("continued") else TINY.steps
        assert [point["step"] for point in found["curve"]] == [last // 3, 2 * last // 3, last]
        assert 0 < found["final"]["clean"]["bits"] < 16
        assert list(found["final"]["clean"]["by_kind"]) == ["clean"]
        assert "clean" not in found["final"]["noise"]["by_kind"]
        keep = VARIANTS[found["variant"]].keep
        for point in found["curve"]:
            steps = point["step"] - (point["step"] - last // 3)
            eligible, selected = (sum(map(sum, point[name])) for name in ("eligible", "selected"))
            assert abs(selected - keep * eligible) <= 0.5 * steps
            assert [sum(counts) for counts in point["positions"]] == [eligible, selected]
            if keep < 1:
                assert point["selected_score"] >= point["threshold"] >= point["unselected_score"]


def test_a_seed_is_one_beginning_and_one_order_of_text(record, corpus):
    weights = [new_model(TINY, corpus, 3).state_dict() for _ in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    seen = {found["variant"]: [point["eligible"] for point in found["curve"]] for found in record["runs"][:7]}
    assert seen["slm_60"] == seen["random_60"] == seen["ce"] != seen["reference"]
    assert not torch.equal(*(Rows(corpus.sides["train"], TINY, seed).batch(0).input_ids for seed in (0, 1)))


def test_the_second_stage_reads_on_where_the_first_stopped(work, record, corpus):
    rows = Rows(corpus.sides["train"], TINY, 0)
    eligible = sum(
        int(rows.batch(number).eligible.sum())
        for number in range(TINY.steps, TINY.steps + TINY.continual_steps)
    )
    (found,) = (run for run in record["runs"] if (run["variant"], run["seed"]) == ("continued_slm_60", 0))
    assert sum(sum(map(sum, point["eligible"])) for point in found["curve"]) == eligible


def test_reference_scores_are_aligned_with_the_labels(work, record, corpus):
    """The reference against itself: excess is 0 everywhere, for the rows of training; another row's is not."""
    import numpy as np

    model = new_model(TINY, corpus, 0)
    model.load_state_dict(torch.load(work / "reference-0.pt", weights_only=True))
    with np.load(scores_file(work, "reference", 0)) as stored:
        scores = torch.from_numpy(stored["nll"])
    assert scores.shape == (TINY.steps, TINY.batch_tokens)
    rows = Rows(corpus.sides["train"], TINY, 0)
    with torch.no_grad():
        for step in range(TINY.steps):
            batch = rows.batch(step)
            nll = token_losses(model, batch, TINY)
            torch.testing.assert_close(nll, scores[step], rtol=0, atol=1e-5)
            assert not torch.allclose(nll.roll(1), scores[step], atol=1e-2)
            # Independently: logits of the input at i against the label at i.
            hidden = model.model(batch.input_ids, cu_seqlens=batch.cu_seqlens)[0]
            expected = torch.nn.functional.cross_entropy(
                model.logits(hidden), batch.labels, ignore_index=IGNORE_INDEX, reduction="none"
            )
            torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-4)


def test_labels_of_a_batch_are_those_of_the_predicted_token(corpus):
    side = corpus.sides["train"]
    batch = Rows(side, TINY, 1).batch(2)
    inside = batch.positions[1:] > 0  # the next position is the next token of the document
    following = batch.input_ids[0, 1:]
    assert torch.equal(batch.labels[:-1][inside], following[inside])
    assert torch.equal(batch.eligible, batch.kinds != IGNORE_INDEX)
    assert int(batch.positions.max()) < TINY.seq_len
    assert batch.positions[batch.cu_seqlens[:-1].long()].abs().sum() == 0


def test_the_loss_is_the_operators(corpus):
    from fastlm import ops

    model, batch = new_model(TINY, corpus, 0), Rows(corpus.sides["train"], TINY, 0).batch(0)
    ref = torch.randn(TINY.batch_tokens).abs() * 5
    nll = token_losses(model, batch, TINY)
    score = score_of("excess", batch.eligible, nll, ref, None, torch.Generator())
    mask = chosen(VARIANTS["slm_60"], batch, score)
    ours = torch.where(mask, nll, 0).sum() / mask.sum()
    hidden = model.model(batch.input_ids, cu_seqlens=batch.cu_seqlens)[0]
    loss, stats = ops.slm_loss(
        hidden, model.output_weight, batch.labels, ref, keep_ratio=0.6, return_stats=True
    )
    assert torch.equal(mask, stats.mask)
    torch.testing.assert_close(ours, loss)
    grads = [torch.autograd.grad(each, model.output_weight)[0] for each in (ours, loss)]
    torch.testing.assert_close(*grads)


def _batch(kinds, labels=None, length=None):
    n = len(kinds)
    labels = torch.arange(n) if labels is None else torch.tensor(labels)
    positions = torch.arange(n) % (length or n)
    document = torch.tensor([0] * (n // 2) + [len(KINDS)] * (n - n // 2))  # clean, then mixed
    return Batch(
        torch.zeros(1, n, dtype=torch.long),
        torch.tensor([0, n]),
        labels,
        torch.tensor(kinds),
        document,
        positions,
    )


def test_every_rule_selects_its_share_of_the_eligible():
    n = 203
    draw = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, len(KINDS), (n,), generator=draw).tolist()
    labels = [IGNORE_INDEX if i % 7 == 0 else i for i in range(n)]
    batch = _batch(kinds, labels)
    eligible = int(batch.eligible.sum())
    nll, ref, entropy = (torch.rand(n, generator=draw) * 8 for _ in range(3))
    for name, variant in VARIANTS.items():
        score = score_of(variant.rule, batch.eligible, nll, ref, entropy, torch.Generator().manual_seed(1))
        mask = chosen(variant, batch, score)
        assert not (mask & ~batch.eligible).any(), name
        if variant.rule == "oracle":
            expected = sum(k == CLEAN and x != IGNORE_INDEX for k, x in zip(kinds, labels, strict=True))
        else:
            expected = math.floor(variant.keep * eligible + 0.5)
        assert int(mask.sum()) == expected, name
        inside, outside = score[mask], score[batch.eligible & ~mask]
        if variant.rule not in {"all", "oracle"}:
            assert inside.min() >= outside.max(), name
    excess = score_of("excess", batch.eligible, nll, ref, None, draw)
    assert torch.equal(excess, nll - ref)
    assert torch.equal(score_of("ref_loss", batch.eligible, nll, ref, None, draw), -ref)


def test_the_intersection_is_one_of_two_equally_large_sets():
    draw = torch.Generator().manual_seed(2)
    batch = _batch([0] * 100, [IGNORE_INDEX if i < 10 else i for i in range(100)])
    ref, entropy = (torch.rand(100, generator=draw) for _ in range(2))
    score = score_of("intersection", batch.eligible, ref, ref, entropy, draw)
    mask = chosen(VARIANTS["intersection_60"], batch, score)
    size = round((1 - float(score[mask].min())) * 90)
    order = [x.masked_fill(~batch.eligible, math.inf).argsort()[:size].tolist() for x in (ref, entropy)]
    assert set(mask.nonzero().flatten().tolist()) == set(order[0]) & set(order[1])
    assert 54 < size < 90


def test_random_choice_is_new_every_step_and_the_same_every_time():
    eligible, nll = torch.ones(64, dtype=torch.bool), torch.zeros(64)
    first, again, other = (
        score_of("random", eligible, nll, None, None, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_log_counts_by_kind_document_and_position():
    batch = _batch([0, 1, 0, 2, 0, 0, 3, 3], [5, 5, IGNORE_INDEX, 5, 5, 5, 5, 5], length=4)
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0]).bool()
    nll = torch.tensor([1.0, 2, 99, 3, 5, 6, 7, 8])
    log = SelectionLog()
    log.add(batch, mask, nll, nll / 2)
    found = log.read()
    zeros = [0] * 4
    assert found["eligible"] == [[1, 1, 1, 0, *zeros], [2, 0, 0, 2, *zeros]]
    assert found["selected"] == [[1, 0, 1, 0, *zeros], [1, 0, 0, 0, *zeros]]
    assert found["positions"] == [[2, 5, 0, 0, 0], [2, 1, 0, 0, 0]]
    assert (found["selected_loss"], found["unselected_loss"]) == (3.0, 5.75)
    assert (found["selected_score"], found["threshold"]) == (1.5, 0.5)
    assert found["train_loss"] == round(32 / 7, 5)
    assert rho1_summary.rates([found], "token")["clean"] == 2 / 3
    assert rho1_summary.rates([found], "document") == {"clean": 1, "base64": 0, "hex": 1, "mixed": 1 / 4}
    assert rho1_summary.rates([found], "mixed") == {"clean": 1 / 2, "noise": 0}
    assert rho1_summary.rates([found], "position") == {"0": 1, "1": 1 / 5}
    assert rho1_summary.noise_rate([found]) == 1 / 4
    assert log.read()["selected_loss"] is None


def test_held_out_text_is_evaluated_in_order_and_no_further(corpus):
    batches = held_out(corpus.sides["held-out"], TINY, 300)
    assert sum(batch.input_ids.numel() for batch in batches) == 300
    assert all((batch.kinds[batch.eligible] == CLEAN).all() for batch in batches)


def test_shown_documents_are_held_out_text_with_the_share_of_slm(record, corpus):
    (shown,) = (found["documents"] for found in record["runs"] if "documents" in found)
    assert [document["name"] for document in shown] == corpus.manifest["page"]
    side, entries = corpus.sides["page"], []
    for i, document in enumerate(shown):
        tokens = side.tokens(i, 0, 10**6)[1:]
        spelled = b"".join(entry[0].encode("latin-1") for entry in document["tokens"])
        assert spelled == b"".join(corpus.spelling[token] for token in tokens[: len(document["tokens"])])
        kinds = side.giving("labels").tokens(i, 1, 10**6)
        assert [entry[4] for entry in document["tokens"]] == kinds[: len(document["tokens"])].tolist()
        entries += document["tokens"]
    chosen, others = ([e[1] - e[2] for e in entries if e[3] == mark] for mark in (1, 0))
    assert len(chosen) == math.floor(0.6 * len(entries) + 0.5)
    assert min(chosen) >= max(others) - 2e-3  # rounded to three digits


def test_a_killed_experiment_goes_on(work, record, monkeypatch):
    path = work / "out.json"
    whole = path.read_text()
    done = []
    monkeypatch.setattr(
        rho1, "train", lambda name, seed, *rest: done.append((name, seed)) or train(name, seed, *rest)
    )
    again = _run(work, path)
    assert done == []
    assert again["runs"] == json.loads(json.dumps(record["runs"]))
    try:
        # Killed before the last four runs; then the reference's files are lost, too, which a run to do needs.
        path.write_text(rho1.compact({**record, "runs": record["runs"][:-4]}))
        lost = artefacts(work, "ce", 1)
        for file in lost:
            file.unlink()
        again = _run(work, path)
        assert done == [
            ("ce", 1),
            ("self_intersection_60", 1),
            ("continued_reference", 1),
            ("continued_slm_60", 1),
        ]
        timeless = [
            [{k: v for k, v in run.items() if "seconds" not in k} for run in each["runs"]]
            for each in (again, record)
        ]
        assert timeless[0] == timeless[1]
        assert all(file.exists() for file in lost)
    finally:
        path.write_text(whole)


def test_the_json_is_whole_after_every_job(work, record, tmp_path, monkeypatch):
    path = tmp_path / "half.json"

    def stop(name, seed, *rest):
        if name == "random_60":
            raise KeyboardInterrupt
        return train(name, seed, *rest)

    monkeypatch.setattr(rho1, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        _run(work, path, ["slm_60", "random_60"], 1)
    assert [found["variant"] for found in rho1.read_record(path)["runs"]] == ["reference", "slm_60"]


def test_jobs_wait_for_what_they_need():
    jobs = rho1.planned(["continued_slm_60", "random_60"], 2)
    assert jobs == [
        (name, seed)
        for seed in (0, 1)
        for name in ("ce", "continued_reference", "continued_slm_60", "random_60")
    ]
    running: list[tuple] = []

    def submit(key):
        needs = {(other, key[1]) for other in VARIANTS[key[0]].needs}
        assert not needs & set(running)
        assert needs <= over
        running.append(key)
        future: Future = Future()
        future.set_result(key)
        return future

    over: set = set()
    for key, found in rho1.finished(jobs, submit, 2):
        assert key == found
        assert len(running) <= 2
        running.remove(key)
        over.add(key)
    assert over == set(jobs)


def test_other_sizes_or_texts_are_refused(work, record, tmp_path):
    path = work / "out.json"
    with pytest.raises(RunError, match="sizes"):
        _run(work, path, sizes=replace(TINY, lr=1.0))
    with pytest.raises(RunError, match="give another --work"):
        open_corpus(work / "corpus", replace(TEXT, vocab_size=300))
    other = json.loads(path.read_text())
    other["corpus"]["digest"] = "0"
    changed = tmp_path / "other.json"
    changed.write_text(json.dumps(other))
    with pytest.raises(RunError, match="text"):
        _run(work, changed)
    changed.write_text("{}")
    with pytest.raises(InputError, match="expected a record"):
        rho1.read_record(changed)


def test_command_line_errors_are_sentences(capsys, tmp_path):
    for arguments, words in (
        (["run", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["plot", "--json", str(tmp_path / "none.json")], "expected a record"),
    ):
        with pytest.raises(SystemExit) as stopped:
            rho1.main(arguments)
        assert stopped.value.code == 1
        assert words in capsys.readouterr().err


def test_the_estimate_counts_passes():
    sizes = replace(TINY, steps=100, continual_steps=50, batch_tokens=100, evaluations=1)
    sizes = replace(
        sizes, eval_tokens=300, noise_eval_tokens=0, final_eval_tokens=300, final_noise_eval_tokens=0
    )
    # 110 + 6 / 3 passes of a second, and 2 s of everything else; scoring 100 rows is a third of 100.
    assert rho1.estimate([("ce", 0)], sizes, 1.0, 1) == pytest.approx(110 + 2 + 100 / 3 + 2)
    assert rho1.estimate([("continued_ce", 0)] * 2, sizes, 1.0, 2) == pytest.approx(55 + 2 + 2)
