"""The weights in GGUF files, by the names that safetensors files give them.

Quantized tensors are expanded to floats piece by piece, when they are read.
The ``gguf`` package maps the names. What llama.cpp's converter changes is
undone here:

* it pairs neighboring rotary dimensions where Hugging Face pairs the two
  halves of a head, so it reorders the rows of q and k of the Llama family;
* of norms that scale by 1 + w it writes 1 + w;
* of a delta rule it writes -exp(A_log), and value heads that take turns by
  their key head, where safetensors files have those of one key head together.
"""

import dataclasses
import re

import gguf
import numpy as np

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder
from topd_jax.models.frequencies import frequencies
from topd_jax.models.io.families import family_of
from topd_jax.models.io.fused import TensorInfo
from topd_jax.models.io.gguf import FURTHER_LAYERS, ROPE_FREQS, GGUFFile
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
    # Layers that predict further tokens, after those of the decoder.
    count = file.metadata.get(f"{family.gguf}.{FURTHER_LAYERS}", 0)
    further = tuple(f"blk.{config.layers + i}." for i in range(count))
    tensors = {
        names.get(name, name): tensor
        for name, tensor in file.tensors.items()
        if name != ROPE_FREQS and not name.startswith(further)
    }
    layouts = _layouts(config, permuted=family.gguf_permuted)

    def layout(name: str) -> _Layout:
        kind = name.partition(".layers.")[2].partition(".")[2]
        centered = config.centered_norms and name.endswith("norm.weight")
        return layouts.get(kind, _Layout(centered=centered))

    def read(name: str, index: tuple[slice | np.ndarray, ...]) -> np.ndarray:
        tensor = tensors[name]
        try:
            return layout(name).read(tensor, index)
        except NotImplementedError:
            raise ValueError(
                f"{file.path}: {tensor.name} is quantized as "
                f"{tensor.tensor_type.name}, which the gguf package cannot "
                "expand; convert the file to Q8_0 or F16"
            ) from None

    infos = {  # every quantization is expanded to float32
        name: TensorInfo(layout(name).shape_of(x), "float32")
        for name, x in tensors.items()
    }
    return assemble(config, infos, read, placement, str(file.path))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the numbers of a tensor are in a file.

    Attributes:
      rows: the file's row of each row; None: as they are.
      columns: the same of columns.
      lacks: the dimension of size 1 that files leave out, if any.
      centered: one is to be subtracted.
      negated: the logarithm of the negated is to be taken.
    """

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    lacks: int | None = None
    centered: bool = False
    negated: bool = False

    def shape_of(self, tensor: gguf.ReaderTensor) -> tuple[int, ...]:
        """Return the shape that safetensors files give it."""
        shape = [int(size) for size in reversed(tensor.shape)]
        if self._missing(tensor):
            shape.insert(self.lacks, 1)
        return tuple(shape)

    def read(self, tensor: gguf.ReaderTensor, index: tuple) -> np.ndarray:
        """Read a part of it, by the index of safetensors files."""
        index, missing = list(index), self._missing(tensor)
        if missing:
            del index[self.lacks]
        if self.rows is not None:
            index[0] = self.rows[index[0]]
        columns = slice(None)
        if self.columns is not None:
            columns = self.columns[index[-1]]
            index[-1] = slice(0, len(self.columns))
        part = _expand(tensor, tuple(index))[..., columns]
        if missing:
            part = np.expand_dims(part, self.lacks)
        part = np.log(-part) if self.negated else part
        return part - 1 if self.centered else part

    def _missing(self, tensor: gguf.ReaderTensor) -> bool:
        whole = 2 if self.lacks == 0 else 3
        return self.lacks is not None and len(tensor.shape) < whole


def _layouts(config: DecoderConfig, permuted: bool) -> dict[str, _Layout]:
    """Return tensor, after its layer's name -> its layout, of those changed."""
    layouts = {
        # Converters write it in either way.
        "mlp.shared_expert_gate.weight": _Layout(lacks=0),
    }
    if permuted:
        for name, heads in ("q", config.heads), ("k", config.kv_heads):
            rows = _unpermuted_rows(heads * config.head_dim, heads)
            layouts[f"self_attn.{name}_proj.weight"] = _Layout(rows)
    if not config.recurrent:
        return layouts
    each, keys = _value_heads(config), config.delta_key_heads
    values = _value_heads(config, config.delta_value_dim)
    kept = 2 * keys * config.delta_key_dim
    mixed = np.concatenate([np.arange(kept), kept + values])
    return layouts | {
        f"linear_attn.{name}": layout
        for name, layout in (
            ("in_proj_qkv.weight", _Layout(mixed)),
            ("conv1d.weight", _Layout(mixed, lacks=1)),
            ("in_proj_z.weight", _Layout(values)),
            ("in_proj_a.weight", _Layout(each)),
            ("in_proj_b.weight", _Layout(each)),
            ("dt_bias", _Layout(each)),
            ("A_log", _Layout(each, negated=True)),
            ("out_proj.weight", _Layout(columns=values)),
            ("norm.weight", _Layout()),
        )
    }


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
        known = stem.replace("linear_attn.dt_bias", "linear_attn.dt_proj.bias")
        names[table.get_name(known, (".weight", ".bias"))] = stem
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


def _value_heads(config: DecoderConfig, size: int = 1) -> np.ndarray:
    """Locate each row of value heads, (key head, turn, row), in the file."""
    rows = np.arange(config.delta_value_heads * size)
    return rows.reshape(-1, config.delta_key_heads, size).swapaxes(0, 1).ravel()


def _unpermuted_rows(count: int, heads: int) -> np.ndarray:
    """Locate each row of q or k, (head, half, pair), in the file."""
    rows = np.arange(count).reshape(heads, count // heads // 2, 2)
    return rows.swapaxes(1, 2).reshape(count)
