"""Written solutions as batches: the tiny world's pretraining, and stage 1.

Ours for the world's corpora; pairs of (prompt, completion) that a teacher
wrote are stage 1 of arXiv:2606.00305, App. B. A corpus is tokenised once, and
a batch is a pure function of (seed, step): nothing to save, nothing to skip on
resume.
"""

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from topd_jax.data.tokenizers import SentencePieceTokenizer, Tokenizer
from topd_jax.data.toy_world import problems
from topd_jax.types import Trajectories


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Prompts with written completions, padded on the right.

    Attributes:
      tokens: i32[N, L] prompt, completion, end of sequence, padding.
      prompt_length: i32[N] tokens of each prompt.
      length: i32[N] tokens of each row, the end of sequence included.
      pad_id: the id that fills the rows.
    """

    tokens: np.ndarray
    prompt_length: np.ndarray
    length: np.ndarray
    pad_id: int


def world_pairs(
    prompts: Sequence[str],
    style: problems.Style,
    habit: problems.Habit | None = None,
    *,
    seed: int,
) -> list[tuple[str, str]]:
    """One (problem, solution) for each problem, in a style, with a habit."""
    rng = random.Random(f"topd solutions {seed}")
    return [(p, problems.solution(p, rng, style, habit)) for p in prompts]


def train_tokenizer(
    *corpora: Sequence[tuple[str, str]],
    vocab_size: int = 64,
    samples: int = 5000,
) -> SentencePieceTokenizer:
    """A tokenizer of the tiny world, the same for the same corpora.

    Args:
      *corpora: pairs in each style that models will meet.
      vocab_size: ids of the tokenizer.
      samples: pairs of each corpus that it is trained on.
    """
    texts = [text for c in corpora for pair in c[:samples] for text in pair]
    return SentencePieceTokenizer.train(texts, vocab_size)


def encode_pairs(
    pairs: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
) -> Corpus:
    """Tokenises pairs: ``chat(prompt)``, completion, end of sequence.

    Args:
      pairs: (prompt, completion) texts.
      tokenizer: of the model that will be trained.
      max_length: the longest row allowed; None allows any.

    Returns:
      The corpus, as wide as its longest row.

    Raises:
      ValueError: for no pairs, or a row longer than ``max_length``.
    """
    if not pairs:
        raise ValueError("a corpus needs at least one (prompt, completion)")
    end = tokenizer.eos_ids[0]
    prompts = [tokenizer.chat(prompt) for prompt, _ in pairs]
    rows = [
        [*prompt, *tokenizer.encode(completion), end]
        for prompt, (_, completion) in zip(prompts, pairs, strict=True)
    ]
    length = np.array([len(row) for row in rows], np.int32)
    if max_length is not None and length.max() > max_length:
        index = int(length.argmax())
        raise ValueError(
            f"pair {index} has {length[index]} tokens with its prompt; the "
            f"limit is {max_length}: raise max_length or leave the pair out"
        )
    tokens = np.full((len(rows), length.max()), tokenizer.pad_id, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    prompt_length = np.array([len(prompt) for prompt in prompts], np.int32)
    return Corpus(tokens, prompt_length, length, tokenizer.pad_id)


def batch_rows(
    count: int, *, batch_size: int, seed: int, step: int
) -> np.ndarray:
    """The rows of one step: epochs without repetition, each shuffled anew.

    Args:
      count: rows of the corpus; those that fill no batch wait for another
        epoch's order.
      batch_size: B.
      seed: of the orders.
      step: from 0.

    Returns:
      i64[B] row numbers.

    Raises:
      ValueError: if the corpus does not fill one batch.
    """
    if not 1 <= batch_size <= count:
        raise ValueError(
            f"batch_size={batch_size} must be in 1..{count}, the number of "
            "rows in the corpus"
        )
    epoch, slot = divmod(step, count // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[slot * batch_size : (slot + 1) * batch_size]


def supervised_batch(
    corpus: Corpus, *, batch_size: int, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """One batch for next-token training.

    Args:
      corpus: the tokenised pairs.
      batch_size: B.
      seed: of the order of the rows.
      step: from 0.

    Returns:
      tokens i32[B, L], padded on the right, and mask bool[B, L]: the tokens
      to be learnt, completions and their ends of sequence.
    """
    rows = batch_rows(
        len(corpus.tokens), batch_size=batch_size, seed=seed, step=step
    )
    column = np.arange(corpus.tokens.shape[1])
    begin, end = corpus.prompt_length[rows], corpus.length[rows]
    mask = (column >= begin[:, None]) & (column < end[:, None])
    return corpus.tokens[rows], mask


def trajectory_batch(
    corpus: Corpus, *, batch_size: int, seed: int, step: int
) -> Trajectories:
    """One batch laid out as rollouts are, for losses that expect them.

    Args:
      corpus: the tokenised pairs.
      batch_size: B.
      seed: of the order of the rows.
      step: from 0.

    Returns:
      Trajectories of NumPy arrays, the same widths for every step; ``logp``
      is 0, for nobody drew these tokens.
    """
    rows = batch_rows(
        len(corpus.tokens), batch_size=batch_size, seed=seed, step=step
    )
    width = int(corpus.prompt_length.max())
    longest = int((corpus.length - corpus.prompt_length).max())
    begin = corpus.prompt_length[rows][:, None]
    end = corpus.length[rows][:, None]
    prompt_column = np.arange(width) - (width - begin)
    column = np.arange(longest) + begin
    prompt_mask, mask = prompt_column >= 0, column < end

    def take(columns: np.ndarray, exists: np.ndarray) -> np.ndarray:
        columns = np.where(exists, columns, 0)
        taken = np.take_along_axis(corpus.tokens[rows], columns, axis=1)
        return np.where(exists, taken, corpus.pad_id).astype(np.int32)

    return Trajectories(
        prompt=take(prompt_column, prompt_mask),
        prompt_mask=prompt_mask,
        tokens=take(column, mask),
        mask=mask,
        logp=np.zeros(mask.shape, np.float32),
        truncated=np.zeros(len(rows), bool),
    )
