"""Decoders: their shape, their arithmetic, their files."""

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import (
    Cache,
    Decoder,
    cast,
    causal_mask,
    init_decoder,
    parameter_table,
    unembed,
)
from topd_jax.models.export import save_model
from topd_jax.models.loading import load
from topd_jax.models.weights import drop_layers, fingerprint

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "cast",
    "causal_mask",
    "drop_layers",
    "fingerprint",
    "init_decoder",
    "load",
    "parameter_table",
    "save_model",
    "unembed",
]
