"""The paper's variants and its siblings, as objectives of a few lines.

Reading this file teaches which pieces each method is made of. The siblings
see the same rollouts, teacher and optimizer as the variants that they are
compared with; the paper has neither them nor n-step weights.
"""

import dataclasses
import functools
from types import MappingProxyType
from typing import Any

from topd_jax.losses import token_losses
from topd_jax.losses.divergences import reverse_kl
from topd_jax.losses.near_future import matched_control_mask
from topd_jax.losses.token_losses import TokenLoss
from topd_jax.objectives import weights
from topd_jax.objectives.guidance import BRANCH_LOSSES, PlanTargets
from topd_jax.objectives.objective import Guidance, NearFuture, Objective

AHEAD = NearFuture()


def opd(
    token_loss: TokenLoss = reverse_kl, temperature: float = 1.0
) -> Objective:
    """Distill on policy: the token loss at every token."""
    return Objective(token_loss, temperature)


def suppress(
    token_loss: TokenLoss = reverse_kl,
    temperature: float = 1.0,
    near_future: NearFuture = AHEAD,
) -> Objective:
    """Cap the false alarms' loss (arXiv:2606.00305, §5.1)."""
    return Objective(
        token_loss, temperature, (weights.cap_selected,), near_future
    )


def suppress_control(
    token_loss: TokenLoss = reverse_kl,
    temperature: float = 1.0,
    near_future: NearFuture = AHEAD,
) -> Objective:
    """Cap as many divergent tokens, at random: the control of §5.1."""
    near_future = dataclasses.replace(near_future, select=matched_control_mask)
    return suppress(token_loss, temperature, near_future)


def n_step(
    token_loss: TokenLoss = reverse_kl,
    temperature: float = 1.0,
    near_future: NearFuture = AHEAD,
    bonus: weights.NStep = weights.NStep(),  # noqa: B008 (frozen)
) -> Objective:
    """Give more weight to the tokens after a divergent state."""
    return Objective(token_loss, temperature, (bonus,), near_future)


def topd(
    token_loss: TokenLoss = reverse_kl,
    temperature: float = 1.0,
    near_future: NearFuture = AHEAD,
    *,
    context: str = "teacher",
    guidance_weight: float = 0.1,
    guidance_share: float = 1.0,
    branch_loss: str | None = None,
    anchor_first: bool | None = None,
) -> Objective:
    """Guide by the teacher's near future (arXiv:2606.00305, §3).

    Args:
      token_loss: at every token.
      temperature: of both models' logits in it.
      near_future: what is looked at.
      context: "teacher": the student is trained along the teacher's branch
        (§5.2); "student": on the transport plan's targets at the rollout's
        own contexts (literal §3).
      guidance_weight: lambda.
      guidance_share: of a run's steps, the first ones; the others are those
        of OPD (ours).
      branch_loss: of context "teacher": "cross_entropy" (the default),
        "forward_kl" or "reverse_kl".
      anchor_first: of context "student": the first target is the teacher's
        first token (the default).

    Raises:
      ValueError: for an unknown choice, or one of the other context.
    """
    given = {"branch_loss": branch_loss, "anchor_first": anchor_first}
    own = {"teacher": "branch_loss", "student": "anchor_first"}
    if context not in (*own,):
        raise ValueError(f"context={context!r} must be 'teacher' or 'student'")
    for name, value in given.items():
        if value is not None and name != own[context]:
            raise ValueError(
                f"{name}={value!r} does not exist in context={context!r}; "
                "leave it out, or take the other context"
            )
    if context == "student":
        loss = PlanTargets(True if anchor_first is None else anchor_first)
    elif branch_loss in (None, *BRANCH_LOSSES):
        loss = BRANCH_LOSSES[branch_loss or "cross_entropy"]
    else:
        raise ValueError(
            f"branch_loss={branch_loss!r} must be one of "
            f"{', '.join(map(repr, BRANCH_LOSSES))}"
        )
    guidance = Guidance(loss, guidance_weight, guidance_share)
    return Objective(token_loss, temperature, (), near_future, guidance)


@functools.wraps(topd, assigned=())  # its signature, which names the options
def topd_suppress(*args: Any, **options: Any) -> Objective:
    """Guide as :func:`topd` does, and cap the false alarms' loss.

    Args:
      *args: as :func:`topd`.
      **options: as :func:`topd`.
    """
    whole = topd(*args, **options)
    return dataclasses.replace(whole, token_weights=(weights.cap_selected,))


def entropy_aware(
    top_k: int = 16,
    alpha: float = 1.0,
    entropy_threshold: float = 0.8,
    log_floor: float = -100.0,
) -> Objective:
    """Add forward KL where the teacher is undecided (arXiv:2603.07079)."""
    return Objective(
        functools.partial(
            token_losses.entropy_aware_kl,
            top_k=top_k,
            alpha=alpha,
            entropy_threshold=entropy_threshold,
            log_floor=log_floor,
        )
    )


def trust_region(top_k: int = 16, log_floor: float = -100.0) -> Objective:
    """Follow a policy gradient in a trust region (arXiv:2606.01249)."""
    return Objective(
        functools.partial(
            token_losses.trust_region_loss, top_k=top_k, log_floor=log_floor
        )
    )


def tip(
    token_loss: TokenLoss = reverse_kl,
    temperature: float = 1.0,
    weight: weights.Tip = weights.Tip(),  # noqa: B008 (frozen)
) -> Objective:
    """Train on the most important tokens (TIP, arXiv:2604.14084)."""
    return Objective(token_loss, temperature, (weight,))


def teachability(
    token_loss: TokenLoss = reverse_kl,
    temperature: float = 1.0,
    weight: weights.Teachability = weights.Teachability(),  # noqa: B008
    top_k: int = 16,
) -> Objective:
    """Train on what can be taught (TA-OPD, arXiv:2605.26844)."""
    coverage = functools.partial(token_losses.top_k_coverage, k=top_k)
    return Objective(
        token_loss, temperature, (weight,), statistics={"coverage": coverage}
    )


def fire(
    token_loss: TokenLoss = reverse_kl,
    temperature: float = 1.0,
    weight: weights.Fire = weights.Fire(),  # noqa: B008 (frozen)
) -> Objective:
    """Leave out poor rollouts (FiRe-OPD, arXiv:2606.02684)."""
    return Objective(token_loss, temperature, (weight,))


def agreement(
    token_loss: TokenLoss = reverse_kl,
    temperature: float = 1.0,
    weight: weights.Agreement = weights.Agreement(),  # noqa: B008 (frozen)
) -> Objective:
    """Stop where both models agree for too long (KAT, arXiv:2606.09471)."""
    return Objective(token_loss, temperature, (weight,))


def prefix(
    token_loss: TokenLoss = reverse_kl,
    temperature: float = 1.0,
    weight: weights.Prefix = weights.Prefix(),  # noqa: B008 (frozen)
) -> Objective:
    """Give more weight to early tokens (IW-OPD, arXiv:2606.22600)."""
    return Objective(token_loss, temperature, (weight,))


def retain(
    token_loss: TokenLoss = reverse_kl,
    temperature: float = 1.0,
    weight: weights.Retain = weights.Retain(),  # noqa: B008 (frozen)
) -> Objective:
    """Train on tokens chosen at random, 40 to 90 % of them (DIAL-OPD)."""
    return Objective(token_loss, temperature, (weight,))


def suppress_unlikely(probability: float = 0.3) -> Objective:
    """Push away what the student found unlikely, without the teacher.

    The control of arXiv:2608.31046: one fixed negative advantage.
    """
    return Objective(
        functools.partial(
            token_losses.suppress_unlikely, probability=probability
        )
    )


# Read only: an objective of one's own is named by its module.
PRESETS = MappingProxyType(
    {
        preset.__name__: preset
        for preset in (
            *(opd, suppress, suppress_control, n_step, topd, topd_suppress),
            *(entropy_aware, trust_region, tip, teachability, fire, agreement),
            *(prefix, retain, suppress_unlikely),
        )
    }
)
