"""The jitted stages of a step: shapes, shared ids, what compiles once."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from conftest import EOS, PAD, VOCAB, make_model
from small_run import changed, settings_with

from topd_jax.data.teachers import shared_vocab
from topd_jax.models import init_decoder
from topd_jax.objectives.loading import make_objective
from topd_jax.training.compiled import (
    compile_step,
    make_optimizer,
    make_schedule,
)
from topd_jax.types import Prompts, Teacher

SETTINGS = settings_with(rollout__max_new_tokens=12, data__samples=2)


def wider(model):
    """As many parameters again for ids that the other models do not have."""
    config = dataclasses.replace(model.config, vocab_size=VOCAB + 40)
    return init_decoder(config, jax.random.key(5))


def compiled(settings, **options):
    optimizer = make_optimizer(settings.optimizer, 6)
    objective = make_objective(settings.objective)
    ids = dict(eos_ids=(EOS,), pad_id=PAD)
    return compile_step(settings, objective, optimizer, **ids, **options)


@pytest.mark.parametrize("stage", ["on_policy", "offline"])
def test_ids_that_one_model_lacks_are_never_drawn(student, teacher, stage):
    settings = changed(SETTINGS, "train", stage=stage)
    models = [wider(student), teacher]
    if stage == "offline":  # the teacher writes
        models = [teacher, wider(student)]
    prompts = Prompts(jnp.full((4, 5), 5, jnp.int32), jnp.ones((4, 5), bool))
    rows = compiled(settings).rollout(
        models[0], (Teacher(models[1]),), prompts, jax.random.key(0)
    )
    # Half of what is drawn would be beyond, were nothing in the way.
    assert rows.mask.sum() > 40
    assert rows.tokens.max() < VOCAB
    # Two rows a prompt, and the prompts as wide as they came.
    assert rows.sequence.shape == (8, 5 + 12)


def test_the_smallest_vocabulary_is_shared(student):
    wide = wider(student)
    assert shared_vocab(wide, (Teacher(wide),)) == VOCAB + 40
    assert shared_vocab(student, (Teacher(wide),)) == VOCAB
    several = Teacher(wide, "a"), Teacher(make_model(3), "b")
    assert shared_vocab(wide, several) == VOCAB


def test_the_rate_warms_up_and_falls_to_its_end():
    options = dataclasses.replace(
        SETTINGS.optimizer, learning_rate=1.0, end_learning_rate=0.25,
        warmup_fraction=0.5, clip=1e9, eps=1e-12,
    )  # fmt: skip
    optimizer = make_optimizer(options, 4)
    state, rates = optimizer.init(jnp.zeros(())), []
    for _ in range(5):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        rates.append(-float(update))
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.625, 0.25], abs=1e-5)
    constant = make_optimizer(options, None)
    update, _ = constant.update(
        jnp.ones(()), constant.init(jnp.zeros(())), jnp.zeros(())
    )
    assert -float(update) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("share", "steps"), [(0.9, 4), (0.75, 2)])
def test_a_warm_up_may_take_the_whole_run(share, steps):
    options = dataclasses.replace(
        SETTINGS.optimizer, learning_rate=1.0, warmup_fraction=share
    )
    rate = make_schedule(options, steps)
    rises = [i / (steps - 1) for i in range(steps)]
    assert [float(rate(i)) for i in range(steps)] == pytest.approx(rises)


def test_without_a_warm_up_the_first_update_has_the_whole_rate():
    options = dataclasses.replace(SETTINGS.optimizer, warmup_fraction=0.0)
    for steps in (1, 4):
        rate = make_schedule(options, steps)
        assert float(rate(0)) == pytest.approx(options.learning_rate)
        assert float(rate(1)) < options.learning_rate
