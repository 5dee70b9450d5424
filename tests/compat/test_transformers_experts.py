"""`experts_implementation="fastlm"`: mixtures of transformers give what their eager loop over experts gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

transformers = pytest.importorskip("transformers", minversion="5.24", reason="needs the extra fastlm[hf]")

from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations.moe import use_experts_implementation  # noqa: E402

from fastlm.compat.transformers import disable, enable  # noqa: E402
from fastlm.compat.transformers import experts as part  # noqa: E402
from fastlm.compat.transformers._names import find, find_function  # noqa: E402
from tests.compat.transformers_models import (  # noqa: E402
    MOE,
    Choices,
    assert_all_close,
    generated,
    in_double,
    left_padding,
    make_model,
    one_thread,
    random_ids,
    results_of,
    side_by_side,
)

every_model = pytest.mark.parametrize("name", MOE)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Models with a gate or an activation that the operator does not have.
COMPOSED = ("gpt_oss", "mixtral gelu")


@pytest.fixture(autouse=True)
def _enabled():
    enable("experts")
    with one_thread():
        yield
    disable()


def on_fastlm(model):
    model.set_experts_implementation("fastlm")
    return model


def training(name, dtype=torch.float32):
    """In training mode, but for PhiMoE, whose router then draws its experts: `test_transformers_router.py`."""
    model = make_model(name, dtype)
    return model if name == "phimoe" else model.train()


def copied(results):
    return {name: value.clone() for name, value in results.items()}


def on_batches(model, **arguments):
    """Results of three batches."""
    return side_by_side(results_of(model, random_ids(2, 13, seed), **arguments) for seed in (1, 2, 3))


# ---- Models: training


@both_dtypes
@every_model
def test_logits_loss_and_gradients(name, dtype):
    model, choices = training(name, dtype), Choices()
    with choices.recorded():
        exact = on_batches(in_double(model))
    with choices.repeated():
        plain = on_batches(model)
    with choices.repeated():
        actual = on_batches(on_fastlm(model))
    assert_all_close(actual, exact, plain, dtype)
    for part_of_it in ("down_proj", "router", "gate.weight"):
        assert all(value.any() for key, value in actual.items() if part_of_it in key), part_of_it


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss", "gemma4", "nemotron_h"])
def test_autocast(name):
    model, choices = training(name), Choices()
    with choices.recorded():
        exact = on_batches(in_double(model))
    with torch.autocast("cpu", torch.bfloat16):
        with choices.repeated():
            plain = on_batches(model)
        with choices.repeated():
            actual = on_batches(on_fastlm(model))
    assert_all_close(actual, exact, plain, torch.bfloat16)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_padded_training(name):
    """Padding in front is as if each row were alone."""
    model, ids = training(name), random_ids(3, 19)
    mask = left_padding(ids, 9, 2, 0)
    real = mask.bool()

    def results(model, rows):
        model.zero_grad()
        logits = torch.cat(rows(model))
        (logits.double() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}

    def alone(model):
        return [model(ids[i : i + 1, real[i]], use_cache=False).logits[0] for i in range(3)]

    def together(model):
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        return [logits[i, real[i]] for i in range(3)]

    exact, plain = results(in_double(model), alone), results(model, alone)
    assert_all_close(results(on_fastlm(model), together), exact, plain, torch.float32)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_router_losses(name):
    """The balance loss that transformers adds sees the same logits."""
    model, more = training(name), {"output_router_logits": True}
    exact, plain = on_batches(in_double(model), **more), on_batches(model, **more)
    assert_all_close(on_batches(on_fastlm(model), **more), exact, plain, torch.float32)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing_gives_the_same_bits(name):
    model, ids = on_fastlm(training(name)), random_ids(2, 19)
    expected = copied(results_of(model, ids))
    model.activation_checkpointing_enable()
    for key, value in results_of(model, ids).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_compiled_in_one_graph(name):
    model, ids = on_fastlm(training(name)), random_ids(2, 11)
    expected = copied(results_of(model, ids))
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for key, value in results_of(model, ids).items():
        assert_close(value, expected[key], msg=key)


@torch.no_grad()
@pytest.mark.parametrize(("name", "operator"), [("mixtral", "moe_experts"), ("gpt_oss", "grouped_gemm")])
def test_exported_program_holds_the_operators(name, operator):
    model, ids = on_fastlm(make_model(name)), random_ids(2, 11)
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    called = [str(node.target) for node in program.graph.nodes]
    assert f"fastlm.{operator}.default" in called
    assert_close(program.module()(ids, use_cache=False).logits, model(ids).logits)


@torch.no_grad()
@every_model
def test_no_loop_of_transformers_runs(name, monkeypatch):
    """One call of the operator per layer where gate and activation are its own, two products elsewhere."""
    calls = []
    for operator in ("moe_experts", "grouped_gemm"):
        real = getattr(part.ops, operator)
        monkeypatch.setattr(
            part.ops, operator, lambda *a, _n=operator, _r=real, **k: (calls.append(_n), _r(*a, **k))[1]
        )
    model = on_fastlm(make_model(name))
    layers = sum(hasattr(module, "has_post_expert_norm") for module in model.modules())
    model(random_ids(1, 5))
    biased = 2 if name == "gpt_oss" else 1
    assert calls == (["grouped_gemm"] * 2 * biased if name in COMPOSED else ["moe_experts"]) * layers


# ---- Models: generation and files


@every_model
def test_generated_tokens(name):
    model, ids = make_model(name), random_ids(2, 4)
    expected = generated(model, ids)
    assert torch.equal(generated(on_fastlm(model), ids), expected)


@pytest.mark.parametrize("name", ["mixtral", "phimoe", "deepseek_v3", "gpt_oss"])
def test_left_padded_generation(name):
    model, ids = make_model(name), random_ids(3, 9)
    mask = left_padding(ids, 7, 2, 0)
    expected = generated(model, ids, attention_mask=mask)
    assert torch.equal(generated(on_fastlm(model), ids, attention_mask=mask), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_saved_and_loaded(name, tmp_path):
    """Files do not know who computes; a model may be loaded right onto fastlm."""
    model, ids = on_fastlm(make_model(name)), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    assert "fastlm" not in (tmp_path / "config.json").read_text()
    arguments = {"attn_implementation": "eager"}
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="fastlm", **arguments)
    assert loaded.config._experts_implementation == "fastlm"
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    theirs = type(model).from_pretrained(tmp_path, experts_implementation="eager", **arguments)
    model.set_experts_implementation("eager")
    assert torch.equal(theirs(ids).logits, model(ids).logits)


def test_the_name_is_known_only_while_enabled():
    model = make_model("mixtral")
    disable("experts")
    with pytest.raises(ValueError, match='experts_implementation="fastlm"` is not supported'):
        on_fastlm(model)
    enable("experts")
    on_fastlm(model)
    disable("experts")
    with pytest.raises(KeyError, match="fastlm"):
        model(random_ids(1, 5))


# ---- Modules: everything that the decorator may say


def make_experts(activation="silu", normed=False, **traits) -> nn.Module:
    """Experts with the given traits, and a plain loop over them as their eager form."""

    class Experts(nn.Module):
        num_experts = 5

        def __init__(self, config):
            super().__init__()
            gated, transposed = traits.get("has_gate", True), traits.get("is_transposed", False)
            up = (self.num_experts, 7 * (1 + gated), 6)
            down = (self.num_experts, 6, 7)
            name = "gate_up_proj" if gated else "up_proj"
            for key, shape in ((name, up), ("down_proj", down)):
                weight = torch.randn(shape) / shape[-1] ** 0.5
                setattr(
                    self, key, nn.Parameter(weight.transpose(1, 2).contiguous() if transposed else weight)
                )
                if traits.get("has_bias"):
                    setattr(self, f"{key}_bias", nn.Parameter(torch.randn(shape[:2])))
            self.act_fn = ACT2FN[activation]
            if normed:
                self.post_expert_norm = nn.LayerNorm(6)
                nn.init.normal_(self.post_expert_norm.bias)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            def linear(x, name, e):
                weight = getattr(self, name)[e]
                x = x @ (weight if self.is_transposed else weight.T)
                return x + getattr(self, f"{name}_bias")[e] if self.has_bias else x

            out = torch.zeros_like(hidden_states)
            for e in range(self.num_experts):
                token, pick = torch.where(top_k_index == e)
                x = linear(hidden_states[token], "gate_up_proj" if self.has_gate else "up_proj", e)
                x = linear(self._apply_gate(x) if self.has_gate else self.act_fn(x), "down_proj", e)
                x = self.post_expert_norm(x) if normed else x
                out.index_add_(0, token, (x * top_k_weights[token, pick, None]).to(out.dtype))
            return out

    decorated = use_experts_implementation(has_post_expert_norm=normed, **traits)(Experts)
    torch.manual_seed(0)
    return decorated(transformers.PretrainedConfig(experts_implementation="eager"))


def inputs(k=2, tokens=23, experts=5, seed=2):
    """Hidden states, distinct experts for each token while there are so many, and weights."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, max(experts, k), generator=generator)
    x = torch.randn(tokens, 6, generator=generator)
    return x, scores.topk(k).indices % experts, torch.rand(tokens, k, generator=generator)


def gradients_of(module, implementation, x, ids, weights) -> dict[str, Tensor]:
    """Output, and the gradient of input, weights and parameters."""
    module.config._experts_implementation = implementation
    module.zero_grad()
    x, weights = (t.detach().requires_grad_() for t in (x, weights))
    out = module(x, ids, weights)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    gradients = {f"d{name}": p.grad for name, p in module.named_parameters()}
    return {"out": out.detach(), "dx": x.grad, "dweights": weights.grad} | gradients


def assert_like_eager(module, dtype, *calls):
    """On three inputs by default."""
    calls = calls or [inputs(seed=seed) for seed in (2, 3, 4)]
    module = module.to(dtype)

    def results(module, implementation, dtype):
        cast = [(x.to(dtype), ids, weights.to(dtype)) for x, ids, weights in rounded]
        return side_by_side(gradients_of(module, implementation, *call) for call in cast)

    rounded = [(x.to(dtype), ids, weights.to(dtype)) for x, ids, weights in calls]
    exact = results(copy.deepcopy(module).double(), "eager", torch.float64)
    plain = results(module, "eager", dtype)
    assert_all_close(results(module, "fastlm", dtype), exact, plain, dtype)


TRAITS = {
    "gate": {},
    "no gate": {"has_gate": False},
    "bias": {"has_bias": True},
    "no gate, bias": {"has_gate": False, "has_bias": True},
    "transposed": {"is_transposed": True},
    "transposed, bias": {"is_transposed": True, "has_bias": True},
    "transposed, no gate, bias": {"is_transposed": True, "has_gate": False, "has_bias": True},
    "norm": {"normed": True},
    "norm, bias, transposed": {"normed": True, "has_bias": True, "is_transposed": True},
}


@both_dtypes
@pytest.mark.parametrize("activation", ["silu", "relu2", "mish"])
@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
def test_traits(traits, activation, dtype):
    assert_like_eager(make_experts(activation, **traits), dtype)


@pytest.mark.parametrize("name", ["swish", "silu", "relu", "relu2", "gelu_pytorch_tanh", "gelu_new"])
def test_activations_of_the_operator(name):
    module = make_experts(name)
    assert part._fused_activation(module) is not None
    assert_like_eager(module, torch.float32)


@pytest.mark.parametrize("name", ["gelu", "gelu_fast", "quick_gelu", "sigmoid", "prelu"])
def test_other_activations(name):
    module = make_experts(name)
    assert part._fused_activation(module) is None
    assert_like_eager(module, torch.float32)


@pytest.mark.parametrize("activation", ["silu", "mish"])
@pytest.mark.parametrize("k", [1, 5, 8, 9, 10, 17])
def test_any_number_of_picks(k, activation):
    assert_like_eager(make_experts(activation, has_bias=True), torch.float32, inputs(k))


@pytest.mark.parametrize("traits", [{}, {"activation": "mish"}, {"normed": True, "has_bias": True}])
def test_experts_of_other_processes_add_nothing(traits):
    """Their marks are `num_experts`, with whatever weight; no gradient comes back for that."""
    x, ids, weights = inputs(3)
    ids[::2, 1] = 5
    ids[4] = 5
    module = make_experts(**traits)
    assert_like_eager(module, torch.float32, (x, ids, weights))
    results = gradients_of(module, "fastlm", x, ids, weights)
    assert not results["out"][4].any()
    assert not results["dweights"][ids == 5].any()
    assert results["dweights"][ids < 5].all()


@pytest.mark.parametrize("traits", [{}, {"activation": "mish"}])
def test_no_tokens(traits):
    x, ids, weights = (t[:0] for t in inputs())
    results = gradients_of(make_experts(**traits), "fastlm", x, ids, weights)
    assert results["out"].shape == (0, 6)
    assert not results["ddown_proj"].any()


@pytest.mark.parametrize("traits", [{}, {"activation": "mish", "has_bias": True}])
def test_hidden_states_of_another_dtype(traits):
    """They are cast to the dtype of the weights, and the result back."""
    module, (x, ids, weights) = make_experts(**traits), inputs()
    module.config._experts_implementation = "fastlm"
    wide = module.bfloat16()(x, ids, weights)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), module(x.bfloat16(), ids, weights))
    assert module.double()(x, ids, weights).dtype == torch.float32


@both_dtypes
def test_a_norm_behind_each_expert(dtype):
    modeling = transformers.models.muse_spark.modeling_muse_spark
    config = modeling.MuseSparkTextConfig(
        num_local_experts=5, moe_hidden_size=6, moe_intermediate_size=7, experts_implementation="eager"
    )
    module = modeling.MuseSparkExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    assert_like_eager(module, dtype)


def test_gate_and_up_interleaved_without_a_gate_of_its_own():
    """The decorator's default gate halves the columns, whatever the layout says: so does every implementation."""
    module = make_experts(is_concatenated=False)
    assert part._fused_activation(module) is None
    assert_like_eager(module, torch.float32)


# ---- Errors


def test_what_the_operators_do_not_have():
    module, (x, ids, weights) = make_experts(), inputs()
    module.config._experts_implementation = "fastlm"
    with pytest.raises(ValueError, match=r"got \(1, 23, 6\) and \(23, 2\)\. Use another implementation"):
        module(x[None], ids, weights)
    with pytest.raises(ValueError, match=r"got \(23, 6\) and \(22, 2\)"):
        module(x, ids[1:], weights)
    with pytest.raises(
        ValueError, match=r"expert_mask is not supported.*set_experts_implementation\('eager'\)"
    ):
        module(x, ids, weights, expert_mask=None)
    module.down_proj = nn.Parameter(torch.zeros(5, 6, 7, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"down_proj of Experts must be a tensor.*got torch\.uint8\. Use"):
        module(x, ids, weights)


# ---- What is used of transformers


@pytest.mark.parametrize("function", part.FUNCTIONS)
def test_transformers_has_the_names(function):
    find_function(function, part.FUNCTIONS[function])


@pytest.mark.parametrize("activation", part.ACTIVATIONS)
def test_activations_compute_what_their_name_says(activation):
    plain = {
        "silu": nn.functional.silu,
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x).square(),
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    }
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert_close(find(activation)()(x), plain[part.ACTIVATIONS[activation]](x))
