"""What is optimised: one frozen dataclass, one switch for the variants.

Every variant is a composition of the same pure functions (arXiv:2606.00305,
§3-§5.1); :data:`VARIANTS` says which of them each one uses.
"""

import dataclasses
from typing import NamedTuple

from topd_jax.parallel.sharding import DECODING


class Variant(NamedTuple):
    """Which pieces a variant uses.

    Attributes:
      caps: "" or whose loss is capped at the row's median: "false_alarm", or
        "control" (as many divergent candidates, at random).
      spreads: weights spread from divergent states over the next n tokens.
      guides: trajectory guidance from the teacher's windows.
      weighs: "" or the sibling method that weighs tokens.
      replaces: "" or the sibling method whose loss stands for the divergence.
    """

    caps: str = ""
    spreads: bool = False
    guides: bool = False
    weighs: str = ""
    replaces: str = ""

    @property
    def looks_ahead(self) -> bool:
        """Whether the teacher's near future is needed at all."""
        return bool(self.caps) or self.spreads or self.guides


VARIANTS = {
    "opd": Variant(),
    "opd+suppress": Variant(caps="false_alarm"),
    "opd+suppress_control": Variant(caps="control"),
    "n_step": Variant(spreads=True),
    "topd": Variant(guides=True),
    "topd+suppress": Variant(caps="false_alarm", guides=True),
    # Sibling methods, as baselines; see topd_jax.losses.siblings.
    "entropy_aware": Variant(replaces="entropy_aware"),
    "trust_region": Variant(replaces="trust_region"),
    "tip": Variant(weighs="tip"),
    "teachability": Variant(weighs="teachability"),
    "fire": Variant(weighs="fire"),
    "agreement": Variant(weighs="agreement"),
    "prefix": Variant(weighs="prefix"),
}


@dataclasses.dataclass(frozen=True)
class Siblings:
    """Settings of the sibling methods, with their papers' defaults.

    Attributes:
      top_k: tokens of the top sets: entropy_aware (arXiv:2603.07079: 16),
        trust_region (2606.01249), teachability (2605.26844).
      alpha: entropy_aware, weight of the added forward KL (1).
      entropy_threshold: entropy_aware, tau in nats (0.8).
      fraction: tip (2604.14084) and teachability, share of tokens kept; ours.
      drop: fire (2606.02684), share of rollouts dropped (0.2).
      quantile: agreement (2606.09471), level of the threshold; ours.
      window: agreement, tokens of the running mean (64).
      gamma: prefix (2606.22600), weight of the first token, less 1 (0.5).
    """

    top_k: int = 16
    alpha: float = 1.0
    entropy_threshold: float = 0.8
    fraction: float = 0.5
    drop: float = 0.2
    quantile: float = 0.1
    window: int = 64
    gamma: float = 0.5

    def __post_init__(self) -> None:
        for name in ("top_k", "window"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"objective.siblings.{name}={getattr(self, name)} must be "
                    "at least 1"
                )
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"objective.siblings.fraction={self.fraction} must lie above 0 "
                "and at most 1, which keeps every token"
            )
        for name in ("drop", "quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"objective.siblings.{name}={getattr(self, name)} must lie "
                    "in 0..1"
                )


_CHOICES = {
    "stage": ("on_policy", "offline"),
    "variant": tuple(VARIANTS),
    "context": ("teacher", "student"),
    "divergence": ("reverse_kl", "forward_kl", "jsd"),
    "score": ("teacher_loss", "reverse_kl"),
    "detector": ("transport", "future_loss"),
    "branch_loss": ("cross_entropy", "forward_kl", "reverse_kl"),
    # "tensor" would move the cache.
    "branch_sharding": tuple(n for n in DECODING if n != "tensor"),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """The on-policy objective; fields as in METHOD's notation.

    Attributes:
      stage: "on_policy", or "offline" for stage 1 of App. B: the teacher
        writes, and the student learns by ``kd_ratio`` * forward KL + (1 -
        ``kd_ratio``) * cross-entropy; nothing looks ahead there.
      kd_ratio: share of forward KL in the offline loss (App. B: 0.5).
      variant: a key of :data:`VARIANTS`.
      context: where guidance is applied: "student" (literal §3, targets from
        the transport plan at the rollout's own contexts) or "teacher" (§5.2,
        the student is trained along the teacher's branch).
      divergence: the token loss, "reverse_kl" in the paper.
      beta: mixture weight of "jsd".
      temperature: divides both models' logits in the token loss.
      log_floor: floor of the teacher's log-probabilities, nats (ours).
      score: what candidates are ranked by: "teacher_loss", -log p_T(y_t), or
        "reverse_kl" (§3; the choice is ours).
      candidates: M, slots a trajectory.
      fraction: share of a row's tokens that fill its slots, rounded up; None
        fills all slots (paper: 218 / 9688, §2.1).
      window: K, tokens of a window (paper: 50, §2.1).
      detector: "transport" (§3), or "future_loss": the mean -log p_T of the K
        tokens that the student wrote, which needs no branch (ours); not for
        context "student", whose targets are the plan's.
      percentile: candidates above this percentile of the batch's distances
        are divergent (ours).
      threshold: fixed distance (nats a token for "future_loss") instead of the
        percentile; None for off.
      epsilon: entropic regularisation of the transport plan (ours).
      position_weight: cost of matching tokens a window apart (ours).
      branch_temperature: 0 continues greedily; above, samples.
      branch_sharding: where the teacher's parameters are while it writes its
        branches, of :data:`~topd_jax.parallel.sharding.DECODING`.
      guidance_weight: lambda of L = L_OPD + lambda * L_traj (§3).
      anchor_first: context "student": the first target is the teacher's
        first token (our repair of the literal target).
      branch_loss: context "teacher": loss along the branch.
      n_step: tokens that a divergent state's bonus reaches.
      discount: of the bonus a token further.
      strength: of the bonus against the weight 1.
      cap: bound of overlapping bonuses.
      chunk_size: tokens of one chunk of the fused losses; None picks by shape.
      siblings: settings of the sibling methods.
    """

    stage: str = "on_policy"
    kd_ratio: float = 0.5
    variant: str = "topd"
    context: str = "teacher"
    divergence: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0
    log_floor: float = -100.0
    score: str = "teacher_loss"
    candidates: int = 3
    fraction: float | None = None
    window: int = 10
    detector: str = "transport"
    percentile: float = 30.0
    threshold: float | None = None
    epsilon: float = 0.05
    position_weight: float = 0.5
    branch_temperature: float = 0.0
    branch_sharding: str = "train"
    guidance_weight: float = 0.1
    anchor_first: bool = True
    branch_loss: str = "cross_entropy"
    n_step: int = 10
    discount: float = 1.0
    strength: float = 1.0
    cap: float = 1.0
    chunk_size: int | None = None
    siblings: Siblings = Siblings()

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"objective.{name}={getattr(self, name)!r} must be one of "
                    f"{', '.join(choices)}"
                )
        for name in ("candidates", "window", "n_step"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"objective.{name}={getattr(self, name)} must be at least 1"
                )
        for name in ("temperature", "epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"objective.{name}={getattr(self, name)} must be above 0"
                )
        if not 0 <= self.kd_ratio <= 1:
            raise ValueError(
                f"objective.kd_ratio={self.kd_ratio} must lie in 0..1"
            )
        if not 0 <= self.percentile <= 100:
            raise ValueError(
                f"objective.percentile={self.percentile} must lie in 0..100"
            )
        if self.detector != "transport" and self.trains_on_plan:
            raise ValueError(
                f"objective.detector={self.detector!r} makes no transport plan "
                "for objective.context='student'; take detector='transport', "
                "or context='teacher'"
            )
        if self.guidance_weight < 0:
            raise ValueError(
                f"objective.guidance_weight={self.guidance_weight} must not "
                "be negative; 0 turns guidance off"
            )

    @property
    def pieces(self) -> Variant:
        """The row of :data:`VARIANTS` that this objective selects."""
        return VARIANTS["opd" if self.offline else self.variant]

    @property
    def offline(self) -> bool:
        """Whether this is stage 1."""
        return self.stage == "offline"

    @property
    def trains_on_branch(self) -> bool:
        """Whether the student reads the teacher's branches."""
        return self.pieces.guides and self.context == "teacher"

    @property
    def trains_on_plan(self) -> bool:
        """Whether guidance takes its targets from the transport plan."""
        return self.pieces.guides and self.context == "student"

    @property
    def needs_student_states(self) -> bool:
        """Whether an annotation needs what the student says of each token."""
        pieces = self.pieces
        ranks = pieces.looks_ahead and self.score != "teacher_loss"
        return bool(pieces.weighs) or ranks

    @property
    def needs_branches(self) -> bool:
        """Whether the teacher continues the candidates' prefixes."""
        pieces = self.pieces
        by_transport = pieces.looks_ahead and self.detector == "transport"
        return by_transport or pieces.guides

    @property
    def needs_window_hidden(self) -> bool:
        """Whether the teacher's states along its branches must be kept."""
        return self.trains_on_branch and self.branch_loss != "cross_entropy"
