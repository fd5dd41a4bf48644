"""RoPE in ``config.json``: read from one spelling, written in two.

``rope_parameters`` holds base and scaling since transformers 5, for each kind
of layer where kinds differ (Gemma 3); its config classes turn the older
``rope_theta``, ``rope_scaling`` and ``rope_local_base_freq`` into it.
"""

import math
from collections.abc import Mapping
from typing import Any

from topd_jax.models.config import DecoderConfig, RopeScaling
from topd_jax.models.io.families import Family
from topd_jax.models.io.hub_values import is_number

# Kinds of layers, as ``layer_types`` spells them.
SLIDING, FULL = "sliding_attention", "full_attention"

# Names in files -> fields of RopeScaling.
_SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}

# Those that may be missing or null.
_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor")


def read_rope(
    rope: Mapping[str, Any], family: Family, problems: list[str]
) -> dict[str, object]:
    """Read bases and scaling from ``rope_parameters``; refuse the rest.

    Args:
      rope: as a config class of transformers holds it, one object, or one for
        each kind of layer where the family has local bases.
      family: of the file.
      problems: grows by what is wrong.

    Returns:
      Fields of :class:`DecoderConfig`.
    """
    options: dict[str, object] = {}
    whole = rope
    if family.local_rope:
        local = rope[SLIDING]
        options["local_rope_theta"] = _base(
            local, "rope_local_base_freq", problems
        )
        if _scaling(local, problems) is not None:
            problems.append(
                f"rope_parameters.{SLIDING}={dict(local)} is not supported, "
                "only {'rope_type': 'default', 'rope_theta': ...}"
            )
        whole = rope[FULL]
        # The reference reads both kinds alone, and "truncate" from neither.
        ignored = sorted(set(rope) - {FULL, SLIDING})
        if whole.get("truncate", True) is not True:
            ignored.append(f"{FULL}.truncate")
        if ignored:
            problems.append(
                f"rope_parameters={dict(rope)}: the reference ignores "
                f"{', '.join(ignored)} here; delete what it ignores, and give "
                f"the scaling in {FULL}"
            )
    options["rope_theta"] = _base(whole, "rope_theta", problems)
    options["rope_scaling"] = _scaling(whole, problems)
    return options


def _base(rope: Mapping[str, Any], name: str, problems: list[str]) -> float:
    theta = rope.get("rope_theta")
    if not is_number(theta) or theta <= 1:
        problems.append(f"{name}={theta!r:.60} must be a number above 1")
        return math.nan
    return float(theta)


def _scaling(
    rope: Mapping[str, Any], problems: list[str]
) -> RopeScaling | None:
    kind = str(rope.get("rope_type", "default"))
    given = {
        k: v
        for k, v in rope.items()
        if k not in ("rope_type", "type", "rope_theta")
        and (k, v) != ("partial_rotary_factor", 1)
    }
    known = set(_SCALINGS.get(kind, ()))
    if kind == "yarn":
        known.add("truncate")
    odd = sorted(set(given) - known)
    if odd or kind not in ("default", *_SCALINGS):
        problems.append(
            f"rope_parameters={dict(rope)} is not supported: "
            + (f"{odd} mean nothing here" if odd else f"rope_type={kind!r}")
            + f"; rope_type may be default, {', '.join(_SCALINGS)}"
        )
        return None
    if kind == "default":
        return None
    values = {
        name: given.get(name)
        for name in _SCALINGS[kind]
        if given.get(name) is not None or name not in _OPTIONAL
    }
    wrong = [
        f"rope_parameters.{name}={value!r:.60} must be a positive number"
        for name, value in values.items()
        if not is_number(value) or value <= 0
    ]
    truncate = given.get("truncate", True)
    if not isinstance(truncate, bool):
        wrong.append(f"rope_parameters.{truncate=} must be true or false")
    problems += wrong
    if wrong:
        return None
    scaling: dict[str, Any] = {
        _SCALINGS[kind][name]: float(value) for name, value in values.items()
    }
    if kind == "yarn":
        scaling["truncate"] = truncate
        # The paper's factor of cosine and sine (arXiv:2309.00071, eq. 22).
        paper = 0.1 * math.log(max(scaling["factor"], 1.0)) + 1.0
        scaling.setdefault("attention_factor", paper)
    try:
        return RopeScaling(kind, **scaling)
    except ValueError as error:
        problems.append(f"rope_parameters={dict(rope)}: {error}")
        return None


def write_rope(config: DecoderConfig, family: Family) -> dict[str, object]:
    """Write both spellings, for transformers 4 and 5.

    Args:
      config: the decoder's shape.
      family: of the file.

    Returns:
      Fields of ``config.json``, the inverse of :func:`read_rope`.
    """
    scaling = config.rope_scaling
    spelled: dict[str, object] = {"rope_type": "default"}
    if scaling is not None:
        spelled = {"rope_type": scaling.kind} | {
            hub_name: getattr(scaling, field)
            for hub_name, field in _SCALINGS[scaling.kind].items()
        }
        if scaling.kind == "yarn":
            spelled["truncate"] = scaling.truncate
    new = spelled | {"rope_theta": config.rope_theta}
    fields: dict[str, object] = {"rope_theta": config.rope_theta}
    if scaling is not None:
        fields["rope_scaling"] = spelled
    if not family.local_rope:
        return fields | {"rope_parameters": new}
    local = config.local_rope_theta or config.rope_theta
    both = {FULL: new, SLIDING: {"rope_type": "default", "rope_theta": local}}
    return fields | {"rope_local_base_freq": local, "rope_parameters": both}
