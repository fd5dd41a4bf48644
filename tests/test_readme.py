"""The README's snippet runs as it is written."""

import re
from pathlib import Path

import jax
from conftest import EOS, PAD

import topd_jax as topd
from topd_jax.models import causal_mask, unembed
from topd_jax.types import completion_states

README = Path(__file__).parents[1] / "README.md"


def read(model, trajectories, columns=0):
    """States in completion coordinates, and the cache."""
    rows, length = trajectories.sequence.shape
    cache = model.init_cache(rows, length + columns)
    mask = jax.numpy.pad(
        causal_mask(trajectories.sequence_mask),
        ((0, 0), (0, 0), (0, columns)),
    )
    hidden, cache = model(
        trajectories.sequence, trajectories.positions, mask, cache
    )
    return completion_states(hidden, trajectories.prompt.shape[1]), cache


def test_the_snippet_composes_a_loss(student, teacher, trajectories):
    (snippet,) = re.findall(
        r"```python\n(import topd_jax.*?)```", README.read_text(), re.S
    )
    states, _ = read(student, trajectories)
    teacher_hidden, cache = read(
        teacher, trajectories, topd.branch_columns(8, 16)
    )
    student_logp = topd.log_softmax(unembed(student.head, states))
    teacher_logp = topd.log_softmax(unembed(teacher.head, teacher_hidden))
    names = dict(
        trajectories=trajectories,
        mask=trajectories.mask,
        teacher=teacher,
        cache=cache,
        teacher_hidden=teacher_hidden,
        embedding=student.embedding[...],
        student_logp=student_logp,
        teacher_logp=teacher_logp,
        teacher_nll=-jax.numpy.take_along_axis(
            teacher_logp, trajectories.tokens[..., None], -1
        )[..., 0],
        eos=(EOS,),
        pad=PAD,
    )
    exec(snippet, names)
    plain = topd.weighted_mean(
        topd.reverse_kl(student_logp, teacher_logp), mask=trajectories.mask
    )
    # Weights are 1, and 2 near divergent states.
    assert plain < names["loss"] <= 2 * plain
    assert names["divergent"].any()
