"""RoPE in ``config.json``: read from one spelling, written in two.

``rope_parameters`` holds base and scaling since transformers 5, for each kind
of layer where kinds differ (Gemma 3); its config classes turn the older
``rope_theta``, ``rope_scaling`` and ``rope_local_base_freq`` into it.
"""

import math
from collections.abc import Mapping
from typing import Any

from topd_jax.models.config import DecoderConfig
from topd_jax.models.frequencies import RopeScaling
from topd_jax.models.io.families import Family
from topd_jax.models.io.hub_values import is_number, wrong_value

# Kinds of layers, as ``layer_types`` spells them.
SLIDING, FULL = "sliding_attention", "full_attention"
LINEAR = "linear_attention"

_PARTIAL = "partial_rotary_factor"
# Of queries that grow; read in some families only.
_BETA = "llama_4_scaling_beta"

_LENGTH = "original_max_position_embeddings"

# Kind -> what files say of it.
_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "yarn": (
        "factor", _LENGTH, "beta_fast", "beta_slow", "attention_factor", _BETA,
    ),
    "longrope": (
        "factor", _LENGTH, "attention_factor", "short_factor", "long_factor",
    ),
}  # fmt: skip
# Names in files -> fields of RopeScaling, where these are others.
_FIELDS = {
    _LENGTH: "original_length",
    _BETA: "query_beta",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}

# Those that may be missing or null.
_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor", _BETA)
# Instead of an attention factor (DeepSeek's).
_MSCALES = ("mscale", "mscale_all_dim")


def read_rope(
    rope: Mapping[str, Any],
    family: Family,
    head_dim: int,
    longest: object,
    problems: list[str],
) -> dict[str, object]:
    """Read bases and scaling from ``rope_parameters``; refuse the rest.

    Args:
      rope: as a config class of transformers holds it, one object, or one for
        each kind of layer where the family has local bases.
      family: of the file.
      head_dim: of the decoder.
      longest: tokens that the model is made for; of "longrope" alone.
      problems: grows by what is wrong.

    Returns:
      Fields of :class:`DecoderConfig`.
    """
    options: dict[str, object] = {}
    whole = rope
    if family.local_rope:
        local = rope[SLIDING]
        options["local_rope_theta"] = _base(local, family.local_rope, problems)
        if _scaling(local, family, longest, problems) is not None:
            problems.append(
                f"rope_parameters.{SLIDING}={dict(local)} is not supported, "
                "only {'rope_type': 'default', 'rope_theta': ...}"
            )
        whole = rope[FULL]
        # The reference reads both kinds alone, and "truncate" from neither.
        # Where no layer slides, transformers 5.15 adds a kind and no base.
        added = {("rope_type", "default"), ("rope_theta", None)}
        ignored = sorted(
            name
            for name, value in rope.items()
            if name not in (FULL, SLIDING) and (name, value) not in added
        )
        if whole.get("truncate", True) is not True:
            ignored.append(f"{FULL}.truncate")
        if ignored:
            problems.append(
                f"rope_parameters={dict(rope)}: the reference ignores "
                f"{', '.join(ignored)} here; delete what it ignores, and give "
                f"the scaling in {FULL}"
            )
    options["rope_theta"] = _base(whole, "rope_theta", problems)
    options["rope_scaling"] = _scaling(whole, family, longest, problems)
    if _PARTIAL in family.reads:
        share = whole.get(_PARTIAL, 1)
        if wrong := wrong_value(_PARTIAL, share):
            problems += wrong
        else:
            options["rotary_dim"] = int(head_dim * share)
    return options


def _base(rope: Mapping[str, Any], name: str, problems: list[str]) -> float:
    theta = rope.get("rope_theta")
    if not is_number(theta) or theta <= 1:
        problems.append(f"{name}={theta!r:.60} must be a number above 1")
        return math.nan
    return float(theta)


def _scaling(
    rope: Mapping[str, Any],
    family: Family,
    longest: object,
    problems: list[str],
) -> RopeScaling | None:
    kind = str(rope.get("rope_type", "default"))
    elsewhere = {"rope_type", "type", "rope_theta"}
    elsewhere |= {_PARTIAL} & family.reads.keys()
    # Ministral's files repeat it here.
    elsewhere |= {"max_position_embeddings"} if family.growing_query else set()
    given = {
        k: v
        for k, v in rope.items()
        if k not in elsewhere and (k, v) != (_PARTIAL, 1)
        # Of text, all sections of a head are turned by the same positions.
        if k not in ("mrope_section", "mrope_interleaved")
    }
    known = set(_SCALINGS.get(kind, ()))
    if kind == "yarn":
        known |= {"truncate", *_MSCALES}
    if not family.growing_query:
        known -= {_BETA}
    odd = sorted(set(given) - known)
    if odd or kind not in ("default", *_SCALINGS):
        problems.append(
            f"rope_parameters={dict(rope)} is not supported: "
            + (f"{odd} mean nothing here" if odd else f"rope_type={kind!r}")
            + "; what transformers reads is attention_factor"
            * ("attn_factor" in odd)
            + f"; rope_type may be default, {', '.join(_SCALINGS)}"
        )
        return None
    if kind == "default":
        return None
    if kind == "longrope":
        given = _from_lengths(given, longest)
    return _read_scaling(kind, given, problems)


def _read_scaling(
    kind: str, given: Mapping[str, Any], problems: list[str]
) -> RopeScaling | None:
    values = {
        name: given.get(name)
        for name in _SCALINGS[kind]
        if given.get(name) is not None or name not in _OPTIONAL
    }
    truncate = given.get("truncate", True)
    wrong = [
        f"rope_parameters.{problem}"
        for name, value in (values | {"truncate": truncate}).items()
        for problem in wrong_value(name, value)
    ]
    problems += wrong
    if wrong:
        return None
    scaling: dict[str, Any] = {
        _FIELDS.get(name, name): tuple(map(float, value))
        if isinstance(value, list)
        else float(value)
        for name, value in values.items()
    }
    if kind == "yarn":
        scaling["truncate"] = truncate
        factor = _attention_factor(given, scaling["factor"], problems)
        scaling.setdefault("attention_factor", factor)
    try:
        return RopeScaling(kind, **scaling)
    except ValueError as error:
        problems.append(f"rope_parameters={dict(given)}: {error}")
        return None


def _attention_factor(
    given: Mapping[str, Any], factor: float, problems: list[str]
) -> float:
    """Return the factor of cosine and sine where a file gives none."""
    scales = [given.get(name) or 0 for name in _MSCALES]
    if not all(is_number(x) and x >= 0 for x in scales):
        problems.append(
            f"rope_parameters: {', '.join(_MSCALES)}={scales!r:.60} must be "
            "positive numbers"
        )
    elif all(scales):
        up, down = (0.1 * x * math.log(max(factor, 1.0)) + 1 for x in scales)
        return up / down
    # The paper's (arXiv:2309.00071, eq. 22).
    return 0.1 * math.log(max(factor, 1.0)) + 1.0


def _from_lengths(given: dict[str, Any], longest: object) -> dict[str, Any]:
    """Fill in the factors of "longrope" that a file leaves out."""
    length = given.get(_LENGTH)
    if wrong_value(_LENGTH, length):
        return given
    known = {name: x for name, x in given.items() if x is not None}
    if "factor" not in known and is_number(longest):
        known["factor"] = longest / length
    factor = known.get("factor")
    if is_number(factor) and factor > 0:  # arXiv:2402.13753
        more = math.log(max(factor, 1.0)) / math.log(length)
        known.setdefault("attention_factor", math.sqrt(1 + more))
    return known


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
            name: list(value) if isinstance(value, tuple) else value
            for name in _SCALINGS[scaling.kind]
            for value in [getattr(scaling, _FIELDS.get(name, name))]
        }
        length = spelled.get(_LENGTH)
        if isinstance(length, float) and length.is_integer():
            spelled[_LENGTH] = int(length)  # as readers want a count
        if scaling.kind == "yarn":
            spelled["truncate"] = scaling.truncate
        if not scaling.query_beta:
            spelled.pop(_BETA, None)
    fields: dict[str, object] = {"rope_theta": config.rope_theta}
    new = spelled | fields
    if _PARTIAL in family.reads:
        share = (config.rotary_dim or config.head_dim) / config.head_dim
        new[_PARTIAL] = fields[_PARTIAL] = share
    if scaling is not None:
        fields["rope_scaling"] = spelled
    if _LENGTH in family.reads:
        fields |= _write_lengths(scaling, spelled)
    if not family.local_rope:
        return fields | {"rope_parameters": new}
    local = config.local_rope_theta or config.rope_theta
    both = {FULL: new, SLIDING: {"rope_type": "default", "rope_theta": local}}
    return {family.local_rope: local} | fields | {"rope_parameters": both}


def _write_lengths(
    scaling: RopeScaling | None, spelled: dict[str, object]
) -> dict[str, object]:
    """Spell "longrope" as releases before 5 read it: three fields alone."""
    if scaling is None or scaling.kind != "longrope":
        return {}
    length, longest = (
        round(x * scaling.original_length) for x in (1, scaling.factor)
    )
    three: dict[str, object] = {"type": "longrope"}
    three |= {name: spelled[name] for name in ("short_factor", "long_factor")}
    lengths: dict[str, object] = {
        _LENGTH: length,
        "max_position_embeddings": longest,
    }
    read = _from_lengths(three | lengths, longest)
    same = read["attention_factor"] == scaling.attention_factor
    return lengths | {"rope_scaling": three if same else spelled}
