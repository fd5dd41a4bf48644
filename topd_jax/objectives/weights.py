"""Token weights as pieces of an objective, with their options and bounds.

The formulas are in :mod:`topd_jax.losses.token_weights`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from topd_jax.losses import token_weights
from topd_jax.losses.log_probs import LOG_FLOOR
from topd_jax.objectives.pieces import Bounded, row_wise
from topd_jax.settings import setting
from topd_jax.types import Candidates


@row_wise
def cap_selected(
    token_loss: jax.Array,
    mask: jax.Array,
    candidates: Candidates,
    selected: jax.Array,
) -> jax.Array:
    """Cap the loss of selected candidates at their row's median (§5.1)."""
    tokens = token_weights.scatter_to_tokens(
        candidates, selected, mask.shape[-1]
    )
    return mask * token_weights.median_cap_weights(token_loss, mask, tokens)


@row_wise
@dataclasses.dataclass(frozen=True)
class NStep(Bounded):
    """Give more weight to the n tokens from each divergent state on."""

    n: int = setting(10, "tokens that a bonus reaches", least=1)
    discount: float = setting(1.0, "of the bonus, a token", least=0, most=1)
    strength: float = setting(1.0, "of the bonus", least=0, most=1e6)
    cap: float = setting(1.0, "of overlapping bonuses", least=0, most=1e6)

    def __call__(
        self, divergent: jax.Array, candidates: Candidates, mask: jax.Array
    ) -> jax.Array:
        """Compute the weights, f32[B, T]."""
        return token_weights.n_step_weights(
            divergent, candidates, mask, **dataclasses.asdict(self)
        )


@dataclasses.dataclass(frozen=True)
class Tip(Bounded):
    """Keep the most important tokens (TIP, arXiv:2604.14084)."""

    fraction: float = setting(0.5, "share of tokens kept", above=0, most=1)

    def __call__(
        self, student_entropy: jax.Array, reverse_kl: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Compute the weights, f32[B, T]."""
        kept = token_weights.tip_weights(
            student_entropy, reverse_kl, mask, fraction=self.fraction
        )
        return token_weights.renormalized(kept, mask)


@dataclasses.dataclass(frozen=True)
class Teachability(Bounded):
    """Keep the tokens that can be taught (TA-OPD, arXiv:2605.26844).

    Names ``coverage``: the teacher's mass on the student's top k.
    """

    fraction: float = setting(0.5, "share of tokens kept", above=0, most=1)

    def __call__(
        self, reverse_kl: jax.Array, coverage: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Compute the weights, f32[B, T]."""
        kept = token_weights.teachability_weights(
            reverse_kl, coverage, mask, fraction=self.fraction
        )
        return token_weights.renormalized(kept, mask)


@dataclasses.dataclass(frozen=True)
class Fire(Bounded):
    """Drop poor rollouts, weigh by confidence (FiRe-OPD, arXiv:2606.02684)."""

    drop: float = setting(0.2, "share of rollouts dropped", least=0, most=1)

    def __call__(
        self,
        teacher_token_loss: jax.Array,
        student_entropy: jax.Array,
        teacher_entropy: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        """Compute the weights, f32[B, T]."""
        return token_weights.fire_weights(
            -teacher_token_loss, student_entropy, teacher_entropy, mask,
            drop=self.drop,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Agreement(Bounded):
    """Cut rollouts where both models agree for too long (arXiv:2606.09471)."""

    quantile: float = setting(0.1, "level of the threshold", least=0, most=1)
    window: int = setting(64, "tokens of the running mean", least=1)

    def __call__(self, reverse_kl: jax.Array, mask: jax.Array) -> jax.Array:
        """Compute the weights, f32[B, T]."""
        threshold = token_weights.agreement_threshold(
            reverse_kl, mask, quantile=self.quantile, window=self.window
        )
        kept = token_weights.agreement_weights(
            reverse_kl, mask, threshold, window=self.window
        )
        return token_weights.renormalized(kept, mask)


@dataclasses.dataclass(frozen=True)
class Retain(Bounded):
    """Keep tokens at random: the control of any selection (DIAL-OPD)."""

    fraction: float = setting(0.5, "share of tokens kept", above=0, most=1)

    def __call__(self, uniforms: jax.Array, mask: jax.Array) -> jax.Array:
        """Compute the weights, f32[B, T]."""
        kept = mask & (uniforms < self.fraction)
        return token_weights.renormalized(kept.astype(jnp.float32), mask)


@row_wise
@dataclasses.dataclass(frozen=True)
class Prefix(Bounded):
    """Give more weight before disagreement piles up (arXiv:2606.22600)."""

    gamma: float = setting(
        0.5, "weight of the first token, less 1", least=0, most=1e6
    )
    log_floor: float = setting(LOG_FLOOR, "nats, of log-probabilities", below=0)

    def __call__(
        self,
        student_token_logp: jax.Array,
        teacher_token_logp: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        """Compute the weights, f32[B, T]."""
        return token_weights.prefix_weights(
            student_token_logp, teacher_token_logp, mask,
            gamma=self.gamma, log_floor=self.log_floor,
        )  # fmt: skip
