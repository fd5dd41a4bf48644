"""What every phase of a step should cost, written down as formulas.

R rows, P + T = S columns, E = M (K - 1) tokens of branches, N layers of A
attention channels (heads x head size), C cached channels (kv heads x head
size), D width, W parameters of the layers, H = V D of the head; n devices, over
which rows and parameters are spread. Of the branches each token attends to S
columns of its prefix at the most, and to K of its own:

* prefill: P tokens a prompt, P^2 pairs a layer;
* decode: T times all parameters, and T (P + T / 2) cached columns a row;
* scoring: S tokens a row, S^2 pairs (masked ones are computed), T logits;
* branches: E tokens and logits a row, E (S + K) pairs, K^2 costs a window;
* update: three times S + E tokens and S^2 + E (S + K) pairs, T + M K logits.

Constants (how often an array is moved) are rough: what is compared is how a
formula grows from one doubling to the next. Ours; operations after
arXiv:2204.02311, appendix B.
"""

import dataclasses

from topd_jax.models.config import DecoderConfig
from topd_jax.models.io.shapes import parameters_read
from topd_jax.planning.programs import decoder_configs
from topd_jax.training.config import Settings

# Bytes of an element; and how often an activation of a layer, a score of the
# attention, and a logit are read or written.
_SIZE, _ACTIVATIONS, _SCORES, _LOGITS = 4.0, 24.0, 6.0, 8.0
# The fused losses: logits that exist at once, whatever the batch.
_BLOCK = 4 * 32 * 2.0**20


@dataclasses.dataclass(frozen=True)
class Work:
    """What a phase costs one device.

    Attributes:
      flops: of matrix products.
      bytes: moved from and to memory.
      temporaries: bytes alive at once, of its program.
      sent: bytes to other devices.
    """

    flops: float = 0.0
    bytes: float = 0.0
    temporaries: float = 0.0
    sent: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        both = zip(
            dataclasses.astuple(self), dataclasses.astuple(other), strict=True
        )
        return Work(*map(sum, both))


def formulas(settings: Settings, devices: int = 1) -> dict[str, Work]:
    """What each phase should cost one of ``devices``.

    Args:
      settings: of a run with one teacher.
      devices: n, all of them fsdp.

    Returns:
      "prefill", "decode", "scoring", "branches" and "update" -> work; the
      temporaries of prefill and decode are their one program's.
    """
    student, [(prompts, teacher)] = decoder_configs(settings)
    objective = settings.objective
    rows = prompts * settings.data.samples / devices
    first = settings.data.max_prompt_length
    new = settings.rollout.max_new_tokens
    whole, window = first + new, objective.window
    extra = objective.candidates * (window - 1)
    ahead = extra * (whole + window)
    ours = _Model(student, devices)
    theirs = _Model(teacher, devices)
    cache = rows * whole * ours.column
    prefill = ours.read(prompts / devices, first, first**2, 1)
    decode = dataclasses.replace(
        ours.read(rows, new, new * (first + new / 2), new),
        bytes=new * ours.bytes
        + rows * new * (first + new / 2) * ours.column
        + rows * new * ours.activations(1, 0, 1),
        temporaries=2 * cache + rows * (new + 4 * student.vocab_size) * _SIZE,
        sent=new * ours.gathered,
    )
    prefill = dataclasses.replace(prefill, temporaries=decode.temporaries)
    scoring = theirs.read(rows, whole, whole**2, new)
    branches = theirs.read(rows, extra, ahead, extra)
    costs = rows * objective.candidates * window**2
    branches += Work(
        bytes=2 * window * theirs.bytes
        + rows * ahead * theirs.column
        # Sinkhorn's 200 iterations at the most, and cosines.
        + 200 * 4 * _SIZE * costs,
        flops=2 * student.width * costs,
        temporaries=scoring.temporaries
        + rows * (whole + extra) * theirs.column
        + 4 * _SIZE * costs,
        sent=window * theirs.gathered,
    )
    pairs = whole**2 + (ahead if objective.trains_on_branch else 0)
    tokens = whole + (extra if objective.trains_on_branch else 0)
    logits = new + objective.candidates * window
    forward = ours.read(rows, tokens, pairs, logits)
    update = Work(
        flops=3 * forward.flops + theirs.head_flops * rows * new,
        bytes=3 * forward.bytes + 12 * ours.bytes / devices,
        # All layers' activations and scores wait for the way back.
        temporaries=ours.kept(rows, tokens, pairs)
        + min(_BLOCK, 4 * _SIZE * rows * logits * student.vocab_size)
        + 3 * ours.bytes,
        sent=3 * ours.gathered + theirs.gathered,
    )
    return {
        "prefill": prefill, "decode": decode, "scoring": scoring,
        "branches": branches, "update": update,
    }  # fmt: skip


class _Model:
    """The sizes of a model, on each of some devices."""

    def __init__(self, config: DecoderConfig, devices: int) -> None:
        c = self.config = config
        self.head_flops = 2.0 * c.vocab_size * c.width
        self.flops = 2.0 * parameters_read(c) - self.head_flops
        self.attention = c.heads * c.head_dim
        # Of all parameters, which a device works with whole.
        self.bytes = _SIZE * parameters_read(c)
        self.gathered = self.bytes * (devices - 1) / devices
        self.column = 2.0 * _SIZE * c.layers * c.kv_heads * c.head_dim

    def activations(self, tokens: float, pairs: float, logits: float) -> float:
        """Bytes that the activations of a row move."""
        c = self.config
        return _SIZE * (
            c.layers * _ACTIVATIONS * tokens * c.width
            + c.layers * _SCORES * pairs * c.heads
            + _LOGITS * logits * c.vocab_size
        )

    def kept(self, rows: float, tokens: float, pairs: float) -> float:
        """Bytes of what a forward pass keeps for its gradient."""
        c = self.config
        one = _ACTIVATIONS / 2 * tokens * c.width + 2 * pairs * c.heads
        return _SIZE * rows * c.layers * one

    def read(
        self, rows: float, tokens: float, pairs: float, logits: float
    ) -> Work:
        """One forward pass over some tokens of every row."""
        c = self.config
        scores = 4.0 * c.layers * self.attention * pairs
        head = self.head_flops * logits
        return Work(
            flops=rows * (self.flops * tokens + scores + head),
            bytes=self.bytes + rows * self.activations(tokens, pairs, logits),
            temporaries=self.kept(rows, tokens, pairs) / c.layers
            + min(_BLOCK, 4 * _SIZE * rows * logits * c.vocab_size),
            sent=self.gathered,
        )
