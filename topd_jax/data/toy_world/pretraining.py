"""Next-token training of the tiny world's models from scratch.

A corpus is tokenized once, and a batch is a pure function of (seed, step).
Stage 1 on a teacher's solutions is not here but in
:mod:`topd_jax.training.sft`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from topd_jax.data.tokenizers import Tokenizer
from topd_jax.losses.divergences import weighted_mean
from topd_jax.losses.fused import fused_token_logprobs
from topd_jax.models.attention.masks import causal_mask


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Prompts with written completions, padded on the right.

    Attributes:
      tokens: i32[N, L] prompt, completion, end of sequence, padding.
      prompt_length: i32[N] tokens of each prompt.
      length: i32[N] tokens of each row, the end of sequence included.
    """

    tokens: np.ndarray
    prompt_length: np.ndarray
    length: np.ndarray

    def batch(
        self, step: int, *, batch_size: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the batch of a step.

        An epoch takes no row twice, and each is shuffled anew; rows that fill
        no batch are left to other epochs.

        Args:
          step: from 0.
          batch_size: B.
          seed: of the order of the rows.

        Returns:
          tokens i32[B, L], and mask bool[B, L]: the targets, which are
          completions and their ends of sequence.

        Raises:
          ValueError: if the corpus does not fill one batch.
        """
        count = len(self.tokens)
        if not 1 <= batch_size <= count:
            raise ValueError(
                f"batch_size={batch_size} must be in 1..{count}, the number "
                "of rows in the corpus; change world.batch_size or "
                "world.solutions"
            )
        epoch, slot = divmod(step, count // batch_size)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        rows = order[slot * batch_size : (slot + 1) * batch_size]
        column = np.arange(self.tokens.shape[1])
        begin, end = self.prompt_length[rows], self.length[rows]
        mask = (column >= begin[:, None]) & (column < end[:, None])
        return self.tokens[rows], mask

    def by_length(self, groups: int) -> list["Corpus"]:
        """Split the rows into equal groups of similar lengths.

        Half of a batch of mixed lengths would be padding.

        Args:
          groups: how many; the last ``N % groups`` rows are dropped.

        Returns:
          The groups, the shortest rows first, each as wide as its longest.
        """
        order = np.argsort(self.length, kind="stable")
        size = len(order) // groups
        parts = [order[i * size : (i + 1) * size] for i in range(groups)]
        return [
            Corpus(
                self.tokens[part, : self.length[part].max()],
                self.prompt_length[part],
                self.length[part],
            )
            for part in parts
        ]


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer
) -> Corpus:
    """Tokenize pairs: ``chat(prompt)``, completion, end of sequence.

    Args:
      pairs: (prompt, completion) texts, at least one.
      tokenizer: of the model that will be trained.

    Returns:
      The corpus, as wide as its longest row.
    """
    end = tokenizer.eos_ids[0]
    prompts = [tokenizer.chat(prompt) for prompt, _ in pairs]
    rows = [
        [*prompt, *tokenizer.encode(completion), end]
        for prompt, (_, completion) in zip(prompts, pairs, strict=True)
    ]
    length = np.array([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), length.max()), tokenizer.pad_id, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    prompt_length = np.array([len(prompt) for prompt in prompts], np.int32)
    return Corpus(tokens, prompt_length, length)


def next_token_loss(
    model: Any, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """Return the mean cross-entropy of the target tokens.

    Args:
      model: the model.
      tokens: i32[B, L], padded on the right.
      mask: bool[B, L] which tokens are targets.

    Returns:
      f32[], nats a token.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # Tokens before the padding on the right do not attend to it.
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
    """Train a model by cross-entropy.

    Args:
      model: the start; donated.
      batch: step -> (tokens i32[B, L], mask bool[B, L]).
      steps: updates.
      learning_rate: peak; 5 % linear warm-up, then cosine to a hundredth.
      name: shown by the progress bar.

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
