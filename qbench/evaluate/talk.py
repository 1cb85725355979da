"""Dialogue in a job: which questions, who judges the answers, where they are kept."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qbench.data.library import Library
from qbench.data.sources import Source
from qbench.evaluate.dialogue import PLAIN_TEMPLATE, Answer, Question, answer, questions
from qbench.evaluate.judge import PROMPT_REVISION, Judge, judge
from qbench.evaluate.result import NOTHING, Evaluation

# Where the questions are, and the judge's reference answers, where there are such.
BENCHES = {
    "mt_bench": (Source("HuggingFaceH4/mt_bench_prompts"), Source("mt_bench_references")),
    "vicuna_bench": (Source("vicuna_bench"), None),
}


@dataclass(frozen=True)
class Talk:
    """Questions in several turns.

    Attributes:
        limit: The first questions of each bench; `None` for all.
        plain: Put conversations in plain words, whatever template the tokenizer has or lacks.
        judge: Who marks the answers; `None` keeps them without marks.
    """

    benches: tuple[str, ...]
    max_new_tokens: int = 512
    limit: int | None = None
    plain: bool = False
    judge: Judge | None = field(default=None)

    def __post_init__(self) -> None:
        for name in self.benches:
            if name not in BENCHES:
                raise ValueError(f"eval.dialogue names {name!r}, there are {', '.join(BENCHES)}")
        if self.max_new_tokens < 1:
            raise ValueError(f"eval.max_new_tokens is {self.max_new_tokens}, it must be at least 1")

    def identity(self) -> dict[str, Any]:
        """What can change a number."""
        return {
            "benches": list(self.benches), "max_new_tokens": self.max_new_tokens, "limit": self.limit,
            "plain": self.plain, "judge": self.judge.model if self.judge else None,
            **({"prompt": PROMPT_REVISION} if self.judge else {}),
        }  # fmt: skip

    def check(self, tokenizer: Any, library: Library) -> None:
        """Refuse questions that are not there, and a tokenizer that cannot put them.

        Raises:
            ValueError, FileNotFoundError: Saying what to do.
        """
        for name in self.benches:
            self.questions(name, library)
        if not self.plain and not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, which eval.dialogue needs; eval.plain_dialogue=true puts "
                "conversations in plain words"
            )

    def questions(self, bench: str, library: Library) -> list[Question]:
        asked, solved = BENCHES[bench]
        rows = library.rows(asked, "train", bench).data
        references = (
            library.rows(solved, "train", bench).data if solved and library.local(solved, "train") else ()
        )
        return questions(rows, references)[: self.limit]

    def run(self, model: Any, tokenizer: Any, library: Library, folder: Path | None) -> Evaluation:
        """Ask, and have the answers judged.

        Args:
            folder: Keeps answers, so that a killed job goes on where it stopped, and beside it, for all jobs, judgements.
        """
        if self.judge is not None and folder is None:
            raise ValueError("a judge needs a folder for its judgements, so that none is asked for twice")
        given: dict[str, list[Answer]] = {}
        for bench in self.benches:  # all answers first: they take longest, and a judge may be out of reach
            keep = folder / f"{bench}.jsonl" if folder else None
            given[bench] = answer(
                model, tokenizer, self.questions(bench, library), max_new_tokens=self.max_new_tokens, keep=keep,
                template=PLAIN_TEMPLATE if self.plain else None,
            )  # fmt: skip
        result = NOTHING
        for bench, answers in given.items():
            result += _cut(bench, answers)
            if self.judge is not None and folder is not None:
                try:
                    result += judge(answers, bench, self.judge, folder.parent / "judgements")
                except ConnectionError as error:
                    raise ConnectionError(
                        f"{error}; the answers are in {folder}, and are not asked for again"
                    ) from error
        return result


def _cut(bench: str, answers: list[Answer]) -> Evaluation:
    """How many prompts were cut off: there where a conversation is longer than the model reads."""
    cut = sum(answer.truncated for answer in answers)
    return Evaluation({f"truncated/{bench}": cut / len(answers)}, []) if cut else NOTHING
