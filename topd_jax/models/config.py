"""The shape of a decoder, as one frozen dataclass."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that fixes a decoder's parameters and arithmetic.

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
      dtype: compute dtype of activations, "float32" or "bfloat16".
      param_dtype: dtype in which parameters are kept.
      remat: "none", "full" (recompute each layer in the backward pass) or
        "dots" (keep matrix products).
      unroll: layers unrolled in the scan; ``layers`` for small stacks on CPU.
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
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be 'float32' or "
                    "'bfloat16'"
                )
        if self.remat not in ("none", "full", "dots"):
            raise ValueError(
                f"remat={self.remat!r} must be 'none', 'full' or 'dots'"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} must be divisible by kv_heads="
                f"{self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary embedding "
                "turns pairs"
            )
