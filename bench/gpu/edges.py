"""Calls at the edge: hostile index values, bad arguments, unaligned memory, rows alone and among others, the fused operator beside
its halves. None needs a float64 reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .conform import Results, assert_same_bits, outputs_of
from .item import Context, SkipError, WrongError
from .operators import build, named_arguments, poison_fresh_memory, public, raw, schemas, tensors_of

_GUARD = 4096  # elements on either side of a guarded tensor; its alignment stays what it was
_INTEGERS = (torch.int32, torch.int64)
_INDEX_NAMES = (
    *("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "seq_idx", "cache_seqlens", "conv_state_indices"),
    *("state_batch_indices", "topk_ids", "offsets", "labels"),
)
# Ids of experts lie on the device and are not checked there (docs/cuda.md, differences from the CPU operators).
_IDS_NOT_CHECKED = ("moe_plan", "grin_route_backward", "moe_experts", "moe_experts_backward")
_SAMPLES = 4  # with an argument, that get hostile values for it


def guarded(t: Tensor, shift: int = 0) -> tuple[Tensor, Callable[[], bool]]:
    """A copy with the same strides between two guards, and a function that says whether these are as they were.

    Args:
        t: what to copy.
        shift: elements by which it lies off its alignment.
    """
    if t.numel() == 0:
        return t.clone(), lambda: True
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    room = torch.full((extent + 2 * _GUARD + shift,), 0x5A, dtype=bits, device=t.device)
    begin = _GUARD + shift
    inside = room.view(t.dtype).as_strided(t.shape, t.stride(), begin)
    once = tuple(
        slice(0, 1) if stride == 0 else slice(None) for stride in t.stride()
    )  # rows may share memory
    inside[once].copy_(t[once])

    def intact() -> bool:
        return bool((room[:begin] == 0x5A).all()) and bool((room[begin + extent :] == 0x5A).all())

    return inside, intact


def _with_guards(
    call: Any, shift: int = 0, *, floating_only: bool = False
) -> tuple[Any, list[Callable[[], bool]]]:
    checks: list[Callable[[], bool]] = []

    def change(a: Any) -> Any:
        if not isinstance(a, Tensor) or (floating_only and not a.is_floating_point()):
            return a
        inside, intact = guarded(a.detach(), shift)
        checks.append(intact)
        return inside

    return call.map(change), checks


# ---- hostile index values -------------------------------------------------------------------------------


def index_arguments(op: str, sample: Any) -> list[str]:
    """Names of a sample's integer tensors that are not empty."""
    arguments = named_arguments(op, sample.build("cpu"))
    return [
        name
        for name, a in arguments.items()
        if isinstance(a, Tensor) and a.dtype in _INTEGERS and a.numel() > 0
    ]


def index_names(op: str) -> list[str]:
    """Arguments of an operator that hold indices, lengths or bounds."""
    return [a.name for a in schemas()[op].arguments if a.name in _INDEX_NAMES]


def _hostile(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    most, least = torch.iinfo(t.dtype).max, torch.iinfo(t.dtype).min
    yield "-1", torch.full_like(t, -1)
    yield "smallest", torch.full_like(t, least)
    yield "largest", torch.full_like(t, most)
    yield "zero", torch.zeros_like(t)
    yield "off by one", t + 1
    yield "reversed", t.flip(0)
    yield "2^31 - 1", torch.full_like(t, 2**31 - 1)
    yield "times a thousand", t * 1000 + 7
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(least, most, t.shape, generator=generator, dtype=torch.int64)
    yield "random", values.to(t.dtype).to(t.device)
    small = torch.randint(-3, 40, t.shape, generator=generator, dtype=torch.int64)
    yield "small and unsorted", small.to(t.dtype).to(t.device)


def check_hostile_samples(op: str, samples: list[Any], argument: str, context: Context) -> dict[str, Any]:
    """`check_hostile` of the first samples that have the argument."""
    having = (s for s in samples if argument in index_arguments(op, s))
    chosen = list(islice(having, 1 if context.settings.few else _SAMPLES))
    if not chosen:
        raise SkipError(f"no sample has {argument}")
    refused = {s.name: check_hostile(op, s, argument, context)["refused"] for s in chosen}
    return {"refused": refused}


def check_hostile(op: str, sample: Any, argument: str, context: Context) -> dict[str, Any]:
    """The operator may refuse the values or give any numbers; it must not crash, hang or write outside its arguments."""
    poison_fresh_memory()
    refused = []
    index = named_arguments(op, build(sample, context.device))[argument]
    for word, values in _hostile(index):
        context.stage(f"{sample}: {argument} {word}")
        call, checks = _with_guards(build(sample, context.device))
        positional = [a.name for a in schemas()[op].arguments]
        args = list(call.args)
        if argument in call.kwargs:
            call.kwargs[argument] = values.clone()
        else:
            args[positional.index(argument)] = values.clone()
        try:
            with torch.no_grad():
                raw(op)(*args, **call.kwargs)
            if context.device == "cuda":
                torch.cuda.synchronize()
        except (ValueError, IndexError) as error:
            refused.append(f"{word}: {error}"[:120])
        except RuntimeError as error:
            if "CUDA" in str(error):
                raise
            refused.append(f"{word}: {error}"[:120])
        if not all(intact() for intact in checks):
            raise WrongError(f"{argument} {word}: memory beside an argument was written")
    return {"refused": refused}


# ---- alignment ------------------------------------------------------------------------------------------


def check_unaligned(sample: Any, context: Context) -> None:
    """Tensors that begin one element off their alignment give the same bits."""
    poison_fresh_memory()
    op = sample.op
    runs: list[Results] = []
    for shift in (0, 1):
        context.stage(f"{shift} elements off")
        call, checks = _with_guards(build(sample, context.device), shift, floating_only=True)
        with torch.no_grad():
            runs.append(outputs_of(raw(op), call, {}))
        if not all(intact() for intact in checks):
            raise WrongError("memory beside an argument was written")
    assert_same_bits("aligned and not", *runs)


# ---- bad arguments --------------------------------------------------------------------------------------


def _bad_calls(op: str, sample: Any, device: str) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Words for what is wrong, and what makes the call on a device; every tensor in turn has a wrong shape or dtype."""
    names = [name for name, a in named_arguments(op, sample.build("cpu")).items() if isinstance(a, Tensor)]
    for name in names:
        for word, change in _BAD.items():
            yield f"{name} {word}", partial(_changed, op, sample, name, change)


def _fewer(t: Tensor) -> Tensor:
    return t[..., : max(0, t.shape[-1] - 1)] if t.is_floating_point() else t


_BAD: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda t: t.reshape(-1) if t.dim() != 1 else t.unsqueeze(0),
    "with a dimension more": lambda t: t[None, None],
    "of another dtype": lambda t: t.to(torch.complex64 if t.is_floating_point() else torch.float32),
    "of int16": lambda t: t.to(torch.int16),
    "one shorter": _fewer,
}


def _changed(op: str, sample: Any, name: str, change: Callable[[Tensor], Tensor], device: str) -> Any:
    arguments = named_arguments(op, build(sample, device))
    arguments[name] = change(arguments[name])
    return arguments


def _answer(op: str, arguments: dict[str, Any]) -> str:
    try:
        with torch.no_grad():
            raw(op)(**arguments)
    except (ValueError, IndexError, NotImplementedError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    except RuntimeError as error:
        if "CUDA" in str(error) and "launch failed" in str(error):
            raise
        return f"RuntimeError: {str(error).splitlines()[0]}"
    return "accepted"


def agree(op: str, here: str, there: str) -> bool:
    """The same answer, or ids that the CPU refuses and the device by design does not look at."""
    unseen = op in _IDS_NOT_CHECKED and here == "accepted" and there.startswith("IndexError")
    return here == there or unseen


def check_errors(op: str, sample: Any, context: Context) -> dict[str, Any]:
    """A bad call fails on the device as on the CPU: the same exception with the same text, values that only the CPU checks aside."""
    differing, count = [], 0
    for what, make in _bad_calls(op, sample, context.device):
        context.stage(what)
        here, there = (_answer(op, make(device)) for device in (context.device, "cpu"))
        count += 1
        if not agree(op, here, there):
            differing.append(f"{what}: on the device {here[:200]!r}, on the CPU {there[:200]!r}")
    if differing:
        raise WrongError(f"{len(differing)} of {count} bad calls: " + "; ".join(differing[:5]))
    return {"bad_calls": count}


def filled_tensors(op: str, sample: Any) -> list[str]:
    """Names of a sample's tensors that are not empty."""
    arguments = named_arguments(op, sample.build("cpu"))
    return [name for name, a in arguments.items() if isinstance(a, Tensor) and a.numel() > 0]


def check_mixed_devices(op: str, samples: list[Any], context: Context) -> dict[str, Any]:
    """One tensor on the CPU among others on the device: an exception that names the operator or the devices.

    The first sample with two tensors serves: a call whose only tensor lies on the CPU is one for the CPU.
    """
    sample = next((s for s in samples if len(filled_tensors(op, s)) > 1), None)
    if sample is None:
        raise SkipError("its samples have one tensor each")
    texts: dict[str, str] = {}
    for name in filled_tensors(op, sample):
        context.stage(f"{name} on the CPU")
        answer = _answer(op, _changed(op, sample, name, lambda t: t.cpu(), context.device))
        texts[name] = answer[:200]
    accepted = [name for name, text in texts.items() if text == "accepted"]
    if accepted:
        raise WrongError(f"a tensor on the CPU was accepted as {', '.join(accepted)}")
    unclear = [f"{n}: {text}" for n, text in texts.items() if op not in text and "device" not in text]
    if unclear:
        raise WrongError(f"the text names neither operator nor device: {'; '.join(unclear[:3])}")
    return {"texts": texts}


# ---- rows alone and among others ------------------------------------------------------------------------


def check_alone(sample: Any, along: tuple[str, ...], context: Context) -> dict[str, Any]:
    """Row by row the same bits as all rows in one call.

    Args:
        sample: whose first dimension of the tensors in `along` counts rows.
        along: arguments with one row each; results all have one.
        context: of the run.
    """
    poison_fresh_memory()
    op = sample.op
    whole = named_arguments(op, build(sample, context.device))
    context.stage("all rows")
    with torch.no_grad():
        everything = [t.detach() for t in tensors_of(raw(op)(**whole))]
    rows = whole[along[0]].shape[0]
    by_row = [i for i, t in enumerate(everything) if t.dim() > 0 and t.shape[0] == rows]
    for row in range(rows):
        context.stage(f"row {row}")
        part = named_arguments(op, build(sample, context.device))
        part |= {name: part[name][row : row + 1] for name in along if isinstance(part.get(name), Tensor)}
        with torch.no_grad():
            alone = [t.detach() for t in tensors_of(raw(op)(**part))]
        among = {f"output {i}": everything[i][row : row + 1] for i in by_row}
        assert_same_bits(
            f"row {row} among {rows} and alone", among, {f"output {i}": alone[i] for i in by_row}
        )
    return {"rows": rows}


# ---- the fused operator ---------------------------------------------------------------------------------


def check_fused(sample: Any, context: Context) -> None:
    """`scan_swa` gives bit for bit what its halves give."""
    poison_fresh_memory()
    arguments = named_arguments("scan_swa", build(sample, context.device))
    scan_names = [a.name for a in schemas()["selective_scan"].arguments]
    attention_names = [a.name for a in schemas()["sliding_window_attention"].arguments]
    with torch.no_grad():
        context.stage("fused")
        fused = public("scan_swa")(**arguments)
        context.stage("halves")
        scan = {name: arguments[name] for name in scan_names if name in arguments}
        attention = {name: arguments[name] for name in attention_names if name in arguments}
        halves = (
            *public("selective_scan")(**scan, return_last_state=True),
            *public("sliding_window_attention")(**attention, return_lse=True),
        )
    names = ("scan_out", "last_state", "attn_out", "lse")
    assert_same_bits("fused and apart", *(dict(zip(names, run, strict=True)) for run in (fused, halves)))
