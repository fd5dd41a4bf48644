"""Fig. 1 of arXiv:2606.00305, 5+(2×3): where the literal target is the error.

At the same prefix the teacher goes on "( 2 × 3 ) = 6" and the student, who
adds first, "2 = 7 × 3 = 21".
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.losses.optimal_transport import window_distance
from topd_jax.losses.trajectory import (
    student_context_logprobs,
    trajectory_loss,
    trajectory_targets,
    window_mean,
)
from topd_jax.types import Candidates, Windows

TEACHER = ["(", "2", "×", "3", ")", "=", "6"]
STUDENT = ["2", "=", "7", "×", "3", "=", "21"]
WORDS = sorted(set(TEACHER + STUDENT))
K, V = len(TEACHER), len(WORDS)
EMBEDDING = jnp.eye(V)  # every token as far from every other one


def window(words):
    return Windows(
        jnp.array([WORDS.index(w) for w in words]), jnp.ones(K, bool)
    )


def plan(position_weight):
    return window_distance(
        EMBEDDING,
        window(STUDENT),
        window(TEACHER),
        position_weight=position_weight,
    )


def first_target(position_weight, anchor_first):
    """Token -> probability of the target at the divergent position."""
    targets = trajectory_targets(
        plan(position_weight)[1], window(TEACHER), anchor_first=anchor_first
    )
    mass = {}
    for word, weight in zip(TEACHER, np.asarray(targets[0]), strict=True):
        mass[word] = mass.get(word, 0.0) + float(weight)
    return mass


def first_gradient(position_weight, anchor_first):
    """d loss / d logit of each token at the divergent position."""
    hidden = jnp.zeros((K, V))  # with the head an identity: uniform logits
    candidate = Candidates(jnp.array([0]), jnp.array([True]))
    theirs = jax.tree.map(lambda x: x[None], window(TEACHER))
    targets = trajectory_targets(
        plan(position_weight)[1][None], theirs, anchor_first=anchor_first
    )

    def loss(hidden):
        logp = student_context_logprobs(hidden, EMBEDDING, candidate, theirs)
        return trajectory_loss(targets, logp, theirs).sum()

    grad = jax.grad(loss)(hidden)[0]
    return dict(zip(WORDS, np.asarray(grad), strict=True))


def test_the_two_futures_are_divergent():
    # Four of seven tokens answer each other; a false alarm is near 0.
    distance, _ = plan(0.5)
    np.testing.assert_allclose(distance, 3 / 7, atol=0.01)


# With the position term "2" sits one place off: 0.5 / 7 of price against a
# whole mismatch.
@pytest.mark.parametrize("position_weight", [0.0, 0.5])
def test_literal_target_is_the_error(position_weight):
    target = first_target(position_weight, anchor_first=False)
    assert max(target, key=target.get) == "2"
    assert target["2"] > 0.99 and target["("] < 3e-3
    # Descent raises the student's wrong "2" and lowers the right "(".
    grad = first_gradient(position_weight, anchor_first=False)
    assert grad["2"] < 0 < grad["("]


@pytest.mark.parametrize("position_weight", [0.0, 0.5])
def test_repaired_by_anchor_first(position_weight):
    target = first_target(position_weight, anchor_first=True)
    assert target["("] == 1.0
    assert target["2"] == 0.0
    grad = first_gradient(position_weight, anchor_first=True)
    assert grad["("] < 0 < grad["2"]


def test_repaired_by_context_teacher():
    # Along the teacher's own window the target at i = 0 is its first token.
    theirs = window(TEACHER)

    def loss(logits):
        logp = jax.nn.log_softmax(logits)
        per_token = -logp[jnp.arange(K), theirs.tokens]
        return window_mean(per_token, theirs.mask)

    logits = jnp.zeros((K, V))
    np.testing.assert_allclose(loss(logits), np.log(V), rtol=1e-6)
    grad = dict(zip(WORDS, np.asarray(jax.grad(loss)(logits)[0]), strict=True))
    assert grad["("] < 0 < grad["2"]
    assert min(grad, key=grad.get) == "("


def test_anchor_leaves_the_other_rows_to_the_plan():
    theirs = window(TEACHER)
    g = plan(0.5)[1]
    literal = trajectory_targets(g, theirs, anchor_first=False)
    repaired = trajectory_targets(g, theirs, anchor_first=True)
    np.testing.assert_array_equal(literal[1:], repaired[1:])
    # The student's "×" answers the teacher's in both.
    assert TEACHER[int(np.argmax(repaired[STUDENT.index("×")]))] == "×"
