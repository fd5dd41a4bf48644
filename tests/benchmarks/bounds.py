"""The time that the matrix products of a work take, and nothing else.

Measured, not computed: a bound runs the work's products themselves, in its
turn between the sides, with the shapes that the work has and weights of their
own for every layer. So a cache helps the bound as much as the model, and no
more: a single product repeated would find its weights there. Every program
runs with weights as [in, out] and as [out, in], and the faster one counts.
Attention's own products, normalizations and samplers are left out: the bound is
below what can be reached. What they take is measured beside it, by our own
programs with a model so narrow that its other products are almost nothing
(``works.narrow``).
"""

import functools
import time

import jax
import jax.numpy as jnp
from serving import serve

CHUNK = 256  # tokens whose logits exist at once in a fused loss


def layers(shape, rows):
    """List (m, k, n) of the linear maps of all layers, over so many rows."""
    width, inner = shape["width"], shape["mlp_width"]
    heads = shape["heads"] * shape["head_dim"]
    keys = shape["kv_heads"] * shape["head_dim"]
    return shape["layers"] * [
        (rows, width, heads + 2 * keys),
        (rows, heads, width),
        (rows, width, 2 * inner),
        (rows, inner, width),
    ]


def head(shape, rows):
    """List the product with the output head."""
    return [(rows, shape["width"], shape["vocab_size"])]


def backward(products):
    """List the two products of each one's gradient."""
    return [p for m, k, n in products for p in ((m, n, k), (k, m, n))]


def program(products, times=1):
    """Return a function that runs products, and returns its seconds.

    Args:
      products: (m, k, n) each, with operands of their own.
      times: runs of all of them, each after the one before.
    """
    shapes = [((m, k), (k, n), (n, k)) for m, k, n in products]
    draw = functools.partial(jnp.full, fill_value=1e-3, dtype=jnp.float32)

    def once(inputs, weights, contracted, tick):
        for x, w in zip(inputs, weights, strict=True):
            x = x + tick if times > 1 else x
            dims = (((1,), (contracted,)), ((), ()))
            y = jax.lax.dot_general(x, w, dims)
            tick = tick + y[0, 0] * 1e-9
        return tick

    @functools.partial(jax.jit, static_argnums=2)
    def run(inputs, weights, contracted):
        body = functools.partial(once, inputs, weights, contracted)
        if times == 1:
            return body(jnp.zeros(()))
        return jax.lax.fori_loop(0, times, lambda _, t: body(t), jnp.zeros(()))

    inputs = [draw(x) for x, _, _ in shapes]
    ways = [[draw(s[1 + way]) for s in shapes] for way in range(2)]

    def seconds():
        took = []
        for contracted, weights in enumerate(ways):
            start = time.perf_counter()
            jax.block_until_ready(run(inputs, weights, contracted))
            took.append(time.perf_counter() - start)
        return min(took)

    return seconds


def writing(student, rows, prompt, new):
    """Return the bound of a rollout: prefill, then a token at a time."""
    prefill = program(layers(student, rows * prompt) + head(student, rows))
    tokens = program(layers(student, rows) + head(student, rows), new - 1)
    return lambda: prefill() + tokens()


def decode(student, rows, prompt, new):
    """Bound greedy decoding."""
    write = writing(student, rows, prompt, new)
    return lambda: {"seconds": write()}


def step(student, teacher, rows, prompt, new):
    """Bound an OPD step by its phases."""
    every, completions = rows * (prompt + new), rows * new
    write = writing(student, rows, prompt, new)
    read = program(layers(teacher, every) + head(teacher, completions))
    trained = layers(student, every) + head(student, completions)
    learn = program(trained + head(teacher, completions) + backward(trained))

    def run():
        row = {"rollout": write(), "score": read(), "train_step": learn()}
        return {"seconds": sum(row.values())} | row

    return run


def branches(student, teacher, rows, branches, window, trained, **_):
    """Bound what TOPD adds to OPD: the teacher writes, the student may learn.

    Args:
      student: shape.
      teacher: shape.
      rows: of the batch.
      branches: that each row has.
      window: K; the first token of a branch needs no column.
      trained: whether the student learns along the branches.
    """
    count, columns = rows * branches, window - 1
    write = program(layers(teacher, count) + head(teacher, count), columns)
    along = layers(student, count * columns) + head(student, count * window)
    learn = program(along + backward(along))

    def run():
        row = {"score": write()} | ({"train_step": learn()} if trained else {})
        return {"seconds": sum(row.values())} | row

    return run


def loss(rows, tokens, vocab, student, teacher, **_):
    """Bound a fused loss: one chunk's products, times the chunks."""
    own = [(CHUNK, student, vocab)]
    chunk = program([*own, (CHUNK, teacher, vocab), *backward(own)])
    return lambda: {"seconds": chunk() * rows * tokens / CHUNK}


if __name__ == "__main__":
    serve({"decode": decode, "step": step, "branches": branches, "loss": loss})
