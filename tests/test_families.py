"""Every family against transformers: logits, gradients, greedy, files.

Needs torch (the ``parity`` extra). The models are tiny and random; see
``tiny_families.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import MODELS, VOCAB, build, torch, transformers

from topd_jax.models import causal_mask, load, save_model, unembed
from topd_jax.sampling import rollout
from topd_jax.types import Prompts, positions_of

pytestmark = pytest.mark.slow


@jax.jit
def logits_of(model, tokens, mask):
    hidden, _ = model(tokens, positions_of(mask), causal_mask(mask))
    return unembed(model.head, hidden)


def batch(rows=3, length=33, padding=(0, 4, 11)):
    """Random tokens, padded on the left."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCAB, (rows, length))
    mask = np.arange(length) >= np.asarray(padding)[:, None]
    return np.where(mask, tokens, 0), mask


def reference_logits(model, tokens, mask):
    return model(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask).long(),
        position_ids=torch.tensor(np.array(positions_of(jnp.asarray(mask)))),
    ).logits


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (theirs, ours, directory), made once."""
    made = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            theirs = build(name)
            theirs.save_pretrained(directory)
            made[name] = theirs, load(directory)[0], directory
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_on_padded_batches(name, models):
    theirs, ours, _ = models(name)
    tokens, mask = batch()
    with torch.no_grad():
        want = reference_logits(theirs, tokens, mask).numpy()
    got = np.asarray(logits_of(ours, tokens, jnp.asarray(mask)))
    assert np.isfinite(got).all()
    assert want[mask].std() > 0.3
    np.testing.assert_allclose(got[mask], want[mask], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_agree(name, models, tmp_path):
    theirs, ours, _ = models(name)
    tokens, mask = batch()
    theirs.zero_grad()
    want = reference_logits(theirs, tokens, mask)
    rng = np.random.default_rng(1)
    weight = rng.normal(size=want.shape).astype(np.float32) * mask[..., None]
    (torch.log_softmax(want, -1) * torch.tensor(weight)).sum().backward()

    def loss(model):
        logp = jax.nn.log_softmax(logits_of(model, tokens, jnp.asarray(mask)))
        return jnp.sum(logp * weight)

    save_model(jax.grad(loss)(ours), tmp_path / "gradients")
    from safetensors.numpy import load_file

    got = load_file(tmp_path / "gradients" / "model.safetensors")
    for key, value in theirs.named_parameters():
        slope = value.grad.numpy()
        if key.endswith("experts.gate_up_proj"):
            stem = key.removesuffix("gate_up_proj")
            parts = [
                np.concatenate(
                    [got.pop(f"{stem}{e}.{p}_proj.weight") for p in
                     ("gate", "up")]
                )
                for e in range(len(slope))
            ]  # fmt: skip
            found = np.stack(parts)
        elif key.endswith("experts.down_proj"):
            found = np.stack(
                [
                    got.pop(key.replace("down", f"{e}.down") + ".weight")
                    for e in range(len(slope))
                ]
            )
        else:
            found = got.pop(key)
        error = np.abs(found - slope).max()
        # A bias of keys that are not turned has no gradient but rounding.
        assert error <= 1e-3 * np.abs(slope).max() + 1e-4, key
    assert not got


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_agree_through_the_cache(name, models):
    """Our rollout, prompts padded on the left, 64 tokens."""
    theirs, ours, _ = models(name)
    tokens, mask = batch(3, 9, (0, 2, 5))
    with torch.no_grad():
        result = theirs.generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask).long(),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    top = torch.stack(result.logits, 1).topk(2).values
    gaps = (top[..., 0] - top[..., 1]).numpy()
    want = result.sequences[:, 9:].numpy()
    got = rollout(
        ours,
        Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)),
        jax.random.key(0),
        max_new_tokens=64,
        eos_ids=(),
        pad_id=0,
        temperature=0.0,
    ).tokens
    steps = 0
    for row in range(3):
        ties = np.flatnonzero(gaps[row] < 1e-4)
        end = ties[0] if len(ties) else 64
        np.testing.assert_array_equal(got[row, :end], want[row, :end])
        steps += end
    assert steps > 64


@pytest.mark.parametrize("name", MODELS)
def test_export_is_bit_equal_and_loads(name, models, tmp_path):
    theirs, ours, directory = models(name)
    out = save_model(ours, tmp_path / "ours", source=directory)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert type(back) is type(theirs)
    assert not {k: v for k, v in info.items() if v}
    got = dict(back.named_parameters())
    for key, value in theirs.named_parameters():
        assert torch.equal(value, got.pop(key)), key
    assert not got
    tokens, mask = batch()
    with torch.no_grad():
        want = reference_logits(theirs, tokens, mask)
        assert torch.equal(reference_logits(back, tokens, mask), want)
    again, _ = load(out)
    assert again.config == ours.config


def test_stacked_experts_are_read_as_well(models, tmp_path):
    theirs, ours, _ = models("moe-mixed")
    from safetensors.torch import save_file

    theirs.config.save_pretrained(tmp_path)
    tensors = {n: p.detach() for n, p in theirs.named_parameters()}
    assert any(n.endswith("experts.gate_up_proj") for n in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    read, _ = load(tmp_path)
    for name, array in ours.arrays.items():
        np.testing.assert_array_equal(array, read.arrays[name], err_msg=name)
