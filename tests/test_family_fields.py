"""Every number of a config counts here as it does in the reference.

Each numeric field of each family's ``config.json`` is changed, beside the same
weights. Where the reference's logits then differ ours must be its new ones;
where it takes the change without a difference so must we, or refuse.
"""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import batch, logits_of, reference_logits
from tiny_families import MODELS, build, torch, transformers

from topd_jax.models import load

pytestmark = pytest.mark.slow

# Taken by the reference without effect on logits, refused here by name.
CAUTION = {
    "attention_dropout",
    "attn_logit_softcapping",
    "use_sliding_window",
    "layer_types",
    "tie_word_embeddings",  # where the file holds another head
    "use_bidirectional_attention",  # Gemma 3 without a cache
}


def change(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    # An epsilon must grow by much before it shows.
    return value * (500 if value < 1e-2 else 1.5) or 0.1


def fields_of(node, path=()):
    """(path, value) of every number in a parsed file."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from fields_of(value, (*path, key))
        elif isinstance(value, int | float):
            yield (*path, key), value


def put(node, path, value):
    node = copy.deepcopy(node)
    inner = node
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return node


def reference(directory, tokens, mask):
    """The reference's logits; None where it does not take the config."""
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, attn_implementation="eager"
        )
        if any(info.values()):
            return None
        with torch.no_grad():
            return reference_logits(model.eval(), tokens, mask).numpy()
    except Exception:  # of many types, from validators and from shapes
        return None


@pytest.mark.parametrize("name", MODELS)
def test_every_number_counts_as_in_the_reference(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    tokens, mask = batch(2, 17, (0, 4))
    start = reference(tmp_path, tokens, mask)
    moved, refused = set(), set()
    for where, value in fields_of(fields):
        label = ".".join(where)
        path.write_text(json.dumps(put(fields, where, change(value))))
        want = reference(tmp_path, tokens, mask)
        try:
            ours, _ = load(tmp_path)
        except ValueError:
            refused |= {where[-1]} if want is not None else set()
            continue
        if want is None:
            continue
        got = np.asarray(logits_of(ours, tokens, jnp.asarray(mask)))
        np.testing.assert_allclose(
            got[mask], want[mask], atol=1e-4, err_msg=label
        )
        if np.abs(want - start)[mask].max() > 1e-3:
            moved.add(label)
    assert "rms_norm_eps" in moved
    assert refused <= CAUTION
    print(name, "moved:", sorted(moved), "refused:", sorted(refused))
    jax.clear_caches()
