"""Shapes of models whose weights need not be here.

What a plan, and a compilation ahead of time, need of a model is its
``config.json``: of a directory or a file on this disk, from the hub's local
cache, or, for the models below, as published on the hub. Nothing is
downloaded.
"""

import json
import math
from pathlib import Path
from typing import Any

from topd_jax.models.config import DecoderConfig
from topd_jax.models.io.gguf import gguf_config, open_gguf, packaged_gguf
from topd_jax.models.io.hub_config import decoder_config
from topd_jax.models.parameters import parameter_table

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_act": "silu",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
    "use_sliding_window": False,
}

# Hub name -> the fields of its published config.json that shape the network.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-1.7B": _QWEN3
    | {
        "num_hidden_layers": 28,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000,
    },
    "Qwen/Qwen3-8B": _QWEN3
    | {
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
        "rope_theta": 1_000_000,
    },
    "Qwen/Qwen3-4B-Instruct-2507": _QWEN3
    | {
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": True,
        "rope_theta": 5_000_000,
    },
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _QWEN3
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
        "rope_theta": 10_000_000,
    },
}


def shape_of(source: str, **options: Any) -> DecoderConfig:
    """A model's shape, without its weights and without a network.

    Args:
      source: what :func:`topd_jax.models.load` takes.
      **options: dtype, param_dtype, remat, unroll; see
        :class:`~topd_jax.models.config.DecoderConfig`.

    Returns:
      The decoder's shape.

    Raises:
      ValueError: where neither a file nor the table tells it.
    """
    if source.startswith("package:"):
        path = packaged_gguf(source.removeprefix("package:"))
        return gguf_config(open_gguf(path), **options)
    if source.endswith(".gguf"):
        return gguf_config(open_gguf(source), **options)
    file = _config_file(source)
    if file is not None:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return decoder_config(fields, where=str(file), **options)
    if source in PUBLISHED:
        return decoder_config(PUBLISHED[source], where=source, **options)
    raise ValueError(
        f"no shape for {source!r}: it is no directory with a config.json, not "
        f"in the hub's local cache, and not one of {', '.join(PUBLISHED)}; "
        "give a directory that holds its config.json, weights are not needed"
    )


def parameters_read(config: DecoderConfig) -> int:
    """Parameters that one token meets, the output head included.

    The embedding is a lookup and does not count; of an expert layer only the
    chosen experts do.

    Args:
      config: the decoder's shape.

    Returns:
      Parameters; twice as many operations read a token forward.
    """
    total = config.vocab_size * config.width  # the head, tied or not
    for name, row in parameter_table(config).items():
        if row.axes[0] != "layers":
            continue
        size = math.prod(row.shape)
        if name.startswith("expert_"):
            size = size * config.experts_per_token // config.experts
        total += size
    return total


def _config_file(source: str) -> Path | None:
    path = Path(source) / "config.json"
    if path.is_file():
        return path
    if Path(source).exists() or source.count("/") != 1:
        return None
    import huggingface_hub  # slow to import, and needed here only

    found = huggingface_hub.try_to_load_from_cache(source, "config.json")
    return Path(found) if isinstance(found, str) else None
