"""MT-Bench and Vicuna-bench: what a model answers to questions of one or two turns, for a judge to rate.

Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv:2306.05685. The benchmark samples, at
a temperature that depends on the question's category. Here every answer is greedy: the difference between two
quantized models is then the quantization's, not the draw's.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ 'User' if message.role == 'user' else 'Assistant' }}: {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_HEAD = b'{"digest": "'  # how a kept answer begins
_NEXT_USER = re.compile(r"^[ \t]*User:", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """What a user asks, turn after turn.

    Attributes:
        references: An answer known to be right for each turn, empty where a turn has none; or no answers at all.
    """

    id: int
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a model said to a question.

    Attributes:
        truncated: Whether a turn's prompt lost its beginning, because the model's context is too short.
    """

    question: Question
    turns: tuple[str, ...]
    truncated: bool


def questions(
    rows: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]] = ()
) -> list[Question]:
    """Questions from rows as FastChat writes them, or as the hub's `HuggingFaceH4/mt_bench_prompts` does.

    Args:
        references: FastChat's rows of answers by another model; they replace the references of the questions' rows.

    Raises:
        ValueError: Saying which row lacks what, or which id comes twice.
    """
    better = {_id(row): _first_choice(row) for row in references}
    found = [_question(row, better) for row in rows]
    ids = [question.id for question in found]
    if twice := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
        raise ValueError(f"questions {twice} come twice; an id must name one question")
    return found


def _question(row: Mapping[str, Any], better: Mapping[int, tuple[str, ...]]) -> Question:
    turns = _texts(row, "turns" if "turns" in row else "prompt", row.get("turns", row.get("prompt")))
    if not turns or not all(turn.strip() for turn in turns):
        raise ValueError(f"question {_id(row)} has an empty turn or none: {_short(row)}")
    if not isinstance(category := row.get("category"), str):
        raise ValueError(f"question {_id(row)} needs a category, a text; found {_short(row)}")
    known = better.get(_id(row), _texts(row, "reference", row.get("reference") or []))
    if known and len(known) != len(turns):
        raise ValueError(f"question {_id(row)} has {len(turns)} turns and {len(known)} reference answers")
    return Question(_id(row), category, turns, known)


def _id(row: Mapping[str, Any]) -> int:
    value = row.get("question_id", row.get("prompt_id"))
    if not isinstance(value, int):
        raise ValueError(f"a row needs question_id or prompt_id, an integer; found {_short(row)}")
    return value


def _first_choice(row: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        turns = row["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"reference {_id(row)} needs choices[0].turns; found {_short(row)}") from None
    return _texts(row, "choices[0].turns", turns)


def _texts(row: Mapping[str, Any], key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"row {_id(row)} needs {key} (or turns), a list of texts; found {_short(row)}")
    return tuple(value)


def _short(row: Mapping[str, Any]) -> str:
    return repr(dict(row))[:200]


def answer(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    template: str | None = None,
    keep: Path | None = None,
    on_question: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Greedy answers, one question after another; a later turn sees the earlier answers.

    A prompt that leaves no room for `max_new_tokens` in the model's context loses its beginning, and the answer is
    marked as truncated.

    Args:
        template: A chat template to use instead of the tokenizer's, for example `PLAIN_TEMPLATE`.
        keep: A file of JSON lines, one file per model. What it holds is not asked again, what is new is added at once.
        on_question: Called with (questions answered, questions in all).

    Raises:
        ValueError: If there is no chat template, no room in the context, or `keep` is no file of answers.
    """
    template = template if template is not None else _own_template(tokenizer)
    if not 1 <= max_new_tokens < (context := model.config.max_position_embeddings):
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, it must be at least 1 and below the context of {context} tokens"
        )
    kept = _kept(keep) if keep is not None else {}
    answers = []
    for done, question in enumerate(questions, 1):
        digest = _digest(question, template, max_new_tokens)
        if row := kept.get(digest):
            answers.append(Answer(question, tuple(row["turns"]), row["truncated"]))
        else:
            answers.append(_converse(model, tokenizer, question, template, max_new_tokens))
            if keep is not None:
                _add(keep, answers[-1], digest)
        on_question(done, len(questions))
    return answers


def _own_template(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; take an instruction-tuned model, or pass "
            "template=PLAIN_TEMPLATE, which any model can read"
        )
    return str(tokenizer.get_chat_template())


def _converse(model: Any, tokenizer: Any, question: Question, template: str, max_new_tokens: int) -> Answer:
    room = model.config.max_position_embeddings - max_new_tokens
    messages: list[dict[str, str]] = []
    said, truncated = [], False
    for turn in question.turns:
        messages.append({"role": "user", "content": turn})
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        # The template writes the special tokens, so the tokenizer must not add them a second time.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        truncated |= len(ids) > room
        reply = _generate(model, tokenizer, ids[-room:], max_new_tokens, plain=template == PLAIN_TEMPLATE)
        messages.append({"role": "assistant", "content": reply})
        said.append(reply)
    return Answer(question, tuple(said), truncated)


def _generate(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int, *, plain: bool) -> str:
    """The most likely continuation, up to an end token; of a plain dialogue, up to the user's next line."""

    def speaks_for_user(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        text = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
        return torch.tensor([_NEXT_USER.search(text) is not None], device=ids.device)

    ids = torch.tensor([prompt], device=model.device)
    end = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
    # A checkpoint's own sampling settings and penalties would make it another protocol than the next one's.
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
            do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
            eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0),
            stopping_criteria=[speaks_for_user] if plain else [],
        )  # fmt: skip
    text = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
    return str(_NEXT_USER.split(text, maxsplit=1)[0] if plain else text).strip()


def _digest(question: Question, template: str, max_new_tokens: int) -> str:
    asked = json.dumps([question.id, question.turns, template, max_new_tokens])
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _kept(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by digest. A last line without an end, left by a killed process, is cut off the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows = {}
    for number, line in enumerate(whole.splitlines(), 1):
        if not line.startswith(_HEAD):
            raise ValueError(f"line {number} of {path} is no kept answer; name another file, or delete this")
        row = json.loads(line)
        rows[row["digest"]] = row
    if torn := content[len(whole) :]:
        if not torn.startswith(_HEAD[: len(torn)]):
            raise ValueError(f"{path} ends in no kept answer; name another file, or delete this")
        os.truncate(path, len(whole))
    return rows


def _add(path: Path, answer: Answer, digest: str) -> None:
    row = {"digest": digest, "id": answer.question.id, "turns": answer.turns, "truncated": answer.truncated}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
