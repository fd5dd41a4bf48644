"""Checks of tokenizers, templates, ends and vocabularies, from files alone.

Mistakes here are silent: a run trains on prompts that the teacher was never
asked, writes to the limit because its end is another id, or compares
probabilities of ids that mean different things.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from topd_jax.cli.doctor.files import Context
from topd_jax.cli.doctor.findings import Finding, judge, refusal
from topd_jax.data.routing import places_of
from topd_jax.data.templates import teacher_width
from topd_jax.data.tokenizers import Tokenizer

_DIALOGUE = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "It is 4."},
)


def vocabularies(context: Context) -> Iterator[Finding]:
    """Check that ids mean the same to all models, which have a row for each."""
    sizes = {who: c.vocab_size for who, c in context.configs.items()}
    if not context.tokenizers:
        text, way_out = "no model has one", "put its files beside the model"
        yield Finding("error", "tokenizers", text, way_out)
        return
    ids, shared = context.tokenizers[0].vocab_size, min(sizes.values())
    if context.mismatch is None:
        yield Finding("ok", "tokenizers", f"equal, {ids} ids")
    else:
        yield refusal("tokenizers", context.mismatch)
    names = [f"{who} {n} rows ({n - ids} padded)" for who, n in sizes.items()]
    text = f"{ids} ids; {', '.join(names)}"
    dropped = [
        f"{n - shared} of the {who}" for who, n in sizes.items() if n > shared
    ]
    if dropped:
        text += f"; dropped {', '.join(dropped)}, the rest renormalized"
    if shared < ids:
        few = [f"the {who} {n} rows" for who, n in sizes.items() if n < ids]
        text = f"the tokenizer has {ids} ids and {', '.join(few)}"
    way_out = (
        "use the tokenizer that came with the weights, or resize the model's "
        "embedding"
    )
    yield judge("vocabulary", shared >= ids, text, way_out, "error")


def templates(context: Context) -> Iterator[Finding]:
    """Check that all tokenizers make the same prompts and answers."""
    if not (context.tokenizers and context.records):
        return
    student, *teachers = context.tokenizers
    name = "chat template"
    if not context.prompts:
        way_out = "put a chat_template.jinja beside the student's tokenizer"
        yield Finding("error", name, "the student's makes no prompt", way_out)
        return
    if not teachers:
        length = len(context.prompts[0])
        yield Finding("ok", name, f"{length} tokens of the first prompt")
    answers = [record["answer"] for record in context.records]
    for teacher in teachers:
        try:
            prompts = [teacher.chat(r["prompt"]) for r in context.records]
        except Exception as raised:  # templates raise whatever they like
            text = f"the student's; the teacher has none ({raised})"
            yield Finding("ok", name, text)
        else:
            yield _same(
                name, student, context.prompts, teacher, prompts,
                "the student's makes the prompts: copy the teacher's "
                "chat_template.jinja to the student if the teacher should be "
                "asked as it was trained",
            )  # fmt: skip
        if context.mismatch is None:
            yield _same(
                "encoding", student, list(map(student.encode, answers)),
                teacher, list(map(teacher.encode, answers)),
                "the teacher will read tokens that it would not have written: "
                "give both the same tokenizer files",
            )  # fmt: skip


def _same(
    name: str,
    student: Tokenizer,
    texts: list[list[int]],
    teacher: Tokenizer,
    others: list[list[int]],
    way_out: str,
) -> Finding:
    """Compare what two tokenizers make of the same records."""
    for ids, other in zip(texts, others, strict=True):
        if ids != other:
            pairs = enumerate(zip(ids, other, strict=False))
            least = min(len(ids), len(other))
            at = next((i for i, (x, y) in pairs if x != y), least)
            text = (
                f"differs from token {at} on: student "
                f"{_names(student, ids[at : at + 3]) or 'nothing more'} / "
                f"teacher {_names(teacher, other[at : at + 3]) or 'none'}"
            )
            return Finding("warning", name, text, way_out)
    return Finding("ok", name, f"the same on {len(texts)} records")


def beginning(context: Context) -> Iterator[Finding]:
    """Check that prompts begin with one bos, where the tokenizer adds one."""
    if not context.prompts:
        return
    tokenizer, head = context.tokenizers[0], list(context.prompts[0][:2])
    bos = tokenizer.bos_id
    if bos is None or not hasattr(tokenizer, "begins_texts"):
        return
    if head == [bos, bos]:
        text = f"prompts begin with {_names(tokenizer, head)}: bos twice"
        way_out = "take bos_token out of the chat template"
        yield Finding("warning", "bos", text, way_out)
    elif tokenizer.begins_texts and head[:1] != [bos]:
        text = (
            f"texts begin with {_names(tokenizer, [bos])}, but prompts of the "
            "chat template do not"
        )
        way_out = "put {{ bos_token }} at the start of the chat template"
        yield Finding("warning", "bos", text, way_out)


def prompt_lengths(context: Context) -> Iterator[Finding]:
    """Check how long prompts are, against data.max_prompt_length."""
    if context.prompts:
        sizes = np.asarray([len(ids) for ids in context.prompts])
        limit = context.settings.data.max_prompt_length
        yield _lengths("prompts", sizes, context, "max_prompt_length", limit)


def teacher_prompts(context: Context) -> Iterator[Finding]:
    """Show what teachers read instead of the prompts, and how long it is."""
    if not context.prompts:
        return
    for name, places in places_of(context.records).items():
        records = [context.records[i] for i in places]
        own = [r for r in records if "teacher_prompt" in r]
        if not own:
            continue
        texts = [record["teacher_prompt"] for record in own]
        sizes = [len(context.tokenizers[0].chat(text)) for text in texts]
        yield _lengths(
            f"teacher {name}".strip() + " reads",
            np.asarray(sizes), context, "max_teacher_prompt_length",
            teacher_width(context.settings.data),
            f"{_ends_of(texts[0])!r} for {own[0]['source']}; ",
        )  # fmt: skip


def _ends_of(text: str, most: int = 120) -> str:
    if len(text) <= 2 * most:
        return text
    return f"{text[:most]} ... {text[-most:]}"


def _lengths(
    name: str,
    sizes: np.ndarray,
    context: Context,
    key: str,
    limit: int,
    example: str = "",
) -> Finding:
    """Compare lengths of prompts with the limit that a setting is."""
    longest = int(sizes.max())
    over = float((sizes > limit).mean())
    text = (
        f"{example}median {int(np.median(sizes))}, longest {longest} of at "
        f"most {limit} tokens (the first {len(sizes)})"
    )
    if over:
        text = f"{over:.0%} are longer than allowed: {text}"
    on_long_prompt = context.settings.data.on_long_prompt
    fatal = on_long_prompt == "error" or over == 1
    return judge(
        name, over <= 0.1 * (not fatal), text,
        f"--config.data.{key}={longest}, or leave some out with "
        "data.on_long_prompt='skip'",
        "error" if fatal else "warning",
    )  # fmt: skip


def ends(context: Context) -> Iterator[Finding]:
    """Check which ids end a completion, and which do not that should."""
    if not context.tokenizers or context.mismatch is not None:
        return
    tokenizer = context.tokenizers[0]
    least = min(config.vocab_size for config in context.configs.values())
    used, fine = tokenizer.eos_ids, True
    beyond = [i for i in (*used, tokenizer.pad_id) if not 0 <= i < least]
    if beyond:
        fine = False
        yield Finding(
            "error", "ends",
            f"the end or pad ids {beyond} are not below the models' {least} "
            "rows",
            "correct eos_token_id and pad_token_id in the tokenizer and "
            "generation_config.json, or data.end_ids",
        )  # fmt: skip
    for who, known in _other_ends(context).items():
        unused = [i for i in known if i is not None and i not in used]
        if unused:
            fine = False
            yield Finding(
                "warning", "ends",
                f"{who} ends a text with {_names(tokenizer, unused)}, at which "
                "this run does not stop: completions may go on to the limit",
                f"--config.data.end_ids={','.join(map(str, unused))}",
            )  # fmt: skip
    if fine:
        pad = _names(tokenizer, [tokenizer.pad_id])
        text = f"stops at {_names(tokenizer, used)}; pads with {pad}"
        yield Finding("ok", "ends", text)


def _other_ends(context: Context) -> dict[str, Sequence[int | None]]:
    """Return who else says how a text ends -> its ids."""
    others = {"the chat template": _turn_end(context.tokenizers[0])}
    for name, model in context.models.items():
        if model.described is not None:
            ids = model.described.config_end_ids
            others[f"the {name}'s config.json"] = ids
            eos = getattr(model.described.tokenizer, "eos_token_id", None)
            others[f"the {name}'s tokenizer"] = (eos,)
    return others


def _turn_end(tokenizer: Tokenizer) -> Sequence[int]:
    """Return the id that the chat template puts behind an answer, or none."""
    try:
        whole = tokenizer.chat(_DIALOGUE, ask=False)
    except Exception:  # no template, or one that wants other turns
        return ()
    answer = tokenizer.encode(_DIALOGUE[1]["content"])
    for end in range(len(whole) - 1, len(answer) - 1, -1):
        if whole[end - len(answer) : end] == answer:
            follows = int(whole[end])
            return (follows,) if follows in tokenizer.special_ids else ()
    return ()


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    names = tokenizer.vocabulary()
    return ", ".join(
        f"{i} {names[i]!r}" if 0 <= i < len(names) else f"{i}" for i in ids
    )
