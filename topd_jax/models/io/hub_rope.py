"""RoPE as ``config.json`` spells it, in the old way and in the new.

Old: ``rope_theta`` and ``rope_scaling`` (Gemma 3: ``rope_local_base_freq``).
New, since transformers 5: ``rope_parameters``, which holds both, for each kind
of layer apart where kinds differ. Where a file has both they must agree.
"""

import math
from collections.abc import Mapping

from topd_jax.models.config import DecoderConfig, RopeScaling
from topd_jax.models.io.families import Family, Get

# Names in files -> fields of RopeScaling; those in _NEEDED have no default.
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
_NEEDED = ("factor", "low_freq_factor", "high_freq_factor")
_YARN_ONLY = ("mscale", "mscale_all_dim", "truncate")
_LAYER_KINDS = ("full_attention", "sliding_attention")


def read_rope(
    fields: Mapping[str, object],
    family: Family,
    get: Get,
    problems: list[str],
) -> dict[str, object]:
    """Bases and stretching from either spelling; all other variants refused.

    Args:
      fields: of the file.
      family: of the file.
      get: field -> value in the file, or the family's default.
      problems: grows by what is wrong.

    Returns:
      Fields of :class:`DecoderConfig`.
    """
    found, local = {}, {}
    if fields.get("rope_theta") is not None:
        found["rope_theta"] = fields["rope_theta"]
    if family.local_rope and fields.get("rope_local_base_freq") is not None:
        local["rope_local_base_freq"] = fields["rope_local_base_freq"]
    scalings = {}
    for name, rope, kind in _parts(fields, family, problems):
        held = local if kind == "sliding_attention" else found
        if rope.get("rope_theta") is not None:
            held[f"{name}.rope_theta"] = rope["rope_theta"]
        scaling = _scaling(name, rope, get, problems)
        if kind == "sliding_attention" and scaling is not None:
            problems.append(
                f"{name}={dict(rope)} is not supported, only "
                "{'rope_type': 'default', 'rope_theta': ...}"
            )
        elif kind != "sliding_attention":
            scalings[name] = scaling
    if len(set(scalings.values())) > 1:
        problems.append(f"{', '.join(scalings)} disagree; keep one of them")
    theta = _agreed(found, get("rope_theta"), problems)
    options: dict[str, object] = {"rope_theta": theta}
    if family.local_rope:
        base = get("rope_local_base_freq")
        options["local_rope_theta"] = _agreed(local, base, problems)
    options["rope_scaling"] = next(iter(scalings.values()), None)
    return options


def write_rope(config: DecoderConfig, family: Family) -> dict[str, object]:
    """The inverse: both spellings, for transformers 4 and 5."""
    scaling = config.rope_scaling
    spelt: dict[str, object] = {"rope_type": "default"}
    if scaling is not None:
        spelt = {"rope_type": scaling.kind} | {
            theirs: getattr(scaling, ours)
            for theirs, ours in _SCALINGS[scaling.kind].items()
        }
        if scaling.kind == "yarn":
            spelt["truncate"] = scaling.truncate
    new = spelt | {"rope_theta": config.rope_theta}
    fields: dict[str, object] = {"rope_theta": config.rope_theta}
    if scaling is not None:
        fields["rope_scaling"] = spelt
    if not family.local_rope:
        return fields | {"rope_parameters": new}
    local = config.local_rope_theta or config.rope_theta
    both = {
        "full_attention": new,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    return fields | {"rope_local_base_freq": local, "rope_parameters": both}


def _parts(
    fields: Mapping[str, object], family: Family, problems: list[str]
) -> list[tuple[str, Mapping, str]]:
    """(name, object, kind of layer) of every description in the file."""
    parts = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        nested = isinstance(rope, Mapping) and family.local_rope
        if nested and set(rope) <= set(_LAYER_KINDS):
            found = [
                (f"{name}.{kind}", part, kind)
                for kind, part in rope.items()
                if part is not None
            ]
        else:
            found = [(name, rope, "full_attention")]
        for label, part, kind in found:
            if isinstance(part, Mapping):
                parts.append((label, part, kind))
            else:
                problems.append(f"{label}={part!r} must be an object")
    return parts


def _scaling(
    name: str, rope: Mapping, get: Get, problems: list[str]
) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    given = {
        k: v
        for k, v in rope.items()
        if k not in ("rope_type", "type", "rope_theta")
        and (k, v) != ("partial_rotary_factor", 1)
    }
    known = set(_SCALINGS.get(kind, ()))
    known |= set(_YARN_ONLY if kind == "yarn" else ())
    odd = sorted(set(given) - known)
    if odd or kind not in ("default", *_SCALINGS):
        problems.append(
            f"{name}={dict(rope)} is not supported: "
            + (f"{odd} mean nothing here" if odd else f"rope_type={kind!r}")
            + f"; rope_type may be default, {', '.join(_SCALINGS)}"
        )
        return None
    if kind == "default":
        return None
    values = {}
    for theirs, ours in _SCALINGS[kind].items():
        value = given.get(theirs)
        if value is None and theirs == "original_max_position_embeddings":
            value = get("max_position_embeddings")
        if value is None and theirs not in _NEEDED:
            continue
        if not _positive(value):
            problems.append(
                f"{name}.{theirs}={value!r} must be a positive number"
            )
            return None
        values[ours] = float(value)
    if kind == "yarn":
        values |= _yarn_extras(given, values["factor"])
    return RopeScaling(kind, **values)


def _yarn_extras(given: Mapping, factor: float) -> dict[str, object]:
    """YaRN's factor of cosine and sine, unless given, from its two scales."""

    def size(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    extras: dict[str, object] = {"truncate": bool(given.get("truncate", True))}
    if given.get("attention_factor") is None:
        scale, whole = given.get("mscale"), given.get("mscale_all_dim")
        both = scale and whole
        extras["attention_factor"] = (
            size(scale) / size(whole) if both else size(1.0)
        )
    return extras


def _agreed(
    found: Mapping[str, object], default: float, problems: list[str]
) -> float:
    bad = {k: v for k, v in found.items() if not _positive(v)}
    if bad:
        problems.append(f"{bad} must be a positive number")
        return math.nan
    if len(set(found.values())) > 1:
        problems.append(f"{dict(found)} disagree; keep one of them")
    return float(next(iter(found.values()), default))


def _positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value > 0
