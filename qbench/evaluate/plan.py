"""What to evaluate: perplexity on these texts, accuracy on these tasks, answers to these questions."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from qbench.data.corpora import CORPORA, Text, Use, check_name, is_file, known, load_text, short, versioned
from qbench.data.library import Library
from qbench.data.overlap import Signature, signature
from qbench.data.sources import Source
from qbench.data.tokens import tokenize
from qbench.data.windows import Windows, evaluation_windows
from qbench.evaluate import harness, sandbox, stock
from qbench.evaluate.dispatch import room_on
from qbench.evaluate.stock import Shots
from qbench.evaluate.talk import BENCHES, Talk


@dataclass(frozen=True)
class EvalPlan:
    """The evaluations of a job.

    Attributes:
        ppl: Corpora or paths of texts, evaluated on windows of `seq_len` tokens, at most `max_windows` of them, evenly
            spread.
        tasks: Tasks of lm-eval, ours, or embedded, on at most `limit` documents each.
        against_fp: Whether predictions and answers are also compared with the floating-point model's.
        split: The part of a corpus that is read. What is chosen by a number on the test text is not tested by it.
        stride: Windows overlap and begin every so many tokens; `None` for windows that do not.
        decode_ppl: Corpora whose perplexity is taken as generation goes, token by token through the cache, on at most
            `decode_windows` windows.
        shots: Solved examples before a question.
        talk: Dialogue; `None` for none.
        unsafe: Whether code that the model writes may be run.
        skipped: Tasks that were asked for and whose data are missing, with the reason.
        streamed: Whether one block at a time is on the device; `None` where the model does not fit otherwise.
        device_map: `auto` to spread the model over all CUDA devices; `None` for the job's device alone.
        batch_size, task_batch_size: Windows and lm-eval requests run together; no part of a job's identity.
    """

    ppl: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seq_len: int = 2048
    max_windows: int | None = None
    limit: int | None = None
    batch_size: int = 4
    task_batch_size: int | None = 32
    against_fp: bool = False
    split: Use = "test"
    stride: int | None = None
    decode_ppl: tuple[str, ...] = ()
    decode_windows: int | None = 8
    shots: Shots = field(default_factory=Shots)
    talk: Talk | None = None
    unsafe: bool = False
    streamed: bool | None = None
    device_map: Literal["auto"] | None = None
    skipped: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not (self.ppl or self.tasks or self.decode_ppl or self.talk or self.skipped):
            raise ValueError("nothing to evaluate: eval.ppl and eval.tasks are both empty")
        if self.against_fp and not self.ppl and not self.tasks:
            raise ValueError(
                "eval.against_fp compares on the texts of eval.ppl and on eval.tasks, which are empty"
            )
        if self.streamed and self.device_map:
            raise ValueError(
                "eval.streamed=true has one block at a time on one device, and eval.device_map=auto has all blocks on "
                "several; unset one of them"
            )
        for key, names in (("ppl", self.ppl), ("decode_ppl", self.decode_ppl)):
            for name in names:
                check_name(name, self.split, f"eval.{key}")
        for key, least in (
            ("seq_len", 2), ("max_windows", 2), ("limit", 2), ("batch_size", 1), ("task_batch_size", 1), ("stride", 1),
            ("decode_windows", 2),
        ):  # fmt: skip
            if (value := getattr(self, key)) is not None and value < least:
                why = (
                    ", or there is no standard error"
                    if key in ("max_windows", "limit", "decode_windows")
                    else ""
                )
                raise ValueError(f"eval.{key} is {value}, it must be at least {least}{why}")
        if self.stride is not None and self.stride >= self.seq_len:
            raise ValueError(f"eval.stride is {self.stride}, it must be below eval.seq_len={self.seq_len}")
        if self.stride is not None and (
            random := [n for n in self.ppl if n in CORPORA and CORPORA[n].is_random]
        ):
            raise ValueError(
                f"eval.stride does not go with {', '.join(random)}, whose windows are at random places"
            )
        for names in (self.ppl, self.decode_ppl):
            shown = [short(name) for name in names]
            for name in names:
                if shown.count(short(name)) > 1 or (is_file(name) and short(name) in known(self.split)):
                    raise ValueError(
                        f"two texts would be called {short(name)!r} in tables; rename the file {name!r}"
                    )
        for name in self.tasks:
            if name in BENCHES:
                raise ValueError(f"{name} is no task but a dialogue: eval.dialogue=[{name}]")
        harness.check_names(self.tasks)

    @property
    def windows_are_read(self) -> bool:
        return bool(self.ppl or self.decode_ppl)

    def identity(self) -> dict[str, Any]:
        """What can change a number."""
        optional = {  # only where they are set: earlier records stay what they were
            "against_fp": self.against_fp,
            "split": self.split if self.split != "test" else None,
            "stride": self.stride if self.ppl else None,
            "decode_ppl": [versioned(name) for name in self.decode_ppl],
            "decode_windows": self.decode_windows if self.decode_ppl else None,
            "shots": {name: n for name, n in self.shots.by_task if name in self.tasks},
            "shots_split": self.shots.split if self.tasks else None,
            "harness": None if set(self.tasks) <= harness.EMBEDDED.keys() else stock.versions(),
            "talk": self.talk.identity() if self.talk else None,
        }
        return {
            "ppl": [versioned(name) for name in self.ppl],
            "tasks": [versioned(name) for name in self.tasks],
            "seq_len": self.seq_len if self.windows_are_read else None,
            "max_windows": self.max_windows if self.ppl else None,
            "limit": self.limit if self.tasks else None,
            **{key: value for key, value in optional.items() if value},
        }

    def resolved(self, library: Library, *, skip: bool) -> "EvalPlan":
        """This plan without the tasks whose data are missing, where they may be skipped.

        Raises:
            ValueError: If nothing is left.
        """
        if not skip:
            return self
        found = {name: harness.missing(name, library, self.shots) for name in self.tasks}
        gone = tuple((name, reason) for name, reason in found.items() if reason)
        left = tuple(name for name in self.tasks if not found[name])
        if not (left or self.ppl or self.decode_ppl or self.talk):
            raise ValueError(f"no task has its data; {gone[0][0]}: {gone[0][1]}")
        return replace(self, tasks=left, skipped=gone)

    def check(self, tokenizer: Any, library: Library) -> None:
        """Refuse what is not there or too short; what is read here is kept.

        Raises:
            ValueError, FileNotFoundError: Saying which.
        """
        for name in dict.fromkeys((*self.ppl, *self.decode_ppl)):
            self.windows(name, tokenizer, library)
        gone = {n: reason for n in self.tasks if (reason := harness.missing(n, library, self.shots))}
        if gone:
            name, reason = next(iter(gone.items()))
            raise FileNotFoundError(
                f"{len(gone)} of {len(self.tasks)} tasks lack data: {', '.join(gone)}; eval.skip_missing=true leaves "
                f"them out, `qbench data list` says where they are looked for. {name}: {reason}"
            )
        if self.talk is not None:
            self.talk.check(tokenizer, library)
        if code := [name for name in self.tasks if harness.runs_code(name)]:
            if not self.unsafe:
                raise ValueError(
                    f"what the model writes is run by {', '.join(code)}; allow it with eval.allow_code_execution=true, or "
                    "leave it out"
                )
            sandbox.check()

    def prepare(self, tokenizer: Any, library: Library) -> None:
        """Read what will be evaluated on; it is kept."""
        self.check(tokenizer, library)
        for name in self.tasks:
            harness.tasks_of(name, library, self.shots)

    def needed(self) -> Iterator[tuple[Source, str, str | None]]:
        """The splits that are read, each with its corpus; what is embedded or the user's own is not among them."""
        for name in (*self.ppl, *self.decode_ppl):
            if name in CORPORA:
                yield CORPORA[name].source, CORPORA[name].splits[self.split], name
        for name in self.tasks:
            for leaf in () if name in harness.EMBEDDED else stock.leaves(name):
                if leaf.source is not None:
                    yield from ((leaf.source, split, None) for split in stock.needed(name, leaf, self.shots))
        for name in self.talk.benches if self.talk else ():
            yield BENCHES[name][0], "train", name  # the judge's references may be lacking

    def provenance(self, library: Library) -> dict[str, dict[str, Any]]:
        """Which data the numbers come from: where they were found, SHA-256."""
        texts = {n: load_text(n, self.split, library) for n in dict.fromkeys((*self.ppl, *self.decode_ppl))}
        data: dict[str, dict[str, Any]] = {
            f"eval/{short(n)}": {"origin": t.origin, "sha256": t.sha256} for n, t in texts.items()
        }
        return data | {f"eval/{name}": harness.origin(name, library, self.shots) for name in self.tasks}

    def signatures(self, tokenizer: Any, library: Library) -> dict[str, Signature]:
        """By text or task: what must not occur in calibration text."""
        found = {
            short(n): _signature(load_text(n, self.split, library), tokenizer)
            for n in dict.fromkeys((*self.ppl, *self.decode_ppl))
        }
        return found | {name: harness.questions(name, library, self.shots, tokenizer) for name in self.tasks}

    def check_device(self, device: str) -> None:
        """Raises ValueError if the model is to be spread over CUDA devices, and the job's own is none."""
        if self.device_map and torch.device(device).type != "cuda":
            raise ValueError(
                f"eval.device_map={self.device_map} spreads the model over CUDA devices, and the job's is {device}; set "
                "device=cuda, or eval.device_map=null"
            )

    def fits(self, model: Any, device: str) -> bool:
        """Whether a model is put on the device, or the devices, whole.

        Raises:
            ValueError: As `check_device` does.
        """
        self.check_device(device)
        if self.streamed is not None:
            return not self.streamed
        if self.device_map or torch.device(device).type != "cuda":
            return True
        return sum(p.numel() * p.element_size() for p in model.parameters()) <= room_on(device)

    def windows(self, name: str, tokenizer: Any, library: Library) -> Windows:
        """The windows of a text that its perplexity is of."""
        text = load_text(name, self.split, library)
        return evaluation_windows(text, tokenizer, self.seq_len, self.max_windows, self.stride)


@lru_cache(maxsize=16)
def _signature(text: Text, tokenizer: Any) -> Signature:
    return signature([tokenize(text, tokenizer)])
