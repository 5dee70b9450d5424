"""Schema, stub, public function and reference of an operator must not drift apart."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

from fastlm import _ops, ops, reference
from tests.support import samples

ROOT = Path(__file__).parent.parent


def _load_tool():
    spec = importlib.util.spec_from_file_location("ops_stub", ROOT / "tools" / "ops_stub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ops_stub = _load_tool()
SCHEMAS = {schema.name.removeprefix("fastlm::"): schema for schema in ops_stub.schemas()}
FORWARD = [name for name in SCHEMAS if not name.endswith("_backward")]


def parameters(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_the_stub_is_what_the_schemas_say():
    assert ops_stub.STUB.read_text() == ops_stub.stub_text(), "run python tools/ops_stub.py"


def test_words_are_quoted_as_the_formatter_quotes_them():
    assert '    activation: str = "silu",\n' in ops_stub.stub_text()


def test_the_stub_names_what_is_written_in_place():
    text = ops_stub.stub_text()
    assert "    conv_state: Tensor,  # written in place\n" in text
    assert "    x: Tensor,\n" in text


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_operator_is_bound(name):
    assert getattr(_ops, name) is getattr(torch.ops.fastlm, name).default


def test_nothing_else_is_bound():
    bound = {name for name, value in vars(_ops).items() if isinstance(value, torch._ops.OpOverload)}
    assert bound == set(SCHEMAS)


@pytest.mark.parametrize("name", FORWARD)
def test_the_public_function_takes_what_the_operator_takes(name):
    """Same names; same order of what both take by position; same defaults."""
    public = parameters(getattr(ops, name))
    hidden = samples.SET_BY_THE_FUNCTION.get(name, ())
    schema = {argument.name: argument for argument in SCHEMAS[name].arguments if argument.name not in hidden}
    missing = [argument for argument in schema if argument not in public]
    assert not missing, f"{name}: the public function lacks {missing}"

    by_position = [
        n for n, p in public.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and n in schema
    ]
    order = [n for n in schema if n in by_position]
    assert by_position == order, f"{name}: positional arguments must stand in the order {order}"

    for argument_name, argument in schema.items():
        default = public[argument_name].default
        if not argument.has_default_value():
            assert default is inspect.Parameter.empty, f"{name}: {argument_name} must have no default"
            continue
        expected = argument.default_value
        expected = tuple(expected) if isinstance(expected, list) else expected
        assert default == expected, f"{name}: {argument_name} must default to {expected!r}, got {default!r}"


@pytest.mark.parametrize("name", ops.__all__)
def test_the_reference_has_the_public_signature(name):
    public, defined = parameters(getattr(ops, name)), parameters(getattr(reference, name))
    assert list(defined) == list(public)
    for parameter, theirs in public.items():
        ours = defined[parameter]
        assert ours.kind == theirs.kind, f"{name}: {parameter} must be {theirs.kind.description}"
        assert ours.default == theirs.default, f"{name}: {parameter} must default to {theirs.default!r}"


def test_the_reference_defines_nothing_else():
    assert sorted(reference.__all__) == sorted(ops.__all__)
