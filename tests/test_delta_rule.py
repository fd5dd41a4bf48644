"""The gated delta rule: chunks against one step after another."""

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.models import delta_rule
from topd_jax.models.delta_rule import Inputs, read_chunks, read_step

# Several chunks, of which the last one is filled up.
CHUNK = 4


def inputs(rows=2, length=21, heads=2, key=4, value=6, starts=()):
    rng = np.random.default_rng(0)

    def draw(*shape):
        x = rng.normal(size=(rows, length, heads, *shape))
        return x.astype(np.float32)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    age = np.tile(1 + np.arange(length), (rows, 1))
    for row, column in starts:
        age[row, column:] = np.arange(length - column)
    arrays = (
        unit(draw(key)), unit(draw(key)), draw(value), -np.exp(draw()),
        1 / (1 + np.exp(draw())), age.astype(np.int32),
    )  # fmt: skip
    return Inputs(*map(jnp.asarray, arrays))


@jax.jit
def one_by_one(x, state):
    """The oracle: outputs, and the state after every token."""

    def read(state, token):
        state = jnp.where(token.age[:, None, None, None] == 0, 0, state)
        out, state = read_step(token, state)
        return state, (out, state)

    tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), x)
    _, written = jax.lax.scan(read, state, tokens)
    return [jnp.swapaxes(a, 0, 1) for a in written]


def test_a_key_that_comes_again_and_again_is_corrected():
    """Every token overwrites the one before: no sum over paths cancels."""
    x = inputs(length=64)
    same = jnp.broadcast_to(x.key[:, :1], x.key.shape)
    x = x._replace(
        key=same, rate=jnp.ones_like(x.rate),
        log_decay=jnp.zeros_like(x.log_decay),
    )  # fmt: skip
    outs, states = one_by_one(x, jnp.zeros((2, 2, 4, 6)))
    out, last = jax.jit(read_chunks)(x, jnp.zeros((2, 2, 4, 6)))
    np.testing.assert_allclose(out, outs, atol=1e-5)
    np.testing.assert_allclose(last, states[:, -1], atol=1e-5)


def test_all_is_float32_where_float64_is_allowed():
    with jax.enable_x64(True):
        out, state = jax.eval_shape(
            read_chunks, inputs(), jnp.zeros((2, 2, 4, 6), jnp.float32)
        )
    assert out.dtype == state.dtype == jnp.float32


def test_chunks_are_steps(monkeypatch):
    """Outputs, final state and gradients, with segments that begin anywhere."""
    monkeypatch.setattr(delta_rule, "_CHUNK", CHUNK)
    x = inputs(starts=[(0, 4), (0, 6), (1, 0), (1, 19)])
    state = jax.random.normal(jax.random.key(1), (2, 2, 4, 6))
    weight = jax.random.normal(jax.random.key(2), (2, 21, 2, 6))

    def loss(read):
        def of(floats, state):
            out, last = read(Inputs(*floats, x.age), state)
            return jnp.sum(out * weight) + jnp.sum(last), (out, last)

        return jax.jit(jax.grad(of, (0, 1), has_aux=True))(x[:-1], state)

    def steps(x, state):
        out, states = one_by_one(x, state)
        return out, states[:, -1]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        loss(read_chunks), loss(steps),
    )  # fmt: skip


def test_states_where_branches_leave(monkeypatch):
    monkeypatch.setattr(delta_rule, "_CHUNK", CHUNK)
    x = inputs()
    state = jnp.zeros((2, 2, 4, 6))
    leaves = jnp.asarray([[1, 4, 5, 21], [8, 8, 2, 20]])
    _, got = jax.jit(read_chunks)(x, state, leaves)
    _, states = one_by_one(x, state)
    want = states[jnp.arange(2)[:, None], leaves - 1]
    np.testing.assert_allclose(got, want, atol=1e-5)
