"""What differs between layers, as ``config.json`` spells it: read and written.

Windows (``sliding_window``, ``layer_types``), layers that are not turned
(``no_rope_layers``) and layers without experts (``mlp_only_layers``).
"""

from collections.abc import Sequence

from topd_jax.models.config import DecoderConfig
from topd_jax.models.io.families import Family, Get

_SLIDING = "sliding_attention"
_KINDS = {_SLIDING: True, "full_attention": False}


def read_windows(
    get: Get, family: Family, no_rope: Sequence[bool], problems: list[str]
) -> dict[str, object]:
    """Which layers slide, and how far they see.

    Args:
      get: field -> value in the file, or the family's default.
      family: of the file.
      no_rope: layers that are not turned, for families that let these slide.
      problems: grows by what is wrong.

    Returns:
      Fields of :class:`DecoderConfig`; empty where no layer slides.
    """
    layers, types = get("num_hidden_layers"), get("layer_types")
    given = None if types is None else [_KINDS.get(kind) for kind in types]
    if given is not None and (None in given or len(given) != layers):
        problems.append(
            f"layer_types={sorted(set(types))} ({len(types)}) is not "
            f"supported, only {layers} of {', '.join(_KINDS)}"
        )
        return {}
    window = get("sliding_window") if family.slides else None
    if family.switched and not get("use_sliding_window"):
        window = None

    def look_up(name: str) -> object:
        return [not n for n in no_rope] if name == "no_rope_layers" else (
            get(name)
        )  # fmt: skip

    sliding = [
        window is not None and family.slides(look_up, i) for i in range(layers)
    ]
    if given is not None and not family.layer_types and given != sliding:
        problems.append(
            f"layer_types={sorted(set(types))} is not supported: the "
            f"reference does not read it for {family.model_type}, whose "
            "layers differ from it"
        )
        return {}
    sliding = sliding if given is None else given
    if not any(sliding):
        return {}
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        problems.append(
            f"sliding_window={window!r} must be a positive integer where "
            f"layer_types has {_SLIDING!r}"
            + (" and use_sliding_window true" if family.switched else "")
        )
    return {"window": window, "sliding": tuple(sliding)}


def read_no_rope(
    get: Get, family: Family, problems: list[str]
) -> dict[str, object]:
    """Which layers are not turned; see :func:`read_windows`."""
    if not family.no_rope:
        return {}
    layers, given = get("num_hidden_layers"), get("no_rope_layers")
    if given is None:
        every = get("no_rope_layer_interval")
        if not isinstance(every, int) or every < 1:
            problems.append(
                f"no_rope_layer_interval={every!r} must be a positive integer"
            )
            return {}
        given = [(i + 1) % every for i in range(layers)]
    if not isinstance(given, list) or len(given) < layers:
        problems.append(
            f"no_rope_layers={given!r} must be a list of {layers} numbers, 0 "
            "where a layer is not turned"
        )
        return {}
    return {"no_rope": tuple(not turned for turned in given[:layers])}


def read_dense(
    get: Get, family: Family, problems: list[str]
) -> dict[str, object]:
    """Which layers have no experts; see :func:`read_windows`."""
    if "num_experts" not in family.reads:
        return {}
    layers, step = get("num_hidden_layers"), get("decoder_sparse_step")
    named = get("mlp_only_layers") or []
    if not isinstance(step, int) or step < 1:
        problems.append(
            f"decoder_sparse_step={step!r} must be a positive integer"
        )
        return {}
    if not isinstance(named, list):
        problems.append(f"mlp_only_layers={named!r} must be a list of layers")
        return {}
    chosen, there = get("num_experts_per_tok"), get("num_experts")
    if there and not 1 <= chosen <= there:
        problems.append(
            f"num_experts_per_tok={chosen!r} must lie in 1..{there}, "
            "num_experts"
        )
    return {
        "dense": tuple(i in named or (i + 1) % step != 0 for i in range(layers))
    }


def write_layers(config: DecoderConfig, family: Family) -> dict[str, object]:
    """The inverse of the three above, as far as the family can spell it."""
    fields: dict[str, object] = {}
    sliding = config.sliding or (False,) * config.layers
    if family.slides:
        fields["sliding_window"] = config.window if any(sliding) else None
    if family.switched:
        fields["use_sliding_window"] = any(sliding)
    if family.layer_types:
        names = {slides: kind for kind, slides in _KINDS.items()}
        fields["layer_types"] = [names[slides] for slides in sliding]
        if not family.switched and not any(sliding):
            # Never used, but the reference makes a mask of it.
            fields["sliding_window"] = family.defaults["sliding_window"]
    if family.no_rope:
        still = config.no_rope or (False,) * config.layers
        fields["no_rope_layers"] = [int(not n) for n in still]
    if "num_experts" in family.reads:
        dense = config.dense_layers if config.experts else ()
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": list(dense)}
    return fields
