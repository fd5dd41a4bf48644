"""Programs lowered for CUDA, and cuDNN's attention; no GPU has run them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VOCAB, make_trajectories
from small_files import make
from small_step import whole_step

from topd_jax.cli.doctor import fit
from topd_jax.cli.doctor import kernels as doctor
from topd_jax.models import DecoderConfig
from topd_jax.models.attention import core, cudnn
from topd_jax.models.attention.masks import causal_intervals

CONFIG = DecoderConfig(
    vocab_size=VOCAB, layers=2, width=32, heads=4, kv_heads=2, head_dim=16,
    mlp_width=32, experts=4, experts_per_token=2, expert_width=16,
    window=60, sliding=(True, False), attention="flash", dtype="bfloat16",
)  # fmt: skip


@pytest.fixture
def with_cudnn(monkeypatch):
    """Has a process without a GPU trace for one with cuDNN 9.10."""
    internals = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")

    class Versions:
        def cudnn_get_version():
            return 91000

    monkeypatch.setattr(internals, "cuda_versions", Versions)
    monkeypatch.setattr(cudnn, "is_there", lambda: True)
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_a_step_for_cuda_has_attention_of_cudnn_and_no_tpu_kernel(with_cudnn):
    """A TOPD step of a mixture, rows of 128 tokens."""
    model = make(CONFIG)
    rows = make_trajectories(rows=2, prompt=20, completion=108)
    goal = "topd(context='teacher', candidates=3, window=4)"
    trace = whole_step.trace(model, model, rows, goal)
    text = trace.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
    assert "tpu_custom_call" not in text


def test_dot_product_attention_is_attention_of_all_scores():
    """Of 4 heads, 2 of keys, in 2 left-padded rows."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 139, 4, 16))
    arrays = [query, *rng.normal(size=(2, 2, 2, 141, 16))]
    arrays = [jnp.asarray(x, "float32") for x in arrays]
    mask = causal_intervals(jnp.arange(139) >= jnp.array([[0], [7]]))
    mask = mask.widen(141).dense()[:, None]
    real = mask.any(-1)[:, 0, :, None, None]  # padding attends to nothing

    def gradients(read):
        def loss(*x):
            out = read(*x)
            return jnp.sum(jnp.where(real, out, 0) ** 2), out

        learn = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
        slopes, out = learn(*arrays)
        return [jnp.where(real, out, 0), *slopes]

    got = gradients(
        lambda *x: cudnn.attend(*x, mask, 0.3, implementation="xla")
    )
    config = CONFIG.replace(query_scalar=1 / 0.09)
    want = gradients(lambda *x: core._attend(*x, mask, config))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "size", "cap"),
    [
        ("float32", 16, None),
        ("bfloat16", 136, None),
        ("bfloat16", 12, None),
        ("bfloat16", 16, 5.0),
    ],
)
def test_what_cudnn_does_not_take(monkeypatch, dtype, size, cap):
    query = jax.ShapeDtypeStruct((2, 140, 4, size), dtype)
    fine = jax.ShapeDtypeStruct((2, 140, 4, 16), "bfloat16")
    assert not cudnn.takes(fine, None)  # no GPU is here
    monkeypatch.setattr(cudnn, "is_there", lambda: True)
    assert cudnn.takes(fine, None) and not cudnn.takes(query, cap)


@pytest.fixture
def on_gpu(monkeypatch):
    """Has the preflight see a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "is_there", lambda: True)


def attention_of(config):
    """The preflight's finding about a student."""
    model = types.SimpleNamespace(config=config)
    (found,) = doctor.kernels({"student": model})
    return found


def test_the_preflight_compares_what_a_gpu_takes(on_gpu, monkeypatch):
    """XLA takes cuDNN's place, and makes its values a fifth too large."""
    blocks = attention_of(CONFIG.replace(dtype="float32"))
    assert blocks.level == "ok" and "in blocks of queries" in blocks.text
    plain = cudnn.attend

    def broken(*args):
        return plain(*args, implementation="xla") * 1.2

    monkeypatch.setattr(cudnn, "attend", broken)
    found = attention_of(CONFIG)
    assert found.level == "error" and "are 0.2" in found.text


def test_the_preflight_names_the_flag_of_repeatable_runs(on_gpu, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    (found,) = fit.repeatable(None)
    assert found.level == "warning"
    monkeypatch.setenv(
        "XLA_FLAGS", found.way_out.removeprefix("export XLA_FLAGS=")
    )
    assert [f.level for f in fit.repeatable(None)] == ["ok"]
    monkeypatch.undo()
    assert [*fit.repeatable(None)] == []
