"""Cross-entropy on written solutions: how the tiny world's models begin.

Stage 1 on a teacher's rollouts is not here but in :mod:`topd_jax.training.step`
(``objective.stage = "offline"``); this is plain next-token training of a
model from scratch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from topd_jax.losses.divergences import weighted_mean
from topd_jax.losses.fused import fused_token_logprobs
from topd_jax.models.decoder import causal_mask


def next_token_loss(
    model: Any, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """Mean cross-entropy of the tokens that the mask names.

    Args:
      model: the model.
      tokens: i32[B, L], padded on the right.
      mask: bool[B, L] which tokens are targets.

    Returns:
      f32[], nats a token.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # Padding on the right is never attended to by what precedes it.
    visible = causal_mask(jnp.ones(tokens.shape, bool))
    hidden, _ = model(tokens, positions, visible)
    logp = fused_token_logprobs(hidden[:, :-1], model.head, tokens[:, 1:])
    return weighted_mean(-logp, mask=mask[:, 1:])


def fit(
    model: Any,
    batch: Callable[[int], tuple[np.ndarray, np.ndarray]],
    *,
    steps: int,
    learning_rate: float,
    name: str,
) -> Any:
    """Trains a model by cross-entropy.

    Args:
      model: the start; donated.
      batch: step -> (tokens i32[B, L], mask bool[B, L]).
      steps: updates.
      learning_rate: peak; 5 % linear warm-up, then cosine to a hundredth.
      name: what the progress bar says.

    Returns:
      The trained model.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(steps // 20, 1), steps, learning_rate / 100
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step_fn(
        model: Any, opt_state: Any, tokens: jax.Array, mask: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(next_token_loss)(model, tokens, mask)
        updates, opt_state = optimizer.update(grads, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, loss

    opt_state = optimizer.init(model)
    bar = tqdm(range(steps), desc=name, unit="step", mininterval=2.0)
    for step in bar:
        model, opt_state, loss = step_fn(model, opt_state, *batch(step))
        if step % 100 == 99 or step == steps - 1:
            bar.set_postfix(loss=f"{float(loss):.4f}")
    return model
