"""Students and teachers: the decoder, its arithmetic, its files.

The paper trains existing models and says nothing of their code: this room is
ours. See ``README.md`` here for the files in reading order.
"""

from topd_jax.models.attention.cache import Cache
from topd_jax.models.attention.masks import causal_mask
from topd_jax.models.config import DecoderConfig, Lora
from topd_jax.models.decoder import (
    Decoder,
    cast,
    drop_layers,
    in_compute_dtype,
    init_decoder,
    unembed,
)
from topd_jax.models.fingerprint import fingerprint
from topd_jax.models.frequencies import RopeScaling
from topd_jax.models.io.export import save_model
from topd_jax.models.io.loading import Description, describe, load
from topd_jax.models.io.peft import load_adapter, save_adapter
from topd_jax.models.lora import add_lora, merge_lora
from topd_jax.models.parameters import parameter_table
from topd_jax.models.protocol import LanguageModel, from_function
from topd_jax.models.quantization import dequantize, quantize

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Description",
    "LanguageModel",
    "Lora",
    "RopeScaling",
    "add_lora",
    "cast",
    "causal_mask",
    "dequantize",
    "describe",
    "drop_layers",
    "fingerprint",
    "from_function",
    "in_compute_dtype",
    "init_decoder",
    "load",
    "load_adapter",
    "merge_lora",
    "parameter_table",
    "quantize",
    "save_adapter",
    "save_model",
    "unembed",
]
