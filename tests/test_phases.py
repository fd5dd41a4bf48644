"""The jitted parts of a step, on models that do not quite match."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EOS, PAD, VOCAB, make_model
from small_run import small_config

from topd_jax.models import init_decoder
from topd_jax.training.config import settings_from
from topd_jax.training.phases import make_optimizer, make_phases
from topd_jax.training.teachers import Teachers, shared_rows
from topd_jax.types import Prompts


def wider(model):
    """As many parameters again for ids that the other models do not have."""
    config = dataclasses.replace(model.config, vocab_size=VOCAB + 40)
    return init_decoder(config, jax.random.key(5))


@pytest.mark.parametrize("stage", ["on_policy", "offline"])
def test_ids_that_one_model_lacks_are_never_drawn(student, teacher, stage):
    config = small_config()
    config.objective.stage = stage
    config.rollout.max_new_tokens = 12
    settings = settings_from(config)
    phases = make_phases(
        settings, make_optimizer(settings.optimizer, 6),
        eos_ids=(EOS,), pad_id=PAD,
    )  # fmt: skip
    if stage == "offline":
        student, teacher = teacher, wider(student)
    else:
        student = wider(student)
    prompts = Prompts(jnp.full((8, 4), 5, jnp.int32), jnp.ones((8, 4), bool))
    written = phases.rollout(student, teacher, prompts, jax.random.key(0))
    # Half of what is drawn would be beyond, were nothing in the way.
    assert written.mask.sum() > 40
    assert written.tokens.max() < VOCAB


def test_the_smallest_vocabulary_is_shared(student):
    wide = wider(student)
    assert shared_rows(wide, wide) == VOCAB + 40
    assert shared_rows(wide, student) == shared_rows(student, wide) == VOCAB
    several = Teachers({"a": wide, "b": make_model(3)}, (1, 1))
    assert shared_rows(wide, several) == VOCAB
    assert np.ndim(shared_rows(wide, several)) == 0
