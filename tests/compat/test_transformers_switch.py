"""Enabling and disabling: everything comes back, nothing is done twice, and what is missing is named."""

from __future__ import annotations

import sys

import pytest
import torch

from fastlm.compat.transformers import _names, disable, enable


@pytest.fixture(autouse=True)
def _disabled_afterwards():
    yield
    disable()


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"fastlm.compat.transformers needs transformers 5: pip install 'fastlm\[hf\]'"
    ):
        enable()
    assert disable() == ()


@pytest.mark.parametrize("function", [enable, disable])
def test_unknown_parts(function):
    with pytest.raises(
        ValueError,
        match=rf"{function.__name__}: parts must be among 'mamba', 'attention', 'experts', 'router', got 'moe'",
    ):
        function("mamba", "moe")


class TestWithTransformers:
    """Needs the extra."""

    @pytest.fixture(autouse=True)
    def _transformers(self):
        self.models = pytest.importorskip(
            "tests.compat.transformers_models", reason="needs the extra fastlm[hf]"
        )

    def test_what_was_enabled_is_returned(self):
        assert enable() == ("mamba", "attention", "experts", "router")
        assert enable("attention") == ("attention",)
        assert disable("mamba", "mamba") == ("mamba",)
        assert disable("experts") == ("experts",)
        assert disable() == ("attention", "router")
        assert disable() == ()
        assert enable("mamba") == ("mamba",)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["jamba moe", "phimoe"])
    def test_everything_comes_back(self, name):
        changed = [_names.find(name) for name in (*mamba().MIXERS, router().ROUTER, router().BLOCK)]
        interfaces = [_names.find(name) for name in (*attention().INTERFACES, *experts().INTERFACES)]
        forwards = [vars(module)["forward"] for module in changed]
        mappings = [dict(interface._global_mapping) for interface in interfaces]
        model, ids = self.models.make_model(name), self.models.random_ids(2, 9)
        before = model(ids).logits
        for _ in range(2):
            enable()
        assert not any(
            vars(module)["forward"] is forward for module, forward in zip(changed, forwards, strict=True)
        )
        model.set_attn_implementation("fastlm")
        model.set_experts_implementation("fastlm")
        between = model(ids).logits
        assert not torch.equal(between, before)
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
        disable()
        assert [vars(module)["forward"] for module in changed] == forwards
        assert [interface._global_mapping for interface in interfaces] == mappings
        assert torch.equal(model(ids).logits, before)

    @pytest.mark.parametrize("part", ["attention", "experts"])
    def test_a_name_that_was_taken_is_given_back(self, part):
        module, ours = {
            "attention": (attention(), attention().attend),
            "experts": (experts(), experts().experts_forward),
        }[part]
        interface = _names.find(module.INTERFACES[0])

        def theirs() -> None:
            pass

        interface.register("fastlm", theirs)
        try:
            enable(part)
            assert interface._global_mapping["fastlm"] is ours
            disable()
            assert interface._global_mapping["fastlm"] is theirs
        finally:
            del interface._global_mapping["fastlm"]

    def test_models_made_later_follow(self):
        enable()
        model = self.models.make_model("mixtral")
        model.set_attn_implementation("fastlm")
        model.set_experts_implementation("fastlm")
        assert model(self.models.random_ids(1, 5)).logits.isfinite().all()

    def test_a_missing_name_changes_nothing(self, monkeypatch):
        mixer = _names.find(mamba().MIXERS[0])
        before = mixer.forward
        monkeypatch.setitem(attention().FUNCTIONS, "transformers.masking_utils:no_such_function", ())
        with pytest.raises(RuntimeError) as error:
            enable()
        text = str(error.value)
        assert "has no transformers.masking_utils.no_such_function" in text
        assert "Tested with transformers 5.24.0; install one of these." in text
        assert mixer.forward is before

    def test_a_missing_parameter_is_named(self):
        name = "transformers.masking_utils:and_masks"
        with pytest.raises(RuntimeError, match=r"has no parameter 'other' in and_masks\('mask_functions',\)"):
            _names.find_function(name, ("other",))


def mamba():
    from fastlm.compat.transformers import mamba

    return mamba


def attention():
    from fastlm.compat.transformers import attention

    return attention


def experts():
    from fastlm.compat.transformers import experts

    return experts


def router():
    from fastlm.compat.transformers import router

    return router
