"""Decoders: their shape, their arithmetic, their files."""

from topd_jax.models.attention import Cache
from topd_jax.models.config import DecoderConfig, RopeScaling
from topd_jax.models.decoder import (
    Decoder,
    cast,
    causal_mask,
    init_decoder,
    unembed,
)
from topd_jax.models.export import save_model
from topd_jax.models.loading import load
from topd_jax.models.parameters import parameter_table
from topd_jax.models.quantize import dequantize, quantize
from topd_jax.models.weights import drop_layers, fingerprint

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "RopeScaling",
    "cast",
    "causal_mask",
    "dequantize",
    "drop_layers",
    "fingerprint",
    "init_decoder",
    "load",
    "parameter_table",
    "quantize",
    "save_model",
    "unembed",
]
