"""Part `bench`: checks every contender of a problem against float64, then times those that are right, in turns."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..case import UnavailableError
from ..checking import relative_error
from .case import BACKWARD, Call, Contender, GpuCase, Inputs, Problem, Results
from .facts import Watch
from .item import UNAVAILABLE, Context, Item, Settings
from .timing import Timed, captured, interleave

_SECONDS = 3.0  # of a contender and part at most
TIMED, WRONG, BROKEN, LEFT_OUT = "timed", "wrong", "failed", "left out"


def items(settings: Settings) -> list[Item]:
    """All cases, in turns over the operators, each with its most important ones first."""
    from . import cases_attention, cases_decode, cases_loss, cases_model, cases_moe, cases_scan

    modules = (cases_scan, cases_attention, cases_moe, cases_loss, cases_decode, cases_model)
    by_operator: dict[str, list[GpuCase]] = {}
    for case in (case for module in modules for case in module.cases(tiny=settings.tiny)):
        by_operator.setdefault(case.name.split("/")[0], []).append(case)
    found = [case for turn in zip_longest(*by_operator.values()) for case in turn if case is not None]
    return [Item(case.name, partial(_measure, case), limit=case.limit) for case in found]


def _measure(case: GpuCase, context: Context) -> dict[str, Any]:
    torch._dynamo.config.cache_size_limit = 256
    torch._functorch.config.donated_buffer = False  # a backward pass is timed several times on one graph
    torch.manual_seed(0)
    context.stage("inputs")
    problem = case.make(context)
    parts = {part: measure_part(problem, part, context) for part in problem.work}
    return {"shape": dict(problem.shape), "note": problem.note, "parts": parts}


def measure_part(problem: Problem, part: str, context: Context) -> dict[str, Any]:
    """Rows of all contenders and what the report needs to judge them."""
    context.stage(f"{part}: expected results")
    expected = problem.expected(part) if problem.expected is not None else None
    rows: list[dict[str, Any]] = []
    timed: list[tuple[dict[str, Any], Timed]] = []
    for contender in problem.contenders:
        row: dict[str, Any] = {"name": contender.name, "ours": contender.ours, "graph": contender.graph}
        row["orientation"] = not contender.full_check
        rows.append(row)
        status, reason, results, call = _prepare(problem, part, contender, expected, context)
        row |= {"status": status, "reason": reason}
        if results is not None:
            row["errors"] = results
        if call is not None:
            timed.append((row, Timed(contender.name, call)))
        if expected is None and call is not None and problem.outputs:
            expected = _first_results(problem, call)
    context.stage(f"{part}: timing")
    with Watch(context.device) as watch, _mode(part):
        _time(timed, context)
    for row, one in timed:
        row |= one.data()
    work = problem.work[part]
    return {
        "work": {"amount": work.amount, "unit": work.unit, "floor": dict(work.floor)},
        "targets": [target.as_dict() for target in work.targets],
        "contenders": rows,
        "watch": watch.data(),
    }


def _time(timed: list[tuple[dict[str, Any], Timed]], context: Context) -> None:
    """All together; where one of them runs out of memory beside the others, it is left out."""
    while timed:
        try:
            interleave(
                [one for _, one in timed], context.device, rounds=context.settings.rounds, seconds=_SECONDS
            )
            return
        except torch.OutOfMemoryError:
            row, _ = timed.pop()
            row |= {"status": LEFT_OUT, "reason": "no memory for it beside the others"}
            for _, one in timed:
                one.samples.clear()
                one.host.clear()


def _first_results(problem: Problem, call: Call) -> Results:
    with torch.no_grad():
        results = call()
    results = results if isinstance(results, tuple) else (results,)
    return {name: t.detach().clone() for name, t in zip(problem.outputs, results, strict=False)}


def _mode(part: str) -> Any:
    return nullcontext() if part == BACKWARD else torch.no_grad()


def _prepare(
    problem: Problem, part: str, contender: Contender, expected: Results | None, context: Context
) -> tuple[str, str, dict[str, float] | None, Call | None]:
    """Status, reason, errors, and the call to time."""
    context.stage(f"{part}: {contender.name}")
    if part not in contender.parts:
        return LEFT_OUT, f"does no {part}", None, None
    if context.ours_only and not contender.ours:
        return LEFT_OUT, "with all contenders the process was lost", None, None
    if contender.name in context.settings.without:
        return LEFT_OUT, "left out by --without", None, None
    if contender.compiled and not context.settings.compile:
        return LEFT_OUT, "torch.compile takes its time: left out by --no-compile", None, None
    if contender.graph and context.device != "cuda":
        return LEFT_OUT, "graphs are a matter of CUDA", None, None
    try:
        call, results = _first_call(problem, part, contender)
        if context.device == "cuda":
            torch.cuda.synchronize()
        errors = {}
        if expected is not None and contender.full_check:
            errors = {
                name: relative_error(results[name].double(), want.double()) for name, want in expected.items()
            }
        allowed = {name: problem.allowed_for.get(name, problem.allowed) for name in errors}
        wrong = {name: e for name, e in errors.items() if not e <= allowed[name]}
        if wrong:
            text = ", ".join(f"{name} {e:.2g}, allowed {allowed[name]:g}" for name, e in wrong.items())
            return WRONG, f"relative error: {text}", errors, None
        del results
        if contender.graph:
            with torch.no_grad():
                call = captured(call)
        return TIMED, "", errors, call
    except (UnavailableError, NotImplementedError) as why:
        return UNAVAILABLE, _one_line(why), None, None
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return LEFT_OUT, f"out of memory: {_one_line(error)}", None, None
    except Exception as error:
        if context.device == "cuda":
            torch.cuda.synchronize()  # raises where the error stays with the process
        return BROKEN, f"{type(error).__name__}: {_one_line(error)}", None, None


def _first_call(problem: Problem, part: str, contender: Contender) -> tuple[Call, Results]:
    """A call on inputs of its own, and the results of a first one."""
    if part == BACKWARD:
        return _backward(problem, contender)
    inputs = contender.prepare(dict(problem.inputs))
    own = _copies(problem, inputs)
    with torch.no_grad():
        results = contender.build(own)()
        results = results if isinstance(results, tuple) else (results,)
        named = dict(zip(problem.outputs, results, strict=False))
        named |= {name: own[name] for name in problem.mutated}
        call = contender.build(_copies(problem, inputs)) if problem.mutated else contender.build(own)
    return call, named


def _copies(problem: Problem, inputs: Inputs) -> Inputs:
    return {name: a.clone() if name in problem.mutated else a for name, a in inputs.items()}


def _backward(problem: Problem, contender: Contender) -> tuple[Call, Results]:
    """The backward pass alone, on a graph that is kept."""
    inputs = contender.prepare(dict(problem.inputs))
    leaves = {
        name: a.detach().requires_grad_() if name in problem.gradients else a for name, a in inputs.items()
    }
    outputs = contender.build(leaves)()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [leaves[name] for name in problem.gradients]
    upstream = [_like(g, out) for g, out in zip(problem.upstream, outputs, strict=False)]
    kept: list[Tensor] = list(outputs[: len(upstream)])

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kept, wanted, upstream, retain_graph=True)

    call()  # a second time must do as well: some peers free what they saved
    found = call()
    return call, {f"d{name}": g for name, g in zip(problem.gradients, found, strict=True)}


def _like(gradient: Tensor, out: Tensor) -> Tensor:
    """The gradient in layout and dtype of an output."""
    return torch.empty_like(out).copy_(gradient)


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
