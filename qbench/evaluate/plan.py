"""What to evaluate: perplexity on these texts, accuracy on these tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qbench.data.corpora import Use, known, load_text, versioned
from qbench.data.tokens import tokenize
from qbench.evaluate.divergence import reference_logits
from qbench.evaluate.harness import accuracy, check_names, prepare
from qbench.evaluate.perplexity import check_length, perplexity, windows_of
from qbench.evaluate.result import NOTHING, Evaluation


@dataclass(frozen=True)
class EvalPlan:
    """The evaluations of a job.

    Attributes:
        ppl: Corpora, evaluated on windows of `seq_len` tokens, at most `max_windows` of them, evenly spread.
        tasks: lm-eval tasks, on at most `limit` documents each.
        kl: Whether the windows also give the divergence from the floating-point model's predictions.
        split: The part of a corpus that is read. What is chosen by a number on the test text is not tested by it.
        batch_size, task_batch_size: Windows and lm-eval requests run together; no part of a job's identity.
    """

    ppl: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seq_len: int = 2048
    max_windows: int | None = None
    limit: int | None = None
    batch_size: int = 4
    task_batch_size: int = 32
    kl: bool = False
    split: Use = "test"

    def __post_init__(self) -> None:
        if not self.ppl and not self.tasks:
            raise ValueError("nothing to evaluate: eval.ppl and eval.tasks are both empty")
        if self.kl and not self.ppl:
            raise ValueError("eval.kl compares predictions on the windows of eval.ppl, which is empty")
        for name in self.ppl:
            if name not in known():
                raise ValueError(f"eval.ppl names {name!r}, known corpora are {', '.join(known())}")
        for key, least in (
            ("seq_len", 2),
            ("max_windows", 2),
            ("limit", 2),
            ("batch_size", 1),
            ("task_batch_size", 1),
        ):
            if (value := getattr(self, key)) is not None and value < least:
                raise ValueError(f"eval.{key} is {value}, it must be at least {least}")
        check_names(self.tasks)

    def identity(self) -> dict[str, Any]:
        """What can change a number."""
        return {
            "ppl": [versioned(name) for name in self.ppl],
            "tasks": [versioned(name) for name in self.tasks],
            "seq_len": self.seq_len if self.ppl else None,
            "max_windows": self.max_windows if self.ppl else None,
            "limit": self.limit if self.tasks else None,
            **(
                {"kl": True} if self.kl else {}
            ),  # only where they are set: earlier records stay what they were
            **({} if self.split == "test" else {"split": self.split}),
        }

    def check(self, tokenizer: Any, root: Path | None = None) -> None:
        """Refuse texts that are not there or too short; what is read here is kept.

        Raises:
            ValueError, FileNotFoundError: Saying which.
        """
        for name in self.ppl:
            check_length(name, self._tokens(name, tokenizer, root), self.seq_len)

    def prepare(self, tokenizer: Any, root: Path | None = None) -> None:
        """Read what will be evaluated on; it is kept."""
        self.check(tokenizer, root)
        prepare(self.tasks)

    def reference(self, model: Any, tokenizer: Any, root: Path | None = None) -> dict[str, Tensor]:
        """By corpus: what the floating-point `model` predicts, for `run`; empty where `kl` is unset."""
        if not self.kl:
            return {}
        windows = {
            n: windows_of(self._tokens(n, tokenizer, root), self.seq_len, self.max_windows) for n in self.ppl
        }
        return {name: reference_logits(model, w, self.batch_size) for name, w in windows.items()}

    def run(
        self,
        model: Any,
        tokenizer: Any,
        root: Path | None = None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> Evaluation:
        """Evaluate a model.

        Raises:
            ValueError: If `kl` is set and there is no `reference`.
        """
        if self.kl and not reference:
            raise ValueError(
                "eval.kl needs the floating-point model's predictions; pass EvalPlan.reference's"
            )
        result = NOTHING
        for name in self.ppl:
            result += perplexity(
                model, name, self._tokens(name, tokenizer, root),
                seq_len=self.seq_len, max_windows=self.max_windows, batch_size=self.batch_size,
                reference=reference[name] if reference else None,
            )  # fmt: skip
        return result + accuracy(
            model, tokenizer, self.tasks, limit=self.limit, batch_size=self.task_batch_size
        )

    def _tokens(self, name: str, tokenizer: Any, root: Path | None) -> Tensor:
        return tokenize(load_text(name, self.split, root), tokenizer)
