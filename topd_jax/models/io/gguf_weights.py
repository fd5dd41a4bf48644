"""The weights in GGUF files, by the names that safetensors files give them.

Quantized tensors are expanded to floats piece by piece, when they are read.
llama.cpp pairs neighboring rotary dimensions where Hugging Face pairs the two
halves of a head, so its converter reorders the rows of q and k of the Llama
family; they are put back here. The ``gguf`` package maps the names.
"""

import re

import gguf
import numpy as np

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder
from topd_jax.models.frequencies import frequencies
from topd_jax.models.io.families import family_of
from topd_jax.models.io.fused import TensorInfo
from topd_jax.models.io.gguf import ROPE_FREQS, GGUFFile
from topd_jax.models.io.weights import Placement, assemble, file_tensors


def gguf_decoder(
    file: GGUFFile, config: DecoderConfig, placement: Placement
) -> Decoder:
    """Load a decoder from a GGUF file.

    Args:
      file: from :func:`open_gguf`.
      config: the decoder's shape.
      placement: of the parameters.

    Returns:
      The model, quantized tensors expanded.

    Raises:
      ValueError: for metadata that is not supported, or tensors that do not
        fit, all of them by name.
    """
    if ROPE_FREQS in file.tensors:
        _check_rope_freqs(file, config)
    architecture = file.metadata["general.architecture"]
    family = family_of(architecture, str(file.path), gguf=True)
    names = _hub_names(family.gguf, config)
    tensors = {
        names.get(name, name): tensor
        for name, tensor in file.tensors.items()
        if name != ROPE_FREQS
    }
    heads = {}
    if family.gguf_permuted:
        heads["q_proj.weight"] = config.heads
        heads["k_proj.weight"] = config.kv_heads

    def read(name: str, index: tuple[slice | np.ndarray, ...]) -> np.ndarray:
        tensor, kind = tensors[name], name.rpartition("self_attn.")[2]
        if kind in heads:
            rows, *others = index
            count = int(tensor.shape[-1])
            index = (_unpermuted_rows(count, heads[kind])[rows], *others)
        try:
            return _expand(tensor, index)
        except NotImplementedError:
            raise ValueError(
                f"{file.path}: {tensor.name} is quantized as "
                f"{tensor.tensor_type.name}, which the gguf package cannot "
                "expand; convert the file to Q8_0 or F16"
            ) from None

    infos = {  # every quantization is expanded to float32
        name: TensorInfo(tuple(map(int, reversed(x.shape))), "float32")
        for name, x in tensors.items()
    }
    return assemble(config, infos, read, placement, str(file.path))


def _check_rope_freqs(file: GGUFFile, config: DecoderConfig) -> None:
    plain = frequencies(config.rope_theta, config.head_dim)
    scaled = frequencies(
        config.rope_theta, config.head_dim, config.rope_scaling
    )
    want, divisors = plain / scaled, file.tensors[ROPE_FREQS].data
    fits = divisors.shape == want.shape
    if not fits or not np.allclose(divisors, want, rtol=1e-3):
        raise ValueError(
            f"{file.path}: {ROPE_FREQS} does not follow the rule of Llama 3.1 "
            "(factors 1 and 4, 8192 tokens); load the model's Hugging Face "
            "directory"
        )


def _hub_names(architecture: str, config: DecoderConfig) -> dict[str, str]:
    """Map names in the file to those in safetensors files.

    Experts are stacked in one tensor, named as one without a number.
    """
    numbers = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[architecture], config.layers)
    names = {}
    for tensor in file_tensors(config):
        stem = re.sub(r"experts\.\d+", "experts", tensor)
        names[table.get_name(stem, (".weight", ".bias"))] = stem
    return names


def _expand(tensor: gguf.ReaderTensor, index: tuple) -> np.ndarray:
    """Expand a part of a tensor, and only the blocks that it needs."""
    numbers, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    # asarray: a memmap's bookkeeping would double the time.
    data = np.asarray(tensor.data)
    *others, last = index
    if data.dtype == np.uint8:  # blocks of bytes, along the last dimension
        first, end = last.start // numbers, -(-last.stop // numbers)
        data = data[(*others, slice(first * size, end * size))]
        start = last.start - first * numbers
        part = slice(start, start + last.stop - last.start)
    else:
        data, part = data[index], slice(None)
    return gguf.dequantize(data, tensor.tensor_type)[..., part]


def _unpermuted_rows(count: int, heads: int) -> np.ndarray:
    """Locate each row of q or k, (head, half, pair), in the file."""
    rows = np.arange(count).reshape(heads, count // heads // 2, 2)
    return rows.swapaxes(1, 2).reshape(count)
