"""Tokenizers and the checks they must pass."""

import json
import pathlib

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from topd_jax.data import tokenizers, vocabulary
from topd_jax.data.toy_world import corpus, problems

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking | default(true) %}<think></think>{% endif %}"
    "{% endif %}"
)


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[tuple[str, str]]]:
    sample = problems.problems("train", 400, seed=0)
    return {
        "teacher": corpus.world_pairs(sample, problems.TEACHER_STYLE, seed=0),
        "student": corpus.world_pairs(
            sample, problems.STUDENT_STYLE, problems.STUDENT_HABIT, seed=1
        ),
    }


@pytest.fixture(scope="module")
def tokenizer(pairs: dict) -> tokenizers.SentencePieceTokenizer:
    return corpus.train_tokenizer(pairs["teacher"], pairs["student"])


@pytest.fixture(scope="module")
def ready_object():
    from transformers import PreTrainedTokenizerFast

    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        ["the quick brown fox counts to ten", "user assistant"] * 20,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )


def test_sentencepiece_gives_back_every_text(pairs: dict, tokenizer):
    for problem, text in pairs["teacher"][:100] + pairs["student"][:100]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.pieces(ids)) == text
        assert max(ids) < tokenizer.vocab_size == 64
        chat = tokenizer.chat(problem)
        assert chat[0] == tokenizer.bos_id == 1
        assert tokenizer.decode([*chat, *ids, *tokenizer.eos_ids]) == (
            problem + text
        )
    assert tokenizer.pieces([0, 1, 2]) == ["", "", ""]
    assert tokenizer.decode(tokenizer.encode("§")) == "\ufffd"
    both = [{"content": "1+"}, {"content": "1?"}]
    assert tokenizer.chat(both) == tokenizer.chat("1+1?")


def test_sentencepiece_keeps_digits_and_phrases_apart(tokenizer):
    text = "= 18x3+194; so get 248, then do 2*4: 8; answer 8."
    pieces = tokenizer.pieces(tokenizer.encode(text))
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list(
        "183194248248" + "8"
    )
    assert {"= ", "; ", "so ", "get ", ", ", "then ", "do ", ": "} < set(pieces)


def test_sentencepiece_is_deterministic_and_survives_a_file(
    pairs: dict, tokenizer, tmp_path: pathlib.Path
):
    again = corpus.train_tokenizer(pairs["teacher"], pairs["student"])
    assert again.model == tokenizer.model
    tokenizer.save(tmp_path / "world.model")
    loaded = tokenizers.SentencePieceTokenizer.load(tmp_path / "world.model")
    assert vocabulary.fingerprint(loaded) == vocabulary.fingerprint(tokenizer)
    vocabulary.require_same_vocabulary(loaded, tokenizer)
    with pytest.raises(ValueError, match=r"no tokenizer at .*absent"):
        tokenizers.SentencePieceTokenizer.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="vocab_size=500"):
        corpus.train_tokenizer(pairs["teacher"], vocab_size=500)


def test_world_fits_its_lengths(pairs: dict, tokenizer):
    data = corpus.encode_pairs(pairs["student"], tokenizer)
    assert data.prompt_length.max() <= 16
    completions = data.length - data.prompt_length
    assert completions.max() <= 54
    assert (completions > 48).mean() < 0.01


def test_hugging_face_object_and_directory(ready_object, tmp_path):
    ready_object.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 1]})
    )
    direct = tokenizers.HuggingFaceTokenizer(ready_object)
    loaded = tokenizers.HuggingFaceTokenizer.load(tmp_path)
    assert direct.eos_ids == (1,)
    assert loaded.eos_ids == (2, 1)
    assert direct.pad_id == 1
    assert direct.bos_id is None
    vocabulary.require_same_vocabulary(direct, loaded)
    text = "the fox counts"
    for each in (direct, loaded):
        assert each.decode([*each.encode(text), 1]) == text
        assert each.chat(text) == each.encode(
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        )
    quiet = tokenizers.HuggingFaceTokenizer(
        ready_object, template_options={"enable_thinking": False}
    )
    assert quiet.chat(text) == direct.chat(text) + direct.encode(
        "<think></think>"
    )


def test_hugging_face_pieces_join_to_the_text(ready_object):
    wrapped = tokenizers.HuggingFaceTokenizer(ready_object)
    text = "the été — fox 🦊🦊 to\n ten  «é»"
    ids = wrapped.encode(text)
    pieces = wrapped.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == wrapped.decode(ids) == text
    assert pieces[0] == "the"
    assert "🦊" in pieces
    ended = wrapped.pieces([*ids[:1], 1])
    assert ended == ["the", ""]
    cut = ids[: pieces.index("🦊")]
    assert "".join(wrapped.pieces(cut)) == wrapped.decode(cut)


def test_pieces_keep_the_space_that_a_first_word_loses():
    from transformers import PreTrainedTokenizerFast

    raw = RawTokenizer(models.WordLevel({"▁the": 0, "▁fox": 1, "</s>": 2}))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    wrapped = tokenizers.HuggingFaceTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    )
    assert wrapped.decode([0, 1, 1]) == "the fox fox"
    assert wrapped.pieces([0, 1, 1, 2]) == ["the", " fox", " fox", ""]


def test_what_a_tokenizer_lacks_is_said(ready_object, tmp_path):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=ready_object._tokenizer)
    with pytest.raises(ValueError, match="pass eos_ids"):
        tokenizers.HuggingFaceTokenizer(bare)
    wrapped = tokenizers.HuggingFaceTokenizer(bare, eos_ids=[2])
    with pytest.raises(ValueError, match="no chat template"):
        wrapped.chat("hello")
    with pytest.raises(ValueError, match="no tokenizer at"):
        tokenizers.HuggingFaceTokenizer.load(tmp_path)


def test_differing_vocabularies_are_refused(tokenizer, ready_object):
    other = tokenizers.HuggingFaceTokenizer(ready_object)
    with pytest.raises(
        ValueError, match=r"64 and \d+ ids.*0: '<pad>' / '<|im_start|>'"
    ):
        vocabulary.require_same_vocabulary(tokenizer, other)

    class Longer:
        def vocabulary(self) -> list[str]:
            return [*tokenizer.vocabulary(), "extra"]

    with pytest.raises(ValueError, match=r"ids from 64: 'extra'"):
        vocabulary.require_same_vocabulary(tokenizer, Longer())


def test_a_model_smaller_than_its_tokenizer_is_refused(tokenizer):
    vocabulary.check_model(tokenizer, 64)
    vocabulary.check_model(tokenizer, 128)
    with pytest.raises(ValueError, match=r"64 ids .*vocab_size=63"):
        vocabulary.check_model(tokenizer, 63)
