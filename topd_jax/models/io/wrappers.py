"""The text model of checkpoints that hold an encoder of images beside it.

``config.json`` has its fields in ``text_config``; its tensors have a prefix.
"""

import re
from collections.abc import Mapping

from topd_jax.models.io.fused import TensorInfo
from topd_jax.models.io.streaming import Read

# model_type -> fields of the text model that files leave out.
WRAPPERS: dict[str, dict[str, object]] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "vocab_size": 262_208,
        "num_attention_heads": 8,
    },
    "mistral3": {"model_type": "mistral"},
    "qwen3_5": {"model_type": "qwen3_5_text"},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text"},
}
# Those that transformers loads whole, as a causal model too: layers of the text
# model have other names there than in a file of it alone.
LOADED_WHOLE = ("gemma3", "mistral3")
# What the whole says for its text model.
_OF_THE_WHOLE = ("tie_word_embeddings", "quantization_config", "eos_token_id")
_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?")
_IMAGES = re.compile(
    r"(?:model\.)?(?:vision_tower|multi_modal_projector|visual)\."
)


def text_fields(fields: Mapping[str, object], where: str) -> Mapping:
    """Return the fields of the text model.

    Args:
      fields: a parsed ``config.json``.
      where: the file, for the error.

    Returns:
      The fields as a file of the text model alone would have them; those that
      were given where there is nothing beside it.

    Raises:
      ValueError: where a file of several models has none for text.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return fields
    text = fields.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(
            f"{where}: text_config={text!r:.60} must be an object, the fields "
            f"of the text model of model_type={kind!r}"
        )
    whole = {name: fields[name] for name in _OF_THE_WHOLE if name in fields}
    return WRAPPERS[kind] | dict(text) | whole


def text_tensors(
    tensors: Mapping[str, TensorInfo], read: Read
) -> tuple[dict[str, TensorInfo], Read]:
    """Show the tensors of the text model, named as in a file of it alone.

    Args:
      tensors: of the file; none of them has a prefix where there is nothing
        beside the text model.
      read: (name, slices) -> that part of it.

    Returns:
      (tensors, read).
    """
    if not any(map(_TEXT.match, tensors)):
        return dict(tensors), read
    names = {}
    for name in tensors:
        if _IMAGES.match(name):
            continue
        rest = _TEXT.sub("", name, count=1) if _TEXT.match(name) else None
        if rest is not None and not rest.startswith("lm_head."):
            rest = f"model.{rest}"
        names[rest or name] = name
    shown = {new: tensors[name] for new, name in names.items()}
    return shown, lambda name, index: read(names[name], index)
