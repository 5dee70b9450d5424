"""Two processes on the CPU: their averaged gradient is that of one process on all the data."""

from __future__ import annotations

import faulthandler
import os
import socket
from pathlib import Path

import pytest
import torch

from fastlm.methods import rho1
from tests.methods.rho1.documents import documents
from tests.methods.rho1.hf_models import (
    assert_same_gradients,
    gradients,
    make_model,
    masked_labels,
    one_thread,
    scored,
)
from tests.training.runs import context

KEEP = 0.4
LENGTHS = (
    (4, 5),
    (4, 5),
    (12, 16),
    (9, 14),
    (5, 8),
    (15, 16),
    (4, 6),
    (10, 13),
)  # one row each: nothing is even


def uneven_rows() -> list[list[int]]:
    return [documents(1, seed=number, low=low, high=high)[0] for number, (low, high) in enumerate(LENGTHS)]


def work(rank: int, port: int, scope: str, folder: Path) -> None:
    """One of two processes: one optimizer step of two micro-batches of two rows each."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(60, exit=True)  # a hang ends here, and says where
    from tests.methods.rho1.test_trainer import Keeping, arguments, rows_of

    class InOrder(rho1.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    keeping = Keeping()
    rows = uneven_rows()
    trainer = InOrder(
        make_model("llama"),
        arguments(
            folder / str(rank),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            ddp_backend="gloo",
        ),
        train_dataset=rows_of(rows),
        data_collator=rho1.Collator(scored(rows, seed=1), pad_token_id=0),
        keep_ratio=KEEP,
        scope=scope,
        callbacks=[keeping.callback()],
    )
    assert trainer.args.world_size == 2
    trainer.train()
    torch.save((keeping.steps, trainer.state.log_history), folder / f"rank-{rank}.pt")
    torch.distributed.barrier()  # nobody leaves while the other still listens
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def in_two_processes(scope: str, folder: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, port, scope, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["batch", "global"])
def test_gradients_are_those_of_one_process_on_all_the_data(scope, tmp_path):
    rows = uneven_rows()
    results = in_two_processes(scope, tmp_path)
    with one_thread():
        model, store = make_model("llama"), scored(rows, seed=1)
        collator = rho1.Collator(store, pad_token_id=0)
        size = 2 if scope == "batch" else 4  # rows that are ranked together
        total, count = torch.zeros(()), 0
        for start in range(0, 8, size):
            batch = collator([{"input_ids": row} for row in rows[start : start + size]])
            labels = masked_labels(model, batch, KEEP)
            chosen = int((labels != -100).sum())
            own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
            total, count = total + chosen * own.loss, count + chosen
        (total / count).backward()
        expected = gradients(model)
    for steps, log in results:
        assert len(steps) == 1
        assert_same_gradients({name.removeprefix("module."): g for name, g in steps[0].items()}, expected)
        assert log[0]["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-4)
        assert log[0]["selected_fraction"] == pytest.approx(count / sum(len(row) - 1 for row in rows))
    assert results[0][1][0]["full_loss"] == results[1][1][0]["full_loss"]
