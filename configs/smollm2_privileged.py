"""SmolLM2-135M-Instruct teaches itself: the teacher reads the solution too.

OPSD (arXiv:2601.18734) on GSM8K, whose "answer" is a worked solution:
--config.data.path=FILE, a JSONL file with "question" and "answer". The teacher
is the frozen initial student; --config.teacher.source=student makes it the
student of every step. OPSD's clip of each id's term ruined this student within
30 steps (notebooks/results), so it is left out.
"""

from ml_collections import ConfigDict

from topd_jax.configs import smollm2_gsm8k


def get_config() -> ConfigDict:
    """The whole model twice, and two prompts of every question."""
    config = smollm2_gsm8k.get_config()
    config.student.keep_layers = ()
    config.teacher.prompt = (
        "{question}\n\nA correct solution:\n{answer}\n\n"
        "Solve the problem again, in your own words."
    )
    config.data.max_teacher_prompt_length = 448
    config.objective = "opd(token_loss='forward_kl')"
    config.optimizer.learning_rate = 1e-5
    config.train.steps = 30
    config.sweep.variants = ("opd", config.objective)
    return config
