"""Every registered operator has every piece; what is missing is named.

Walks the schemas, so that an operator cannot arrive with one of its parts left for later: twin, fake kernel,
gradient, public function, reference, samples, tests, bench case, docs row.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fastlm import ops, reference
from tests.support import samples

ROOT = Path(__file__).parent.parent
SCHEMAS = {  # in order, which test runners with several processes insist on
    s.name.removeprefix("fastlm::"): s
    for s in sorted(torch._C._jit_get_all_schemas(), key=lambda s: s.name)
    if s.name.startswith("fastlm::")
}
FORWARD = [name for name in SCHEMAS if not name.endswith("_backward")]
IN_PLACE = [name for name in SCHEMAS if any(a.alias_info for a in SCHEMAS[name].arguments)]
FUNCTIONAL = [name for name in SCHEMAS if name not in IN_PLACE]
DIFFERENTIABLE = [name for name in SCHEMAS if f"{name}_backward" in SCHEMAS]

FLOATING = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
INDEX = {torch.int32, torch.int64}


def family_of(op: str) -> str:
    """The folder below csrc/ops whose CPU twin registers `op`."""
    for twin in (ROOT / "csrc" / "ops").glob("*/cpu.cpp"):
        if f'm.impl("{op}"' in twin.read_text():
            return twin.parent.name
    pytest.fail(f'{op}: no CPU twin, that is, no m.impl("{op}", ...) in csrc/ops/*/cpu.cpp')


def mentions(path: Path, op: str) -> bool:
    """Whether the file names the operator itself, not just one whose name begins alike."""
    return re.search(rf"\b{op}\b", path.read_text()) is not None


def tensors(tree) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def test_there_are_operators():
    assert {"causal_conv1d", "selective_scan", "sliding_window_attention"} <= set(SCHEMAS)


@pytest.mark.parametrize("op", SCHEMAS)
def test_cuda_twin_registers_what_the_cpu_twin_does(op):
    family = ROOT / "csrc" / "ops" / family_of(op)
    twins = sorted(family.glob("cuda*.cpp"))
    if twins:
        text = "".join(twin.read_text() for twin in twins)
        assert f'm.impl("{op}"' in text, f"{op}: no cuda*.cpp in {family.relative_to(ROOT)} registers it"


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema_has_a_comment_of_its_own(op):
    """One line above each operator says what it computes."""
    text = (ROOT / "csrc" / "schema.cpp").read_text()
    assert re.search(rf'^ *// [^\n]*\n *m\.def\(\s*"{op}\(', text, re.MULTILINE), (
        f"{op}: no comment line above its m.def in csrc/schema.cpp"
    )


@pytest.mark.parametrize("op", FORWARD)
def test_public_function(op):
    assert op in ops.__all__, f"{op}: fastlm.ops does not export it"
    assert getattr(ops, op).__module__ == f"fastlm.ops.{family_of(op)}"


@pytest.mark.parametrize("op", FORWARD)
def test_reference(op):
    assert op in reference.__all__, f"{op}: fastlm.reference does not export it"
    assert getattr(reference, op).__module__ == f"fastlm.reference.{family_of(op)}"


@pytest.mark.parametrize("name", [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))])
def test_docstring(name):
    """The sections of the style guide, and a sentence on top."""
    text = getattr(ops, name).__doc__ or ""
    missing = [
        part
        for part in ("Args:", "Returns:", "Raises:", "Source:", "Example:")
        if f"\n    {part}" not in text
    ]
    assert not missing, f"fastlm.ops.{name}: its docstring has no {', '.join(missing)}"
    assert text.split("\n\n")[0].rstrip().endswith("."), f"fastlm.ops.{name}: begin with a sentence"


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize(
    ("piece", "pattern"),
    [
        pytest.param("tests", "tests/ops/test_{}.py", id="tests"),
        pytest.param("bench case", "bench/cases/{}.py", id="bench"),
        pytest.param("docs row", "docs/ops/{}.md", id="docs"),
    ],
)
def test_file_of_the_family_names_it(op, piece, pattern):
    """Tests may also lie in a file of the operator's own name."""
    own = ROOT / pattern.format(op)
    path = own if piece == "tests" and own.is_file() else ROOT / pattern.format(family_of(op))
    assert path.is_file(), f"{op}: no {piece}, {path.relative_to(ROOT)} does not exist"
    assert mentions(path, op), f"{op}: no {piece} in {path.relative_to(ROOT)}"


@pytest.mark.parametrize("op", SCHEMAS)
def test_samples(op):
    """Every dtype, something empty, something strided, every optional tensor."""
    calls = [sample.build() for sample in samples.of(op)]
    inputs = [[t for t in tensors((call.args, call.kwargs)) if t.is_floating_point()] for call in calls]
    wanted = FLOATING
    if not any(inputs):  # an operator on indices
        inputs, wanted = [tensors((call.args, call.kwargs)) for call in calls], INDEX
    dtypes = {t.dtype for found in inputs for t in found}
    assert dtypes >= wanted, f"{op}: no sample with {wanted - dtypes}"
    assert any(t.numel() == 0 for found in inputs for t in found), f"{op}: no sample with a size of 0"
    assert any(not t.is_contiguous() for found in inputs for t in found), f"{op}: no strided sample"
    arguments = SCHEMAS[op].arguments
    given = {name for call in calls for name, a in call.kwargs.items() if a is not None}
    given |= {arguments[i].name for call in calls for i, a in enumerate(call.args) if a is not None}
    given |= set(samples.SET_BY_THE_FUNCTION.get(op, ()))
    missing = [a.name for a in arguments if a.name not in given and a.has_default_value()]
    assert not missing, f"{op}: no sample gives {', '.join(missing)}"


@pytest.mark.parametrize("op", SCHEMAS)
def test_fake_kernel(op):
    """Same shapes, dtypes and strides as the real one on every sample, without a byte of data."""
    overload = getattr(torch.ops.fastlm, op).default
    for sample in samples.of(op):
        call = sample.build()
        real = tensors(overload(*call.args, **call.kwargs))
        with FakeTensorMode() as mode:
            call = sample.build().map(lambda a, m=mode: m.from_tensor(a) if isinstance(a, Tensor) else a)
            fake = tensors(overload(*call.args, **call.kwargs))
        for i, (a, b) in enumerate(zip(fake, real, strict=True)):
            found, expected = describe(a), describe(b)
            assert found == expected, f"{sample}: fake output {i} is {found}, the real one {expected}"


def describe(t: Tensor) -> str:
    strides = t.stride() if t.numel() else "any"
    return f"{t.dtype} {tuple(t.shape)} with strides {strides}"


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradient_is_registered_on_the_operator(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlm::{op}", "Autograd"), (
        f"{op}: {op}_backward exists, but _registration/{family_of(op)}.py lists no gradient"
    )
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlm::{op}_backward", "Autograd")


@pytest.mark.parametrize("op", FUNCTIONAL)
def test_functional_operators_share_no_memory(op):
    """No output lies in an input, and no two outputs overlap."""
    for sample in samples.of(op):
        call = sample.build()
        outputs = tensors(getattr(torch.ops.fastlm, op).default(*call.args, **call.kwargs))
        used = {t.untyped_storage().data_ptr() for t in tensors((call.args, call.kwargs)) if t.numel()}
        for t in outputs:
            pointer = t.untyped_storage().data_ptr()
            assert t.numel() == 0 or pointer not in used, f"{sample}: an output shares memory"
            used.add(pointer)


@pytest.mark.parametrize("op", IN_PLACE)
def test_in_place_operators_return_fresh_tensors(op):
    schema = SCHEMAS[op]
    assert op.endswith(("_update", "_append", "_step")), f"{op}: writes in place, and its name hides it"
    assert all(r.alias_info is None for r in schema.returns), f"{op}: returns an argument"
    for sample in samples.of(op):
        call = sample.build()
        before = {name: t.clone() for name, t in call.floating().items()}
        outputs = tensors(getattr(torch.ops.fastlm, op).default(*call.args, **call.kwargs))
        written = {a.name for a in schema.arguments if a.alias_info}
        arguments = {f"arg{i}": a.name for i, a in enumerate(schema.arguments)}
        for name, t in call.floating().items():
            if arguments.get(name, name) not in written:
                assert torch.equal(t.nan_to_num(), before[name].nan_to_num()), f"{sample}: {name} changed"
            pointer = t.untyped_storage().data_ptr()
            assert all(o.untyped_storage().data_ptr() != pointer or not o.numel() for o in outputs)
