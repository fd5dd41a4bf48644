"""The ``config.json`` of a model directory, read strictly and written.

The family's own config class of ``transformers`` reads the file: it knows the
defaults, the older spellings and the types of its fields. A field that the
class reads and this decoder does not must be at its default, and one that
nobody has heard of is refused, because a field silently ignored (Tunix's
``rope_theta``) is a different model.

One table, :func:`_spelling`, serves reading and writing. Beside it stand the
fields that differ between layers (``sliding_window``, ``layer_types``,
``no_rope_layers``), and RoPE (:mod:`topd_jax.models.io.hub_rope`).
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from topd_jax.models.config import DecoderConfig
from topd_jax.models.io.families import FAMILIES, Family, family_of
from topd_jax.models.io.hub_rope import (
    FULL,
    LINEAR,
    SLIDING,
    read_rope,
    write_rope,
)
from topd_jax.models.io.hub_values import FIXED, HARMLESS, wrong_value
from topd_jax.models.io.wrappers import text_fields

# Fields that every file must have.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
}

_COMMON = {
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
}

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
}

# What config classes turn into layers, experts and RoPE; the first also where
# they have no such field of their own.
_OLD_SPELLINGS = {
    "rope_theta", "rope_scaling", "rope_local_base_freq",
    "sliding_window_pattern",
}  # fmt: skip
_LAYERS = {
    "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "no_rope_layers", "no_rope_layer_interval",
    "rope_parameters", "num_local_experts",
}  # fmt: skip


def decoder_config(
    fields: Mapping[str, object], *, where: str
) -> DecoderConfig:
    """Read the fields of a ``config.json``.

    Args:
      fields: the parsed file.
      where: the file, for errors.

    Returns:
      The decoder's shape, in float32.

    Raises:
      ValueError: listing every missing, unsupported and unknown field.
    """
    fields = text_fields(fields, where)
    family = family_of(fields.get("model_type"), where)
    defaults = _hub_defaults(family.model_type)
    required = [name for name in _REQUIRED if name in defaults]
    given = dict.fromkeys(required) | dict(fields)
    read = _read_names(family)
    problems = [
        problem
        for name, value in given.items()
        if name in read
        # Beside layer_types a pattern says nothing.
        if name != "sliding_window_pattern" or not given.get("layer_types")
        for problem in wrong_value(name, value)
    ]
    problems += _unread(fields, family)
    _refuse(where, problems)
    layers = given["num_hidden_layers"]
    problems += [
        f"{name}={given[name]!r:.60} must have one entry a layer, {layers}"
        for name in ("layer_types", "no_rope_layers")
        if name in read and given.get(name) is not None
        if len(given[name]) < layers
    ]
    _refuse(where, problems)
    hub = _hub_class_read(fields, family, where)
    options: dict[str, Any] = dict(family.options)
    for name, targets in _spelling(family).items():
        value = getattr(hub, name, None)
        if name == "head_dim" and value is None:
            value = hub.hidden_size // hub.num_attention_heads
            problems += wrong_value(name, value)
        elif name == "num_key_value_heads" and value is None:
            value = hub.num_attention_heads  # Qwen2-MoE's class leaves null
        elif not hasattr(hub, name):  # of a newer transformers
            continue
        options |= dict.fromkeys(targets, value)
    activation = getattr(hub, family.activation)
    if activation not in _ACTIVATIONS:
        problems.append(
            f"{family.activation}={activation!r} is not supported, only "
            f"{', '.join(_ACTIVATIONS)}"
        )
    options["activation"] = _ACTIVATIONS.get(activation)
    options |= _read_layers(hub, family, problems)
    size = options["head_dim"]
    longest = getattr(hub, "max_position_embeddings", None)
    options |= read_rope(hub.rope_parameters, family, size, longest, problems)
    _refuse(where, problems)
    try:
        return DecoderConfig(**options)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def config_json(
    config: DecoderConfig,
    model_type: str | None = None,
    extra: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return the ``config.json`` of a decoder, the inverse of the above.

    Args:
      config: the decoder's shape.
      model_type: a family; None takes the first that can hold the decoder.
      extra: fields that do not change the logits (special ids, lengths);
        the decoder's own are kept, of "longrope" the lengths too.

    Returns:
      The fields. RoPE is spelled in both ways, for transformers 4 and 5.

    Raises:
      ValueError: where the family cannot hold this decoder, or ``extra``
        would change the network.
    """
    harmful = sorted(set(extra or ()) - HARMLESS)
    if harmful:
        raise ValueError(
            f"extra={harmful} would change, or is not known to leave alone, "
            "what the decoder computes; only fields such as bos_token_id or "
            "max_position_embeddings may be given"
        )
    if model_type is None:
        fitting = (n for n, row in FAMILIES.items() if not _lost(config, row))
        if (model_type := next(fitting, None)) is None:
            raise ValueError(
                f"no family holds this decoder: {config}; the nearest, "
                f"model_type='llama', loses {_lost(config, FAMILIES['llama'])}"
            )
    family = family_of(model_type, "model_type")
    if lost := _lost(config, family):
        raise ValueError(
            f"a decoder with {lost} cannot be written as "
            f"model_type={model_type!r}; leave model_type out"
        )
    own = _fields(config, family)
    return own | {n: v for n, v in (extra or {}).items() if n not in own}


def _spelling(family: Family) -> dict[str, tuple[str, ...]]:
    """Return field of ``config.json`` -> fields of the decoder it sets."""
    common = _REQUIRED | _COMMON
    return {name: (field,) for name, field in common.items()} | family.reads


@functools.lru_cache
def _hub_defaults(model_type: str) -> dict[str, object]:
    """Return the fields of a family's config class, at their defaults."""
    # Slow to import, and needed for Hugging Face models only.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]().to_dict()


def _hub_class_read(
    fields: Mapping[str, object], family: Family, where: str
) -> Any:
    """Let the family's config class read what changes the network."""
    known = _hub_defaults(family.model_type).keys() - {"dtype", "model_type"}
    known |= _OLD_SPELLINGS | _spelling(family).keys()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # Ids that a file leaves out; a class's own may lie beyond the vocabulary,
    # and it warns.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    given = ids | {n: copy.deepcopy(v) for n, v in fields.items() if n in known}
    scaling = given.get("rope_scaling") or {}
    if (
        scaling.get("type") == "su"
    ):  # its first name, which the class half knows
        scaling["type"] = "longrope"
    try:
        return CONFIG_MAPPING[family.model_type](**given)
    except Exception as error:  # validators raise many unrelated types
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where} cannot be read: transformers refuses it as "
            f"{family.architecture} ({type(error).__name__}: {reason})"
        ) from error


def _read_names(family: Family) -> set[str]:
    """Return the fields that change the network and that are read."""
    defaults = _hub_defaults(family.model_type)
    read = {"rope_theta", "rope_scaling", family.activation}
    read |= _spelling(family).keys() | (_LAYERS & defaults.keys())
    if "_sliding_window_pattern" in defaults:
        read |= _OLD_SPELLINGS
    return read


def _unread(fields: Mapping[str, object], family: Family) -> list[str]:
    """List the fields that change the network and that nobody here reads."""
    defaults = _hub_defaults(family.model_type)
    read = _read_names(family) | HARMLESS | {"model_type"}
    problems = []
    for name, value in fields.items():
        twice = name == "hidden_act" and value == fields.get(family.activation)
        if name in read or twice:  # Gemma's files spell it twice
            continue
        packed = isinstance(value, Mapping) and value.get("quant_method")
        if name == "quantization_config" and packed == family.packed != "":
            continue
        allowed = FIXED.get(name, ())
        if name in defaults:
            allowed = (*allowed, defaults[name])
        if allowed and value not in allowed:
            problems.append(
                f"{name}={value!r} is not supported, only {allowed[0]!r}"
            )
        elif not allowed:
            problems.append(
                f"{name}={value!r} is not known; if the model's reference "
                "does not read it, delete it from the file (of a hub name, "
                "from that of a download of your own)"
            )
    return problems


def _refuse(where: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{where} cannot be read:\n  " + "\n  ".join(problems))


def _fields(config: DecoderConfig, family: Family) -> dict[str, object]:
    """Spell a decoder as a family does, whether or not that loses something."""
    defaults = _hub_defaults(family.model_type)
    activations = {field: name for name, field in _ACTIVATIONS.items()}
    fields: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        family.activation: activations[config.activation],
    }
    for name, targets in _spelling(family).items():
        if targets and (name in defaults or name not in _REQUIRED):
            fields[name] = getattr(config, targets[0])
    if "query_pre_attn_scalar" in fields and config.query_scalar is None:
        fields["query_pre_attn_scalar"] = config.head_dim
    if "attention_multiplier" in fields:
        fields["attention_multiplier"] = config.attention_scale
    fields |= _write_layers(config, family)
    return fields | write_rope(config, family)


def _lost(config: DecoderConfig, family: Family) -> str:
    """List the fields that would be read differently: "name=value, …"."""
    try:
        back = decoder_config(_fields(config, family), where="")
    except ValueError as error:
        return str(error)
    want, got = _effective(config), _effective(back)
    return ", ".join(
        f"{name}={value!r}"
        for name, value in dataclasses.asdict(want).items()
        if dataclasses.asdict(got)[name] != value
    )


def _effective(config: DecoderConfig) -> DecoderConfig:
    """Spell configs of the same arithmetic in one way."""
    none: dict[str, Any] = {} if any(config.sliding) else {"window": None}
    same = config.local_rope_theta == config.rope_theta
    if not any(config.sliding) or (same and config.rope_scaling is None):
        none["local_rope_theta"] = None
    if config.experts:
        none["mlp_width"] = 0
    return dataclasses.replace(
        config,
        **none,
        query_scalar=None,
        long_rope=False,
        attention_multiplier=config.attention_scale,
        dtype="float32",
        param_dtype="float32",
        remat="none",
        unroll=1,
        attention="blocks",
    )


def _read_layers(
    hub: Any, family: Family, problems: list[str]
) -> dict[str, object]:
    """Read which layers slide, their window, and which are not rotated."""
    options: dict[str, object] = {}
    if hasattr(hub, "no_rope_layers"):
        turned = hub.no_rope_layers[: hub.num_hidden_layers]
        options["no_rope"] = tuple(not turn for turn in turned)
    window = getattr(hub, "sliding_window", None)
    kinds = getattr(hub, "layer_types", None)
    if kinds is None:  # classes without the field slide everywhere
        kinds = [FULL if window is None else SLIDING] * hub.num_hidden_layers
    other = LINEAR if hasattr(hub, "linear_num_key_heads") else SLIDING
    if not set(kinds) <= {FULL, other}:
        problems.append(
            f"layer_types={sorted(set(kinds))} is not supported, only "
            f"{other} and {FULL}"
        )
    options["recurrent"] = tuple(kind == LINEAR for kind in kinds)
    if family.full_unturned and window is not None:
        options["no_rope"] = tuple(kind == FULL for kind in kinds)
    if SLIDING not in kinds:
        return options
    switched_off = not getattr(hub, "use_sliding_window", True)
    if switched_off or not window:
        problems.append(
            f"sliding_window={window!r} must be a positive integer where "
            f"layer_types has {SLIDING!r}"
            + (", and use_sliding_window true" if switched_off else "")
        )
    sliding = tuple(kind == SLIDING for kind in kinds)
    return options | {"window": window, "sliding": sliding}


def _write_layers(config: DecoderConfig, family: Family) -> dict[str, object]:
    """Invert :func:`_read_layers`, as far as the family can spell it."""
    fields: dict[str, object] = {}
    known = _hub_defaults(family.model_type)
    sliding = config.sliding or (False,) * config.layers
    if "layer_types" in known:
        recurrent = config.recurrent or (False,) * config.layers
        fields["layer_types"] = [
            SLIDING if s else LINEAR if r else FULL
            for s, r in zip(sliding, recurrent, strict=True)
        ]
    if "use_sliding_window" in known:
        fields["use_sliding_window"] = any(sliding)
    # Where no layer slides, Gemma's class still needs its default.
    turned = family.full_unturned and not config.no_rope
    if any(sliding) or "layer_types" not in known or turned:
        fields["sliding_window"] = config.window if any(sliding) else None
    if "no_rope_layers" in known:
        still = config.no_rope or (False,) * config.layers
        fields["no_rope_layers"] = [int(not n) for n in still]
    return fields
