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
)
from topd_jax.types import Candidates, Windows

TEACHER = ["(", "2", "×", "3", ")", "=", "6"]
STUDENT = ["2", "=", "7", "×", "3", "=", "21"]
WORDS = sorted(set(TEACHER + STUDENT))
K, V = len(TEACHER), len(WORDS)
EMBEDDING = jnp.eye(V)  # every token as far from every other one


def window(words):
    return Windows(
        jnp.array([[WORDS.index(w) for w in words]]), jnp.ones((1, K), bool)
    )


# With the position term "2" sits one place off: 0.5 / 7 of price against a
# whole mismatch. It does not cure the literal target; the anchor does.
@pytest.mark.parametrize(
    ("position_weight", "anchor_first"), [(0.5, False), (0.0, True)]
)
def test_the_first_target(position_weight, anchor_first):
    distance, plan = window_distance(
        EMBEDDING, window(STUDENT), window(TEACHER),
        position_weight=position_weight,
    )  # fmt: skip
    if position_weight:
        # Four of seven tokens answer each other; a false alarm is near 0.
        np.testing.assert_allclose(distance, 3 / 7, atol=0.01)
    theirs = window(TEACHER)
    targets = trajectory_targets(plan, theirs, anchor_first=anchor_first)
    first = dict(zip(TEACHER, np.asarray(targets[0, 0]), strict=True))
    # The student's "×" answers the teacher's, anchored or not.
    assert TEACHER[int(targets[0, STUDENT.index("×")].argmax())] == "×"

    def loss(hidden):
        at = Candidates(jnp.array([0]), jnp.array([True]))
        logp = student_context_logprobs(hidden, EMBEDDING, at, theirs)
        return trajectory_loss(targets, logp, theirs).sum()

    # With the head an identity, logits are uniform.
    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.zeros((K, V)))[0])
    of_wrong, of_right = (gradient[WORDS.index(w)] for w in ("2", "("))
    if anchor_first:
        assert first["("] == 1.0 and first["2"] == 0.0
        assert of_right < 0 < of_wrong
    else:
        assert first["2"] > 0.99 and first["("] < 3e-3
        # Descent raises the student's wrong "2" and lowers the right "(".
        assert of_wrong < 0 < of_right
