"""The composition that a step trains on: token loss, weights, near future.

L = sum_t mask w_t l_t / sum_t mask + lambda * mean over divergent points of
L_traj (arXiv:2606.00305, §3; weights §5.1). Every piece is a function, or a
frozen dataclass with ``__call__`` where it has options, and names what it
needs as its parameters: the step computes just that, once. What a piece may
name: :data:`TOKENS`, :data:`~topd_jax.objectives.statistics.STATISTICS` and
:data:`FUTURES`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from topd_jax.losses import divergences
from topd_jax.losses.near_future import future_loss
from topd_jax.losses.optimal_transport import window_distance
from topd_jax.losses.token_losses import TokenLoss
from topd_jax.objectives.pieces import (
    Bounded,
    Piece,
    is_row_wise,
    needs,
    require_names,
    require_rows,
    spelled,
)
from topd_jax.objectives.statistics import STATISTICS
from topd_jax.settings import check, setting
from topd_jax.types import Candidates, Windows

# What a token weight may name of each token: [B, T].
TOKENS = frozenset({"mask", "tokens", "teacher_token_loss", "uniforms"})
# What every piece may name once candidates were looked at: [B, M, ...].
FUTURES = frozenset(
    {
        *("candidates", "student_windows", "teacher_windows", "distance"),
        *("plan", "divergent", "false_alarm", "selected"),
    }
)
NO_PLAN = (
    "the objective needs a transport plan and its detector makes none; take "
    "detector='transport', or context='teacher'"
)
_RANKING = TOKENS | {"token_loss"}
_DETECTOR = TOKENS | {"candidates", "student_windows", "teacher_windows"} | {
    "embedding", "window",
}  # fmt: skip
_SELECT = frozenset({"key", "candidates", "divergent", "false_alarm"})
_GUIDANCE = TOKENS | FUTURES | {
    *("student_hidden", "student_head", "branch_hidden"),
    *("teacher_head", "teacher_window_hidden", "vocab_size", "layout"),
}  # fmt: skip


class Detection(NamedTuple):
    """Hold what a detector says about each candidate.

    Attributes:
      distance: f32[B, M] how far the two futures are apart.
      plan: f32[B, M, K, K] transport plan, student tokens by teacher tokens;
        None where the detector makes none.
    """

    distance: jax.Array
    plan: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Transport(Bounded):
    """Detect by optimal transport between the two windows (§3)."""

    epsilon: float = setting(
        0.05, "entropy of the plan, in units of the cost", least=0.005, most=10
    )
    position_weight: float = setting(
        0.5, "cost of moving a token by a window", least=0, most=10
    )

    def __call__(
        self,
        embedding: jax.Array,
        student_windows: Windows,
        teacher_windows: Windows,
    ) -> Detection:
        """Compute the transport distance, 0..2, and its plan."""
        distance, plan = window_distance(
            embedding,
            student_windows,
            teacher_windows,
            epsilon=self.epsilon,
            position_weight=self.position_weight,
        )
        return Detection(distance, plan)


@dataclasses.dataclass(frozen=True)
class FutureLoss:
    """Detect by the mean loss of the student's own window: no branches."""

    def __call__(
        self,
        teacher_token_loss: jax.Array,
        mask: jax.Array,
        candidates: Candidates,
        window: int,
    ) -> Detection:
        """Compute the mean -log p_T of each window, nats a token."""
        return Detection(
            future_loss(teacher_token_loss, mask, candidates, length=window)
        )


def teacher_loss(teacher_token_loss: jax.Array) -> jax.Array:
    """Rank candidates by -log p_T(y_t) (the label of figure 6)."""
    return teacher_token_loss


def own_loss(token_loss: jax.Array) -> jax.Array:
    """Rank candidates by the objective's token loss (§3)."""
    return token_loss


def at_random(uniforms: jax.Array) -> jax.Array:
    """Rank candidates at random: the control of any ranking."""
    return uniforms


def false_alarms(false_alarm: jax.Array) -> jax.Array:
    """Select the false alarms for what acts on candidates (§5.1)."""
    return false_alarm


@dataclasses.dataclass(frozen=True)
class NearFuture:
    """Choose which tokens are looked at, how far, and what parts (§3).

    The student's window holds only what it wrote. Near the end of a row that
    was cut at its limit it is shorter than the teacher's, and transport counts
    the missing part as distance. If a whole batch has one candidate, it is
    never above its own percentile: give a ``threshold``.

    Attributes:
      ranking: names :data:`TOKENS` or ``token_loss`` -> f32[B, T] score.
      detector: names tokens, ``candidates``, windows, ``embedding`` f32[V, D]
        or ``window`` K -> :class:`Detection`. The teacher continues the
        candidates' prefixes only if a piece names its windows.
      select: names ``divergent``, ``false_alarm``, ``candidates`` or ``key``
        -> bool[B, M], the candidates that a token weight acts on.
    """

    candidates: int = setting(3, "M, slots a row (paper, 2.1: 218)", least=1)
    fraction: float | None = setting(
        None,
        "share of a row's tokens that fill slots (paper, 2.1: 0.0225)",
        above=0,
        most=1,
    )
    window: int = setting(10, "K, tokens (paper, 2.1: 50)", least=1)
    percentile: float = setting(
        30.0, "of the batch's distances; above it futures part", least=0,
        most=100,
    )  # fmt: skip
    threshold: float | None = setting(
        None, "fixed distance instead of the percentile", least=0, most=1e6
    )
    branch_fraction: float | None = setting(
        None,
        "share of the candidates that are looked at, those of highest future "
        "loss; 1: all, as in the paper; None: a third where the student trains "
        "along their branches and nothing else asks for them, else all",
        above=0,
        most=1,
    )
    branch_temperature: float = setting(
        0.0, "of the teacher's branches; 0 is greedy", least=0, most=1e3
    )
    ranking: Piece = teacher_loss
    detector: Piece = Transport()
    select: Piece = false_alarms

    def __post_init__(self) -> None:
        check(self)
        require_names("ranking", self.ranking, _RANKING)
        require_names("detector", self.detector, _DETECTOR)
        require_names("select", self.select, _SELECT)


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Add a loss at divergent points, by a weight (§3, §5.2).

    Attributes:
      loss: names what it needs -> f32[B, M], one number a candidate. Naming
        ``branch_hidden`` [B, M, K, D] lets the student read the teacher's
        branches; ``teacher_window_hidden`` keeps the teacher's states there.
      weight: lambda.
      share: of a run's steps, the first ones; after them nothing looks ahead,
        unless a weight does.
    """

    loss: Piece
    weight: float = setting(
        0.1, "lambda of L = L_OPD + lambda L_traj", least=0, most=1e6
    )
    share: float = setting(
        1.0, "of a run's steps that guide, from the first on", above=0, most=1
    )

    def __post_init__(self) -> None:
        check(self)
        require_names("guidance", self.loss, _GUIDANCE)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Say what a step minimizes; see :mod:`topd_jax.objectives.presets`.

    Attributes:
      token_loss: (student_logp [R, V], teacher_logp [R, V]) -> [R]; may name
        ``tokens`` i32[R] and ``uniforms`` f32[R] (draws in 0..1) besides.
      temperature: divides both models' logits in ``token_loss``.
      token_weights: each names what it needs -> f32[B, T], 0 outside the
        mask; they are multiplied. One marked by :func:`row_wise` is computed
        from each row alone, at no extra pass of the student.
      near_future: None: nothing looks ahead.
      guidance: None: no second loss.
      statistics: name -> function of (student_logp, teacher_logp) and, if it
        names them, tokens; what weights may name beside :data:`STATISTICS`.
    """

    token_loss: TokenLoss = divergences.reverse_kl
    temperature: float = setting(
        1.0, "of both models' logits in the token loss", above=0, most=1e6
    )
    token_weights: tuple[Piece, ...] = ()
    near_future: NearFuture | None = None
    guidance: Guidance | None = None
    # Without a hash of its own: objectives are static arguments of jax.jit.
    statistics: Mapping[str, Piece] = dataclasses.field(
        default_factory=dict, hash=False
    )

    def __post_init__(self) -> None:
        check(self)
        _require_kinds(self)
        require_rows("token_loss", self.token_loss, {"tokens", "uniforms"})
        for name, statistic in self.statistics.items():
            require_rows(f"statistics[{name!r}]", statistic, {"tokens"})
        names = TOKENS | {*STATISTICS, *self.statistics, "token_loss"}
        for weight in self.token_weights:
            require_names("token_weights", weight, names | FUTURES)
        ahead = [w for w in self.token_weights if needs(w) & FUTURES]
        ahead += [] if self.guidance is None else [self.guidance.loss]
        if ahead and self.near_future is None:
            raise ValueError(
                f"{spelled(ahead[0])} needs candidates; give the objective a "
                "near_future=NearFuture(...)"
            )
        detector = self.near_future and self.near_future.detector
        if isinstance(detector, FutureLoss) and "plan" in self.named:
            raise ValueError(NO_PLAN)

    def phases(self, steps: int) -> tuple[tuple[int, "Objective"], ...]:
        """Return what a run minimizes in turn, each with its last step.

        Args:
          steps: of the run.
        """
        guided = steps
        if self.guidance is not None:
            guided = math.ceil(self.guidance.share * steps - 1e-9)
        if guided == steps:
            return ((steps, self),)
        ahead = self.near_future
        if not any(needs(w) & FUTURES for w in self.token_weights):
            ahead = None
        plain = dataclasses.replace(self, near_future=ahead, guidance=None)
        return ((guided, self), (steps, plain))

    @property
    def named(self) -> frozenset[str]:
        """Return all that weights, detector and guidance name."""
        pieces = list(self.token_weights)
        if self.near_future is not None:
            pieces.append(self.near_future.detector)
        if self.guidance is not None:
            pieces.append(self.guidance.loss)
        return frozenset().union(*map(needs, pieces))

    @property
    def draws(self) -> bool:
        """Return whether a piece names ``uniforms``."""
        named = self.named | needs(self.token_loss, after=2)
        if self.near_future is not None:
            named |= needs(self.near_future.ranking)
        return "uniforms" in named

    @property
    def needs_branches(self) -> bool:
        """Return whether the teacher continues the candidates' prefixes."""
        return self.near_future is not None and bool(
            self.named
            & {"teacher_windows", "branch_hidden", "teacher_window_hidden"}
        )

    @property
    def needs_window_hidden(self) -> bool:
        """Return whether the teacher's states on its branches are kept."""
        return "teacher_window_hidden" in self.named

    @property
    def trains_on_branch(self) -> bool:
        """Return whether the student reads the teacher's branches."""
        return "branch_hidden" in self.named

    @property
    def batch_weights(self) -> tuple[Piece, ...]:
        """Return the weights that need the whole batch at once."""
        return tuple(w for w in self.token_weights if not is_row_wise(w))

    @property
    def row_weights(self) -> tuple[Piece, ...]:
        """Return the weights that each row gives by itself."""
        return tuple(w for w in self.token_weights if is_row_wise(w))

    def compares(self, pieces: tuple[Piece, ...]) -> frozenset[str]:
        """Return what pieces name that both models' distributions say."""
        names = frozenset().union(*map(needs, pieces))
        return names & {*STATISTICS, *self.statistics, "token_loss"}

    @property
    def branch_fraction(self) -> float:
        """Return the share of the candidates that are looked at."""
        given = self.near_future.branch_fraction
        if given is not None:
            return given
        weighed = any(needs(w) & FUTURES for w in self.token_weights)
        return 1 / 3 if self.trains_on_branch and not weighed else 1.0

    @property
    def branches(self) -> int:
        """Return the slots a row of candidates that are looked at."""
        count = self.near_future.candidates
        return math.ceil(self.branch_fraction * count - 1e-9)

    @property
    def needs_student(self) -> bool:
        """Return whether scoring needs the student's states."""
        pieces = self.batch_weights
        if self.near_future is not None:
            pieces += (self.near_future.ranking,)
        return bool(self.compares(pieces))


def _require_kinds(objective: Objective) -> None:
    """Raise ValueError for a piece in a place that is not its own."""
    for name, kind, example in (
        ("token_weights", tuple, "(weight,)"),
        ("near_future", NearFuture | None, "NearFuture(...)"),
        ("guidance", Guidance | None, "Guidance(loss)"),
        ("statistics", Mapping, "{'name': statistic}"),
    ):
        value = getattr(objective, name)
        if not isinstance(value, kind):
            raise ValueError(f"{name}={value!r} must be like {name}={example}")
