"""The shape of a decoder, as one frozen dataclass."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from topd_jax.models.frequencies import RopeScaling


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside some linear maps (LoRA, arXiv:2106.09685).

    Attributes:
      rank: r, inner size of every adapter.
      alpha: the adapters' output is multiplied by alpha / r.
      targets: parameters that have one, of :data:`LORA_TARGETS` and
        :data:`DELTA_TARGETS`.
      rank_stabilized: multiplied by alpha / sqrt(r) instead
        (arXiv:2312.03732).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha} must be above 0")
        known = LORA_TARGETS + DELTA_TARGETS
        if set(self.targets) - set(known) or not self.targets:
            raise ValueError(
                f"targets={self.targets!r} must be some of {', '.join(known)}"
            )
        ordered = tuple(t for t in known if t in self.targets)
        object.__setattr__(self, "targets", ordered)  # one spelling

    @property
    def scale(self) -> float:
        """Return the factor of the adapters' output."""
        return self.alpha / (
            self.rank**0.5 if self.rank_stabilized else self.rank
        )


# Parameters that may have an adapter, and those of recurrent layers.
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
DELTA_TARGETS = ("delta_qkv", "delta_z", "delta_qkvz", "delta_o")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that fixes a decoder's parameters and arithmetic.

    Fields that differ between layers are tuples of one bool a layer; () means
    False throughout.

    Attributes:
      vocab_size: rows of the embedding and of the output head.
      layers: decoder layers.
      width: D, size of the hidden states.
      heads: query heads.
      kv_heads: key and value heads; divides ``heads``.
      head_dim: size of one head; need not be ``width / heads``.
      mlp_width: inner size of the gated feed-forward layer.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
      tied: the output head is the embedding.
      qk_norm: RMSNorm over each head's query and key (Qwen3).
      wide_qk_norm: RMSNorm over all heads' queries and keys together (OLMo 2).
      attention_bias: q, k and v have biases (Qwen2).
      output_bias: the attention's output has a bias.
      attention_gate: the attention's output is multiplied by the sigmoid of
        a gate, which q makes beside each query (Qwen3-Next).
      mlp_bias: the feed-forward layer has biases.
      pre_norms: RMSNorm before attention and feed-forward.
      post_norms: RMSNorm after each of them, before the residual sum.
      centered_norms: norms scale by 1 + w (Gemma).
      activation: of the gate: "silu", "gelu" or "gelu_tanh".
      scaled_embedding: embeddings are multiplied by sqrt(width) (Gemma).
      query_scalar: scores are divided by its root; None is ``head_dim``.
      attention_multiplier: scores are multiplied by it instead (Granite).
      embedding_multiplier: embeddings are multiplied by it (Granite).
      residual_multiplier: what attention and feed-forward add is multiplied
        by it (Granite).
      logits_scaling: logits are divided by it (Granite).
      sinks: a score of each head, learned, stands beside those of the keys in
        the softmax (gpt-oss); not with ``attention="flash"``.
      attention_softcap: c of c * tanh(score / c); None is off (Gemma 2).
      final_softcap: the same for the logits.
      rope_scaling: stretching of the rotary frequencies.
      long_rope: its long factors are in use; see :meth:`for_rows`.
      local_rope_theta: base in sliding layers, never stretched; None is the
        same as elsewhere (Gemma 3).
      rotary_dim: first elements of each head that are turned; None is all of
        them (Phi-4-mini).
      interleaved_rope: the pairs that are turned are neighbors (GLM-4).
      no_rope: layers whose queries and keys are not turned (SmolLM3).
      window: keys that a sliding layer attends to, the token's included.
      sliding: layers that attend to ``window`` keys only.
      recurrent: layers that keep a recurrent state in the place of attention
        (:mod:`topd_jax.models.delta_rule`).
      delta_key_heads: heads of queries and keys in these; divides
        ``delta_value_heads``.
      delta_value_heads: heads of values, and states of a layer.
      delta_key_dim: size of a query and of a key.
      delta_value_dim: size of a value.
      delta_conv: tokens that the convolution before them reads.
      delta_grouped: one map makes queries, keys, values and gates, key head
        after key head (Qwen3-Next).
      experts: E, feed-forward networks to choose from; 0 is one, dense.
      experts_per_token: how many of them read each token.
      expert_width: inner size of an expert.
      shared_expert_width: inner size of an expert that reads every token,
        weighed by a sigmoid; 0: there is none (Qwen2-MoE).
      expert_biases: router and experts have biases (gpt-oss).
      swiglu_limit: L of experts that compute (u + 1) g sigmoid(a g), the gate
        g at most L and u in -L..L; None is the gate's activation (gpt-oss).
      swiglu_alpha: a of the same.
      renormalize: weights of the chosen experts sum to one.
      lora: adapters beside the linear maps; None: there are none.
      dtype: compute dtype of activations, "float32" or "bfloat16".
      param_dtype: dtype in which parameters are kept.
      remat: "none", "full" (recompute each layer in the backward pass) or
        "dots" (keep matrix products).
      unroll: layers unrolled in the scan; ``layers`` for small stacks on CPU.
      attention: of many queries: "blocks" of them at a time, or "flash", by
        the kernels of :mod:`topd_jax.models.attention.flash` on TPU and by
        :mod:`topd_jax.models.attention.cudnn` on GPU, and of the one of a
        token that is decoded by
        :mod:`topd_jax.models.attention.flash_decode` on TPU.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True
    qk_norm: bool = False
    wide_qk_norm: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    attention_gate: bool = False
    mlp_bias: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    centered_norms: bool = False
    activation: str = "silu"
    scaled_embedding: bool = False
    query_scalar: float | None = None
    attention_multiplier: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    sinks: bool = False
    attention_softcap: float | None = None
    final_softcap: float | None = None
    rope_scaling: RopeScaling | None = None
    long_rope: bool = False
    local_rope_theta: float | None = None
    rotary_dim: int | None = None
    interleaved_rope: bool = False
    no_rope: tuple[bool, ...] = ()
    window: int | None = None
    sliding: tuple[bool, ...] = ()
    recurrent: tuple[bool, ...] = ()
    delta_key_heads: int = 0
    delta_value_heads: int = 0
    delta_key_dim: int = 0
    delta_value_dim: int = 0
    delta_conv: int = 0
    delta_grouped: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    shared_expert_width: int = 0
    expert_biases: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    renormalize: bool = False
    lora: Lora | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: str = "blocks"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of "
                    f"{', '.join(map(repr, choices))}"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} must be divisible by kv_heads="
                f"{self.kv_heads}"
            )
        if self.sinks and self.attention == "flash":
            raise ValueError(
                "attention='flash' has no kernel for the attention sinks of "
                "this model; use attention='blocks'"
            )
        if self.rotary_dim == self.head_dim:  # one spelling of "all"
            object.__setattr__(self, "rotary_dim", None)
        turned = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if turned % 2 or not 2 <= turned <= self.head_dim:
            raise ValueError(
                f"rotary_dim={turned} must be even and in 2..{self.head_dim}, "
                "the head_dim: rotary embedding turns pairs"
            )
        if self.rope_scaling is not None:
            self.rope_scaling.check_pairs(turned // 2)
        for name in _PER_LAYER:
            given = getattr(self, name)
            if given and len(given) != self.layers:
                raise ValueError(
                    f"{name} has {len(given)} entries and must have one a "
                    f"layer, {self.layers}, or none at all"
                )
            if not any(given):  # one spelling of "nowhere"
                object.__setattr__(self, name, ())
        if any(self.sliding) and (self.window is None or self.window < 1):
            raise ValueError(
                f"window={self.window} must be positive where layers slide"
            )
        if any(self.recurrent):
            self._check_recurrent()
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must lie in "
                f"1..{self.experts}, the experts"
            )
        self._check_lora()

    def _check_lora(self) -> None:
        given = self.lora.targets if self.lora else ()
        missing = [name for name in given if name not in self.lora_targets]
        if missing:
            raise ValueError(
                f"lora targets {', '.join(missing)} are experts' in this "
                "model or not there, and experts have no adapters; take of: "
                f"{', '.join(self.lora_targets)}"
            )

    def _check_recurrent(self) -> None:
        if all(self.recurrent):
            raise ValueError(
                f"all {self.layers} layers are recurrent and at least one "
                "must be attention; keep one more layer"
            )
        sizes = {n: v for n, v in vars(self).items() if n.startswith("delta_")}
        if min(v for n, v in sizes.items() if n != "delta_grouped") < 1:
            raise ValueError(
                f"{sizes}: sizes must be at least 1 where layers are recurrent"
            )
        if self.delta_value_heads % self.delta_key_heads:
            raise ValueError(
                f"delta_value_heads={self.delta_value_heads} must be "
                f"divisible by delta_key_heads={self.delta_key_heads}"
            )

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Return the parameters that may have an adapter: all but experts."""
        targets = LORA_TARGETS[:4] if self.experts else LORA_TARGETS
        if not self.recurrent:
            return targets
        absent = DELTA_TARGETS[:2] if self.delta_grouped else ("delta_qkvz",)
        return targets + tuple(t for t in DELTA_TARGETS if t not in absent)

    @property
    def attention_scale(self) -> float:
        """Return the factor of the scores."""
        root = (self.query_scalar or self.head_dim) ** -0.5
        return self.attention_multiplier or root

    def keep_layers(self, keep: Sequence[int]) -> "DecoderConfig":
        """Return the same decoder with only the layers of these indices.

        Raises:
          ValueError: where ``keep`` is empty, unsorted or out of range.
        """
        keep, layers = list(keep), self.layers
        ascending = keep == sorted(set(keep))
        if not keep or not ascending or keep[0] < 0 or keep[-1] >= layers:
            raise ValueError(
                f"keep={keep} must be ascending layer indices, each once, "
                f"0..{layers - 1}; for instance {list(range(0, layers, 2))}"
            )
        kept = {
            name: tuple(getattr(self, name)[i] for i in keep)
            for name in _PER_LAYER
            if getattr(self, name)
        }
        return self.replace(layers=len(keep), **kept)

    def for_rows(self, length: int) -> "DecoderConfig":
        """Return the decoder for rows of up to ``length`` tokens.

        Which list of "longrope" is used is settled here, once for all tokens:
        keys that lie in a cache cannot be turned anew when a row grows long.

        Args:
          length: tokens; 0: not known, nothing changes.
        """
        scaling = self.rope_scaling
        if not length or scaling is None or scaling.kind != "longrope":
            return self
        return self.replace(long_rope=length > scaling.original_length)

    def require_rows(self, length: int, way_out: str) -> None:
        """Refuse rows that :meth:`for_rows` was not told of, if it matters.

        Args:
          length: tokens of the longest.
          way_out: for the error.

        Raises:
          ValueError: with the length from which on "longrope" changes.
        """
        if self.for_rows(length).long_rope and not self.long_rope:
            raise ValueError(
                f"a row has {length} tokens, and the model turns rows of more "
                f"than {self.rope_scaling.original_length:.0f} by its long "
                f"factors, which were not chosen for this run; {way_out}"
            )

    def replace(self, **changes: Any) -> "DecoderConfig":
        """Return the same config with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, as JSON can hold them; see :meth:`from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "DecoderConfig":
        """Read what :meth:`to_dict` wrote, or an older version of it.

        Args:
          fields: by name; those that are not there are at their default.

        Raises:
          ValueError: for a field that does not exist.
        """
        unknown = fields.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(
                f"unknown fields of a decoder: {', '.join(sorted(unknown))}; "
                "was this written by a newer version? install that one"
            )
        values = _with_tuples(fields)
        if values.get("rope_scaling") is not None:
            scaling = _with_tuples(values["rope_scaling"])
            values["rope_scaling"] = RopeScaling(**scaling)
        if values.get("lora") is not None:
            values["lora"] = Lora(**values["lora"])
        return cls(**values)


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
    }


_PER_LAYER = ("no_rope", "sliding", "recurrent")

_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": ("none", "full", "dots"),
    "attention": ("blocks", "flash"),
    "activation": ("silu", "gelu", "gelu_tanh"),
}
