"""``topd sample``: what a trained student writes."""

import math
import pathlib

import jax

from topd_jax.data.prompts import encode_prompts, ordered_batches
from topd_jax.parallel import hosts
from topd_jax.parallel.sharding import row_ways, spread_rows
from topd_jax.training.config import Settings
from topd_jax.training.restore import open_run


def sample(
    settings: Settings,
    workdir: pathlib.Path,
    which: str,
    prompt: list[str] | None = None,
) -> list[dict[str, str]]:
    """Complete prompts with a trained student.

    Args:
      settings: of the run; its ``rollout`` may differ.
      workdir: of the run.
      which: "latest", "best" or "start".
      prompt: texts, before any chat template; None takes three test prompts.

    Returns:
      One dictionary a prompt, with "prompt" and "completion".
    """
    with open_run(settings, workdir, which) as (setup, student, _):
        texts = prompt or [r["prompt"] for r in setup.test.records[:3]]
        records = [
            {"prompt": t, "answer": "", "index": i, "source": "--prompt"}
            for i, t in enumerate(texts)
        ]
        tokenizer = setup.tokenizer
        encoded = encode_prompts(
            records, tokenizer, max_length=settings.data.max_prompt_length
        )
        ways = row_ways(setup.mesh)
        rows = ways * math.ceil(len(texts) / ways)
        (batch,) = ordered_batches(encoded, batch_size=rows)
        trajectories = setup.evaluator(settings).writer(
            student,
            spread_rows(batch.prompts, setup.mesh),
            jax.random.key(settings.seed),
        )
        tokens, mask = hosts.on_host((trajectories.tokens, trajectories.mask))
    return [
        {
            "prompt": text,
            "completion": tokenizer.decode(tokens[i][mask[i]].tolist()),
        }
        for i, text in enumerate(texts)
    ]
