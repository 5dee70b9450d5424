"""`fastlm.compat.install`: other projects' import names, while those projects are absent."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastlm.compat
from fastlm.compat._install import SURFACES

PATHS = [
    (project, path) for project, where in SURFACES.items() for path in importlib.import_module(where).MODULES
]


@pytest.fixture(autouse=True)
def _nothing_installed() -> Iterator[None]:
    fastlm.compat.uninstall()
    yield
    fastlm.compat.uninstall()


def needs_absent(*projects: str) -> None:
    """Skips where one of the projects is really there."""
    for project in projects or SURFACES:
        if importlib.util.find_spec(project) is not None:
            pytest.skip(f"{project} is installed here")


# ---- What install makes importable


@pytest.mark.parametrize(("project", "path"), PATHS, ids=[path for _, path in PATHS])
def test_every_path_is_importable_by_itself(project, path):
    needs_absent(project)
    assert fastlm.compat.install(project) == (project,)
    spec = importlib.util.find_spec(path)  # may import the parents
    module = importlib.import_module(path)
    assert module.__name__ == path == spec.name == module.__spec__.name
    assert importlib.util.find_spec(path) is module.__spec__
    implementation = importlib.import_module(SURFACES[project])
    for name in implementation.MODULES[path]:
        assert getattr(module, name) is getattr(implementation, name)
    assert module.__all__ == list(implementation.MODULES[path])
    assert module.__file__ == implementation.__file__


def test_the_import_lines_of_the_contract():
    needs_absent()
    fastlm.compat.install("mamba_ssm", "causal_conv1d", "flash_attn")
    lines = [
        "import mamba_ssm",
        "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref",
        "from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, mamba_inner_ref",
        "from mamba_ssm.ops.triton.selective_state_update import selective_state_update",
        "from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref",
        "from mamba_ssm.modules.mamba_simple import Mamba",
        "from causal_conv1d import causal_conv1d_fn, causal_conv1d_update",
        "from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref",
        "from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states",
        "from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states_ref",
        "from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache",
        "from flash_attn import flash_attn_qkvpacked_func, flash_attn_kvpacked_func",
        "from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func",
        "from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input",
        "from flash_attn.layers.rotary import apply_rotary_emb",
    ]
    exec("\n".join(lines), {})


def test_the_root_knows_its_version_and_the_modules_below_it():
    needs_absent()
    fastlm.compat.install()
    mamba_ssm = importlib.import_module("mamba_ssm")
    assert mamba_ssm.ops.triton.selective_state_update.selective_state_update is not None
    for project in SURFACES:
        version = importlib.import_module(project).__version__
        number, _, label = version.partition("+")
        assert label == "fastlm"
        assert number[0].isdigit()


def test_a_name_that_is_not_offered_points_to_fastlm():
    needs_absent("mamba_ssm")
    fastlm.compat.install("mamba_ssm")
    with pytest.raises(ImportError, match=r"'Mamba2' from 'mamba_ssm' \(.*fastlm"):
        exec("from mamba_ssm import Mamba2", {})
    with pytest.raises(ModuleNotFoundError, match=r"mamba_ssm\.modules\.mamba2"):
        importlib.import_module("mamba_ssm.modules.mamba2")
    assert importlib.util.find_spec("mamba_ssm.modules.mamba2") is None


# ---- The contract of install and uninstall


def test_install_twice_is_install_once():
    needs_absent("flash_attn")
    assert fastlm.compat.install("flash_attn") == ("flash_attn",)
    finders = len(sys.meta_path)
    module = importlib.import_module("flash_attn")
    assert fastlm.compat.install("flash_attn", "flash_attn") == ("flash_attn",)
    assert len(sys.meta_path) == finders
    assert importlib.import_module("flash_attn") is module


def test_no_name_is_all_names():
    needs_absent()
    assert fastlm.compat.install() == tuple(SURFACES)
    assert fastlm.compat.uninstall() == tuple(SURFACES)
    assert fastlm.compat.uninstall() == ()


@pytest.mark.parametrize("function", ["install", "uninstall"])
def test_an_unknown_name_changes_nothing(function):
    before = list(sys.meta_path)
    with pytest.raises(
        ValueError, match=r"names must be among 'mamba_ssm', 'causal_conv1d', .*, got 'xformers'"
    ):
        getattr(fastlm.compat, function)("mamba_ssm", "xformers")
    assert sys.meta_path == before


def test_uninstall_takes_back_what_install_did():
    needs_absent("causal_conv1d", "mamba_ssm")
    fastlm.compat.install("causal_conv1d", "mamba_ssm")
    kept = importlib.import_module("causal_conv1d")
    importlib.import_module("mamba_ssm")
    assert fastlm.compat.uninstall("causal_conv1d") == ("causal_conv1d",)
    assert importlib.util.find_spec("causal_conv1d") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("causal_conv1d.causal_conv1d_interface")
    assert callable(kept.causal_conv1d_fn)  # who has it, keeps it
    assert importlib.util.find_spec("mamba_ssm") is not None


# ---- Real packages


@pytest.fixture
def real_package(tmp_path: Path) -> Iterator[Path]:
    """A folder with a package called causal_conv1d that is not fastlm's."""
    needs_absent("causal_conv1d")
    package = tmp_path / "causal_conv1d"
    package.mkdir()
    (package / "__init__.py").write_text("real = True\n")
    yield tmp_path
    sys.modules.pop("causal_conv1d", None)


def test_a_real_package_is_left_alone_with_a_warning(real_package, monkeypatch):
    monkeypatch.syspath_prepend(str(real_package))
    with pytest.warns(
        UserWarning, match=rf"causal_conv1d is installed already \({real_package}.*stays as it is"
    ):
        assert fastlm.compat.install("causal_conv1d") == ()
    assert importlib.import_module("causal_conv1d").real
    assert fastlm.compat.uninstall("causal_conv1d") == ()
    assert "causal_conv1d" in sys.modules


def test_a_real_package_that_comes_later_still_wins(real_package, monkeypatch):
    fastlm.compat.install("causal_conv1d")
    monkeypatch.syspath_prepend(str(real_package))
    assert importlib.import_module("causal_conv1d").real
    fastlm.compat.uninstall("causal_conv1d")
    assert "causal_conv1d" in sys.modules


def test_a_module_without_a_spec_counts_as_real(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    with pytest.warns(UserWarning, match=r"flash_attn is installed already \(in sys.modules\)"):
        assert fastlm.compat.install("flash_attn") == ()


def test_importing_the_package_is_light():
    code = (
        "import sys, fastlm.compat\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] == 'transformers']\n"
        "heavy += [m for m in sys.modules if m.startswith('fastlm.compat.') and not m.endswith('_install')]\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- Words: argument names, order and defaults are those of the originals

ATTENTION = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
SCAN = "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
INNER = (
    "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, "
    "C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True"
)
STEP = "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False"
CONV_STATES = "initial_states=None, return_final_states=False, final_states_out=None, activation=None"
CONV_UPDATE = "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None"
BOUNDS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
WORDS = {
    "mamba_ssm.selective_scan_fn": SCAN,
    "mamba_ssm.selective_scan_ref": SCAN,
    "mamba_ssm.mamba_inner_fn": f"{INNER}, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, "
    "dt_rms_weight=None, b_c_dt_rms_eps=1e-06",
    "mamba_ssm.mamba_inner_ref": INNER,
    "mamba_ssm.selective_state_update": f"{STEP}, state_batch_indices=None",
    "mamba_ssm.selective_state_update_ref": STEP,
    "mamba_ssm.Mamba": "d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', dt_min=0.001, dt_max=0.1, "
    "dt_init='random', dt_scale=1.0, dt_init_floor=0.0001, conv_bias=True, bias=False, use_fast_path=True, "
    "layer_idx=None, device=None, dtype=None",
    "mamba_ssm.Mamba.forward": "self, hidden_states, inference_params=None",
    "mamba_ssm.Mamba.step": "self, hidden_states, conv_state, ssm_state",
    "mamba_ssm.Mamba.allocate_inference_cache": "self, batch_size, max_seqlen, dtype=None, **kwargs",
    "causal_conv1d.causal_conv1d_fn": f"x, weight, bias=None, seq_idx=None, {CONV_STATES}",
    "causal_conv1d.causal_conv1d_ref": f"x, weight, bias=None, {CONV_STATES}",
    "causal_conv1d.causal_conv1d_update": f"{CONV_UPDATE}, conv_state_indices=None",
    "causal_conv1d.causal_conv1d_update_ref": CONV_UPDATE,
    "causal_conv1d.causal_conv1d_varlen_states": "x, cu_seqlens, state_len",
    "causal_conv1d.causal_conv1d_varlen_states_ref": "x, cu_seqlens, state_len",
    "flash_attn.flash_attn_func": f"q, k, v, {ATTENTION}",
    "flash_attn.flash_attn_kvpacked_func": f"q, kv, {ATTENTION}",
    "flash_attn.flash_attn_qkvpacked_func": f"qkv, {ATTENTION}",
    "flash_attn.flash_attn_varlen_func": f"q, k, v, {BOUNDS}, {ATTENTION}, block_table=None",
    "flash_attn.flash_attn_varlen_kvpacked_func": f"q, kv, {BOUNDS}, {ATTENTION}",
    "flash_attn.flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {ATTENTION}",
    "flash_attn.flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
    "flash_attn.index_first_axis": "input, indices",
    "flash_attn.index_put_first_axis": "values, indices, first_axis_dim",
    "flash_attn.pad_input": "hidden_states, indices, batch, seqlen",
    "flash_attn.unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "flash_attn.apply_rotary_emb": "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, "
    "cu_seqlens=None, max_seqlen=None",
}


@pytest.mark.parametrize("name", WORDS)
def test_signatures_are_those_of_the_originals(name):
    project, *path = name.split(".")
    found = importlib.import_module(SURFACES[project])
    for part in path:
        found = getattr(found, part)
    bare = [
        p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(found).parameters.values()
    ]
    assert ", ".join(map(str, bare)) == WORDS[name]


def test_every_function_that_is_offered_has_its_words_above():
    offered = {
        f"{project}.{name}"
        for project, where in SURFACES.items()
        for names in importlib.import_module(where).MODULES.values()
        for name in names
    }
    assert offered <= set(WORDS)


@pytest.mark.parametrize("name", ["fastlm.compat._install", "fastlm.compat.mamba_ssm.mamba"])
def test_examples_run(name):
    needs_absent("causal_conv1d")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
