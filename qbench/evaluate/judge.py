"""Ratings from 1 to 10 of a model's answers, by another model behind an OpenAI-compatible endpoint.

Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv:2306.05685: grading of single answers,
beside a reference answer where there is one. The prompts are our own, so ratings compare with one another and not
with published ones.
"""

import hashlib
import json
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qbench.errors import first_line
from qbench.evaluate.dialogue import Answer
from qbench.evaluate.result import NOTHING, Evaluation

PROMPT_REVISION = 1
_KEYS = ("QBENCH_JUDGE_KEY", "OPENAI_API_KEY")
_PASSING = {408, 409, 429}
_ASKS = 3  # how often a prompt is put before its answer counts as unjudged
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_SYSTEM = "You mark the work of language models. Judge what is there, without favour; length earns no marks."
_TASK = """\
A user talked to a model. Mark the model's last reply; what precedes it only shows what the user wants.
Ask whether the reply is true, does all that was asked, leaves out what was not, and is clear to read.
{reference}
{dialogue}

Say in two or three sentences what speaks for and against the last reply. Then close with your mark, a number
from 1 (of no use) to 10 (nothing to improve), in double square brackets: [[n]] with the number for n."""
_REFERENCE = """\
Measure the reply against this one, which is known to be right; other words or another way are no fault:
<known_right>
{}
</known_right>
"""


@dataclass(frozen=True)
class Judge:
    """A model that rates. Its key is read from `QBENCH_JUDGE_KEY`, else `OPENAI_API_KEY`, whenever it is asked.

    Attributes:
        base_url: What stands before `/chat/completions`.
        timeout: Seconds to wait for the server to say something.
        attempts: Requests before an endpoint that is busy or out of reach stops the job.
        max_tokens: Most that it may write to a prompt; `None` leaves it to the server.
        longest_wait: Seconds between two attempts at most, whatever the server asks for.
    """

    base_url: str
    model: str
    timeout: float = 120
    attempts: int = 5
    max_tokens: int | None = 1024
    longest_wait: float = 60
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        secretive = "@" in url.netloc or url.query or url.fragment
        if url.scheme not in ("http", "https") or not url.hostname or secretive:
            # The address is not repeated: it may hold a password.
            raise ValueError(
                "the judge's base_url must look like https://host/v1, without a password or a query; "
                f"put the key into {_KEYS[0]}"
            )
        if self.attempts < 1 or not self.timeout > 0:
            raise ValueError(f"a judge needs 1 attempt and a timeout above 0, found {self!r}")

    @property
    def endpoint(self) -> str:
        return self.base_url.rstrip("/") + "/chat/completions"

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return {"model": self.model, "messages": messages, "temperature": 0, **limit}

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The reply, empty if the model gives none.

        Raises:
            ConnectionError: If the endpoint refuses, or was out of reach or busy at every attempt.
        """
        data, jitter = json.dumps(self.body(messages)).encode(), random.Random()
        for attempt in range(1, self.attempts + 1):
            status, headers, text = self._post(data)
            if status == 200 and (reply := _reply(text)) is not None:
                return reply
            problem = f"status {status}" if status else "no answer"
            said = next(iter(text.strip().splitlines()), "")[:200]
            if not (status in {0, 200} | _PASSING or status >= 500):
                hint = f"; set {_KEYS[0]}" if status == 401 and not _key() else ""
                raise ConnectionError(f"judge at {self.endpoint} refused with {problem}: {said}{hint}")
            if attempt < self.attempts:
                backoff = 2 ** (attempt - 1) * (0.5 + jitter.random() / 2)
                self.sleep(min(self.longest_wait, max(backoff, _retry_after(headers))))
        raise ConnectionError(
            f"judge at {self.endpoint} gave {problem} at the last of {self.attempts} attempts: {said}; "
            "what it judged so far is kept, run again when it is back"
        )

    def _post(self, data: bytes) -> tuple[int, Mapping[str, str], str]:
        """Status (0 where there was no response), headers, and body or problem, without the key if it was in there."""
        from http.client import HTTPException
        from urllib.request import HTTPErrorProcessor, Request, build_opener

        class AsItIs(HTTPErrorProcessor):
            """Take every response as it is. Following a redirect, urllib would take the key to another host."""

            def http_response(self, request: Any, response: Any) -> Any:
                return response

            https_response = http_response

        key = _key()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            opener = build_opener(AsItIs)
            with opener.open(Request(self.endpoint, data, headers), timeout=self.timeout) as response:
                text = response.read().decode("utf-8", "replace")
                status, answered = response.status, response.headers
        except (OSError, HTTPException) as error:
            status, answered, text = 0, {}, first_line(error)
        # A shorter key is no secret, but a word such as EMPTY that may well stand in a reply.
        return status, answered, text.replace(key, "[key]") if len(key) >= 8 else text


def _key() -> str:
    """The key, or an empty text: an endpoint of one's own often needs none."""
    key = next((found for name in _KEYS if (found := os.environ.get(name, "").strip())), "")
    if not key.isascii() or not key.isprintable():
        raise ValueError(
            f"the judge's key ({' or '.join(_KEYS)}) has characters that no HTTP header can hold"
        )
    return key


def _reply(text: str) -> str | None:
    """What the model says in a chat completion; `None` if this is none."""
    try:
        return str(json.loads(text)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        return None


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait, as a number or until a date; 0 if it does not."""
    value = headers.get("Retry-After") or "0"
    try:
        return (
            float(value)
            if value.replace(".", "").isdigit()
            else parsedate_to_datetime(value).timestamp() - time.time()
        )
    except ValueError:
        return 0.0


def judge(answers: Sequence[Answer], bench: str, judge: Judge, cache: Path) -> Evaluation:
    """`judge/<bench>`: the mean over questions of the mean rating of a question's turns.

    `judge_turn1/<bench>`, `judge_turn2/<bench>` are means of that turn's ratings. Answers that the judge gave no
    readable rating for are left out, and `unjudged/<bench>` counts them.

    Args:
        cache: A folder of the judge's replies, which are not asked for again.

    Raises:
        ConnectionError: If the endpoint does not answer; what was judged is kept.
        ValueError: If there is nothing to judge.
    """
    if not answers:
        raise ValueError(f"there are no answers to {bench} to judge; answer its questions first")
    ratings = [
        (answer.question, [_rate(judge, prompt(answer, turn), cache) for turn in range(len(answer.turns))])
        for answer in answers
    ]
    overall, result = f"judge/{bench}", NOTHING
    samples: list[dict[str, Any]] = []
    for question, of_turns in ratings:
        if known := [rating for rating in of_turns if rating is not None]:
            value = sum(known) / len(known)
            samples.append(
                {"metric": overall, "item": question.id, "value": value, "part": question.category}
            )
    result += _mean(overall, [sample["value"] for sample in samples])
    for i in range(max((len(of_turns) for _, of_turns in ratings), default=0)):
        of_turn = [turns[i] for _, turns in ratings if len(turns) > i]
        result += _mean(f"judge_turn{i + 1}/{bench}", [rating for rating in of_turn if rating is not None])
    unjudged = sum(rating is None for _, of_turns in ratings for rating in of_turns)
    return result + Evaluation({f"unjudged/{bench}": float(unjudged)}, samples)


def prompt(answer: Answer, turn: int) -> list[dict[str, str]]:
    """What the judge is asked about the reply of turn `turn`, counted from 0."""
    said = zip(answer.question.turns, answer.turns[: turn + 1], strict=False)
    dialogue = "\n".join(f"<user>\n{user}\n</user>\n<model>\n{model}\n</model>" for user, model in said)
    known = answer.question.references[turn] if answer.question.references else ""
    reference = _REFERENCE.format(known) if known else ""
    task = _TASK.format(reference=reference, dialogue=dialogue)
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": task}]


def _rate(judge: Judge, messages: list[dict[str, str]], cache: Path) -> float | None:
    """The rating, or `None` if no reply holds a readable one."""
    for attempt in range(_ASKS):
        marks = _RATING.findall(_cached(judge, messages, attempt, cache))
        if marks and 1 <= (rating := float(marks[-1])) <= 10:
            return rating
    return None


def _cached(judge: Judge, messages: list[dict[str, str]], attempt: int, cache: Path) -> str:
    asked = {
        "revision": PROMPT_REVISION, "endpoint": judge.endpoint, "attempt": attempt, **judge.body(messages)
    }  # fmt: skip
    path = cache / f"{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()}.json"
    if path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["reply"])
    reply = judge.ask(messages)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=cache, suffix=".tmp", delete=False) as file:
        json.dump(asked | {"reply": reply}, file)
    Path(file.name).replace(path)  # at once: a process that reads meanwhile finds all or nothing
    return reply


def _mean(name: str, values: list[float]) -> Evaluation:
    """A mean with its standard error over questions; a single question has none, and no question no mean."""
    if not values:
        return NOTHING
    mean, n = sum(values) / len(values), len(values)
    metrics = {name: mean}
    if n > 1:
        metrics[f"{name}_stderr"] = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return Evaluation(metrics, [])
