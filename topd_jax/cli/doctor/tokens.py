"""Checks of tokenizers, templates, ends and vocabularies, from files alone.

What goes wrong here goes wrong silently: a run trains on prompts that the
teacher was never asked, writes to the limit because its end is another id, or
compares probabilities of ids that mean different things (ours).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from topd_jax.cli.doctor.findings import Finding, error, ok, warning
from topd_jax.data.sources import Record
from topd_jax.data.tokenizers import Tokenizer
from topd_jax.models import DecoderConfig
from topd_jax.training.config import Settings

# Records that are tokenised to look at lengths and at other encodings.
SAMPLE = 200

_DIALOGUE = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "It is 4."},
)


def vocabularies(student: Tokenizer, teacher: Tokenizer) -> list[Finding]:
    """Whether every id means the same to both, else where they differ."""
    ours, theirs = student.vocabulary(), teacher.vocabulary()
    if ours == theirs:
        return [ok("tokenizers", f"equal, {len(ours)} ids")]
    differing = [
        i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b
    ]
    parts = []
    if differing:
        shown = ", ".join(
            f"{i}: {ours[i]!r} / {theirs[i]!r}" for i in differing[:4]
        )
        parts.append(
            f"{len(differing)} ids differ, first (id: student / teacher) "
            f"{shown}"
        )
    if len(ours) != len(theirs):
        longer, short = max(ours, theirs, key=len), min(len(ours), len(theirs))
        who = "student" if len(ours) > len(theirs) else "teacher"
        extra = [name for name in longer[short:] if name]
        parts.append(
            f"only the {who} has ids from {short} on, {len(extra)} of them "
            f"named: {', '.join(map(repr, extra[:4]))}"
        )
    sizes = f"({len(ours)} and {len(theirs)} ids)"
    return [
        error(
            "tokenizers",
            f"different vocabularies {sizes}: {'; '.join(parts)}",
            "probabilities cannot be compared id by id: choose a pair that "
            "shares one tokenizer",
        )
    ]


def encodings(
    student: Tokenizer, teacher: Tokenizer, records: Sequence[Record]
) -> list[Finding]:
    """Whether both cut real text into the same tokens."""
    for record in records[:SAMPLE]:
        for text in (record["prompt"], record["answer"]):
            ours, theirs = student.encode(text), teacher.encode(text)
            if ours != theirs:
                at = _first_difference(ours, theirs)
                return [
                    warning(
                        "encoding",
                        f"{text[:40]!r}… is cut differently from token {at} "
                        f"on: {_names(student, ours[at : at + 3])} / "
                        f"{_names(teacher, theirs[at : at + 3])}",
                        "the teacher will read tokens that it would not have "
                        "written: give both the same tokenizer files",
                    )
                ]
    return [ok("encoding", f"the same on {min(len(records), SAMPLE)} records")]


def templates(
    student: Tokenizer, teacher: Tokenizer, records: Sequence[Record]
) -> list[Finding]:
    """Whether both chat templates make the same prompt of a real record."""
    name, prompt = "chat template", records[0]["prompt"]
    try:
        ours = student.chat(prompt)
    except Exception as raised:  # templates raise whatever they like
        return [
            error(
                name,
                f"the student's makes no prompt ({raised})",
                "put a chat_template.jinja beside the student's tokenizer",
            )
        ]
    if teacher is student:
        return [ok(name, f"{len(ours)} tokens of {prompt[:30]!r}…")]
    try:
        theirs = teacher.chat(prompt)
    except Exception as raised:
        return [ok(name, f"the student's; the teacher has none ({raised})")]
    if ours == theirs:
        return [ok(name, f"both make the same {len(ours)} tokens")]
    at = _first_difference(ours, theirs)
    return [
        warning(
            name,
            f"prompts differ from token {at} on: student "
            f"{_text(student, ours, at)}, teacher {_text(teacher, theirs, at)}",
            "prompts are made by the student's, and the teacher has to read "
            "them: copy the teacher's chat_template.jinja to the student if "
            "the teacher should be asked as it was trained",
        )
    ]


def thinking(tokenizer: Tokenizer, value: bool | None) -> list[Finding]:
    """Whether data.thinking reaches the chat template."""
    name = "thinking mode"
    render = getattr(tokenizer, "render", None)
    if render is None:
        if value is None:
            return []
        return [
            warning(
                name,
                f"data.thinking={value} and no chat template to pass it to",
                "leave data.thinking at None",
            )
        ]
    on = render("2+2?", enable_thinking=True)
    off = render("2+2?", enable_thinking=False)
    if on == off and value is not None:
        return [
            warning(
                name,
                f"data.thinking={value} changes nothing: the chat template "
                "does not read enable_thinking",
                "leave data.thinking at None, or use a template that does",
            )
        ]
    if on == off:
        return []
    if value is None:
        default = "on" if tokenizer.chat("2+2?") == on else "off"
        return [
            ok(name, f"left to the template: {default} (data.thinking=None)")
        ]
    return [ok(name, f"data.thinking={value}")]


def ends(
    tokenizer: Tokenizer,
    others: Mapping[str, Sequence[int]],
    rows: int,
) -> list[Finding]:
    """Which ids end a completion, and which do not that should.

    Args:
      tokenizer: of the run, with the ends that it will use.
      others: who says so -> further ids that end a text for it.
      rows: of the smaller model; no id may lie beyond.
    """
    name, used = "ends", tokenizer.eos_ids
    found = []
    beyond = [i for i in (*used, tokenizer.pad_id) if not 0 <= i < rows]
    if beyond:
        found.append(
            error(
                name,
                f"the end or pad ids {beyond} are not below the models' {rows} "
                "rows",
                "correct eos_token_id and pad_token_id in the tokenizer and "
                "generation_config.json, or data.end_ids",
            )
        )
    for who, ids in others.items():
        unused = [i for i in ids if i not in used]
        if unused:
            found.append(
                warning(
                    name,
                    f"{who} ends a text with {_names(tokenizer, unused)}, at "
                    "which this run does not stop: completions may go on to "
                    "the limit",
                    f"--config.data.end_ids={','.join(map(str, unused))}",
                )
            )
    return found or [ok(name, f"stops at {_names(tokenizer, used)}")]


def turn_end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The id that the chat template puts behind an assistant's answer.

    Returns:
      (id,); () where there is no template, or text follows the answer.
    """
    if not hasattr(tokenizer, "render"):
        return ()
    try:
        whole = tokenizer.render(_DIALOGUE, ask=False)
    except Exception:  # a template that wants other turns
        return ()
    answer = tokenizer.encode(_DIALOGUE[1]["content"])
    for end in range(len(whole) - 1, len(answer) - 1, -1):
        if whole[end - len(answer) : end] == answer:
            follows = int(whole[end])
            return (follows,) if follows in tokenizer.special_ids else ()
    return ()


def pad(tokenizer: Tokenizer, own: int | None) -> list[Finding]:
    """What fills batches; masks say what exists, so it may be an end."""
    spelt = _names(tokenizer, [tokenizer.pad_id])
    if own is None:
        return [ok("pad", f"the tokenizer has none; {spelt} fills batches")]
    if tokenizer.pad_id in tokenizer.eos_ids:
        return [ok("pad", f"{spelt}, an end too: masks tell them apart")]
    return [ok("pad", spelt)]


def beginning(tokenizer: Tokenizer, prompt: str) -> list[Finding]:
    """Whether prompts begin with one bos, where the tokenizer adds one."""
    bos, name = tokenizer.bos_id, "bos"
    begins = getattr(tokenizer, "begins_texts", None)
    if bos is None or begins is None:
        return []
    head = list(tokenizer.chat(prompt)[:2])
    if head == [bos, bos]:
        return [
            warning(
                name,
                f"prompts begin with {_names(tokenizer, head)}: bos twice",
                "take bos_token out of the chat template",
            )
        ]
    if begins and head[:1] != [bos]:
        return [
            warning(
                name,
                f"texts begin with {_names(tokenizer, [bos])}, but prompts of "
                "the chat template do not",
                "put {{ bos_token }} at the start of the chat template",
            )
        ]
    return []


def rows(
    configs: Mapping[str, DecoderConfig], tokenizer: Tokenizer
) -> list[Finding]:
    """Rows of both models' vocabularies against the tokenizer's ids."""
    name, ids = "vocabulary", tokenizer.vocab_size
    sizes = {who: c.vocab_size for who, c in configs.items()}
    small = {who: n for who, n in sizes.items() if n < ids}
    if small:
        spelt = ", ".join(f"the {who} {n} rows" for who, n in small.items())
        return [
            error(
                name,
                f"the tokenizer has {ids} ids and {spelt}",
                "use the tokenizer that came with the weights, or resize the "
                "model's embedding",
            )
        ]
    shared = min(sizes.values())
    text = f"{ids} ids; " + ", ".join(
        f"{who} {n} rows ({n - ids} padded)" for who, n in sizes.items()
    )
    dropped = [
        f"{n - shared} of the {who}" for who, n in sizes.items() if n > shared
    ]
    if dropped:
        text += f"; dropped {', '.join(dropped)}, the rest renormalised"
    return [ok(name, text)]


def prompt_lengths(
    tokenizer: Tokenizer, records: Sequence[Record], settings: Settings
) -> list[Finding]:
    """How long prompts are, against data.max_prompt_length."""
    name, limit = "prompts", settings.data.max_prompt_length
    sample = records[:SAMPLE]
    lengths = np.asarray([len(tokenizer.chat(r["prompt"])) for r in sample])
    over = int((lengths > limit).sum())
    longest, middle = int(lengths.max()), int(np.median(lengths))
    text = (
        f"median {middle}, longest {longest} of at most {limit} tokens "
        f"({len(sample)} of {len(records)} prompts)"
    )
    if not over:
        return [ok(name, text)]
    text = f"{over / len(sample):.0%} are longer than allowed: {text}"
    raised = f"--config.data.max_prompt_length={longest}"
    if settings.data.on_long_prompt == "error":
        return [error(name, text, f"{raised}, or data.on_long_prompt='skip'")]
    if over == len(sample):
        return [error(name, f"{text}; none is left", raised)]
    if over > len(sample) // 10:
        return [warning(name, f"{text}; they are left out", raised)]
    return [ok(name, f"{text}; they are left out")]


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next(
        (i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b))
    )


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    names = tokenizer.vocabulary()
    return ", ".join(
        f"{i} {names[i]!r}" if 0 <= i < len(names) else f"{i}" for i in ids
    )


def _text(tokenizer: Any, ids: Sequence[int], begin: int) -> str:
    names = tokenizer.vocabulary()
    cut = [names[i] for i in ids[begin : begin + 8]]
    return repr("".join(cut)) if cut else "nothing more"
