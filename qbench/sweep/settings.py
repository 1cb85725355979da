"""The config of one job, checked: from plain values to the objects of the house."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from qbench.algorithms.base import Algorithm
from qbench.algorithms.fp import FloatingPoint
from qbench.data.calibration import CalibrationSet
from qbench.data.library import Library
from qbench.engine import needs_data
from qbench.errors import Unsuitable
from qbench.evaluate.judge import Judge
from qbench.evaluate.plan import EvalPlan
from qbench.evaluate.stock import Shots
from qbench.evaluate.talk import Talk
from qbench.job import Job
from qbench.models.load import ModelRef, fastest_dtype
from qbench.quant.scheme import Scheme
from qbench.sweep.steps import in_full, title


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSettings(_Strict):
    id: str
    revision: str | None = None
    dtype: Literal["auto", "fastest", "float32", "bfloat16", "float16"] = "auto"
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    outliers: float | None = None


class CalibSettings(_Strict):
    name: str
    n_samples: int
    seq_len: int
    propagate_error: bool = True
    batch_size: int = 2
    recipe: Literal["windows", "document", "pack", "truncate"] | None = None
    path: str | None = None
    mix: dict[str, float] | None = None


class EvalSettings(_Strict):
    """What is evaluated.

    Attributes:
        shots: Solved examples before a question, by task; `shots_split` is where they come from.
        task_batch_size: `None` for as many as the GPU holds.
        skip_missing: Leave out tasks whose data are missing, rather than refuse the job.
        streamed: Keep one block at a time on the device; `None` where the model does not fit otherwise.
    """

    ppl: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seq_len: int = 2048
    max_windows: int | None = None
    stride: int | None = None
    limit: int | None = None
    shots: dict[str, NonNegativeInt] | None = None
    shots_split: str | None = None
    batch_size: int = 4
    task_batch_size: int | None = 32
    against_fp: bool = False
    split: Literal["test", "calibration"] = "test"
    decode_ppl: tuple[str, ...] = ()
    decode_windows: int | None = 8
    dialogue: tuple[str, ...] = ()
    max_new_tokens: int = 512
    plain_dialogue: bool = False
    skip_missing: bool = False
    allow_code_execution: bool = False
    streamed: bool | None = None


class JudgeSettings(_Strict):
    """Who marks dialogue: an endpoint that speaks OpenAI's protocol. Its key is read from the environment alone."""

    base_url: str | None = None
    model: str | None = None
    timeout: PositiveFloat = 120.0


class SchemeSettings(_Strict):
    """What single layers have in place of the scheme: bits (and a group size) by pattern, `{down_proj: w8a8}`."""

    overrides: dict[str, str] | None = None


class DataSettings(_Strict):
    """Where data sets are.

    Attributes:
        files: Paths that serve in place of the usual ones, by `<corpus or hub id>/<split>`.
    """

    root: Path | None = None
    files: dict[str, str] | None = None

    @property
    def library(self) -> Library:
        return Library(self.root, tuple((self.files or {}).items()))


class TrackerSettings(_Strict):
    """Where records are mirrored to.

    Attributes:
        system_metrics: Record what each job uses of processor and memory, every second.
    """

    uri: str | None = None
    experiment: str = "qbench"
    system_metrics: bool = False


class JobSettings(_Strict):
    """How a job is run.

    Attributes:
        timeout: Seconds after which it counts as failed; it needs a process of its own.
        attempts: How many workers may be lost on it before it counts as failed.
    """

    timeout: PositiveFloat | None = None
    attempts: PositiveInt = 2


class LauncherSettings(_Strict):
    """Where workers run.

    Attributes:
        workers: How many; `None` for one, or one for each GPU where jobs run on GPUs.
        threads: Of each worker; `None` shares the cores of the machine out.
        lease: Seconds of silence after which a worker on another machine counts as lost.
        respawns: How often a worker that was lost is replaced (Slurm and Ray).
        cpus, gpus: Of each worker (Slurm and Ray).
        minutes: A worker's time limit; `queue_minutes`: how long to wait for the first worker.
        cluster: `slurm`, or `local` to try submitit without a cluster.
        options: Passed on to submitit's executor (`slurm_partition`, `slurm_account`, `mem_gb`, ...).
        address: Of a Ray cluster; `None` starts one on this machine.
    """

    kind: Literal["inline", "local", "slurm", "ray"]
    workers: PositiveInt | None = None
    threads: PositiveInt | None = None
    lease: PositiveFloat = 60.0
    respawns: int = 4
    cpus: PositiveInt = 1
    gpus: float = 0
    minutes: PositiveInt = 1440
    queue_minutes: PositiveFloat = 1440
    cluster: Literal["slurm", "local"] = "slurm"
    options: dict[str, Any] = {}
    address: str | None = None


class Plain(_Strict):
    """The keys of `conf/config.yaml` that are no sections.

    Attributes:
        force: Run jobs again that have a record.
        baseline: Let a sweep also run the floating-point model that its jobs are compared with.
        plan: Show what would run, and run nothing.
    """

    algo_name: str
    wbits: int
    abits: int
    kvbits: int
    group_size: int | None
    weight_symmetric: bool
    weight_format: str
    weight_granularity: Literal["auto", "tensor", "block"]
    symmetric_mode: Literal["full", "restricted", "gptq"]
    real_zero: bool
    zero_in_range: bool
    scale_bits: int
    scale_group: PositiveInt
    act_symmetric: bool
    act_format: str
    act_granularity: Literal["token", "group", "tensor"]
    act_group_size: PositiveInt | None
    act_range: Literal["minmax", "average", "percentile", "mse"]
    kv_layout: Literal["token", "kivi", "tensor"]
    kv_group_size: PositiveInt | None
    kv_symmetric: bool
    kv_residual: NonNegativeInt | None
    kv_rotate: bool
    quant_bmm: bool
    seed: int
    device: str
    results: Path
    force: bool
    baseline: bool
    plan: bool


_SCHEME_KEYS = [name for name in signature(Scheme.of).parameters if name in Plain.model_fields]


def _scheme(asked: Plain, layers: "SchemeSettings") -> Scheme:
    """The scheme that the keys describe together.

    Raises:
        Unsuitable, ValueError: If they contradict each other.
    """
    return Scheme.of(**{name: getattr(asked, name) for name in _SCHEME_KEYS}, overrides=layers.overrides)


class Settings(Plain):
    """Every key of `conf/config.yaml`."""

    algo: dict[str, Any]
    scheme: SchemeSettings  # type: ignore[assignment]
    model: ModelSettings
    calib: CalibSettings
    eval: EvalSettings
    judge: JudgeSettings
    data: DataSettings
    tracker: TrackerSettings
    launcher: LauncherSettings
    job: JobSettings


@dataclass
class Jobs:
    """Builds the jobs of many configs; what configs share (the same object, from one composer) is built once."""

    _parts: dict[tuple[str, int], tuple[Any, Any]] = field(default_factory=dict)
    _plain: dict[tuple[Any, ...], Plain] = field(default_factory=dict)
    _schemes: dict[Plain, Scheme] = field(default_factory=dict)

    def settings(self, config: dict[str, Any]) -> Settings:
        """Check a composed config.

        Raises:
            ValueError: With one line that names the key and what it should be.
        """
        return _read(
            Settings, "", config | {name: self._section(name, config) for name in _SECTIONS if name in config}
        )

    def job(self, config: dict[str, Any]) -> Job:
        """Build the job of a config.

        Raises:
            Unsuitable: If valid choices do not go together.
            ValueError: If a value is out of range, or a key unknown.
        """
        asked = self._checked_plain(config)
        model, calib, evaluation, judge, data = (
            self._section(name, config) for name in ("model", "calib", "eval", "judge", "data")
        )
        name = title(asked.algo_name, config["algo"])
        algorithm = self._once("algorithm", config["algo"], partial(build_algorithm, name))
        is_float = isinstance(algorithm, FloatingPoint)
        if algorithm.kind != "round":
            raise Unsuitable(f"algo={name} rounds nothing", "end it with a rounder, such as algo.round=rtn")
        scheme = Scheme() if is_float else self._scheme(asked, config["scheme"])
        if scheme.is_float and not is_float:
            raise Unsuitable(f"algo={name} has nothing to quantize at w16a16", "set wbits, abits or kvbits")
        tokens = None
        if needs_data(algorithm, scheme):
            tokens = self._once(f"seed {asked.seed}", calib, partial(calibration, seed=asked.seed))
        return Job(
            self._once(asked.device, model, partial(_model, device=asked.device)), name, algorithm, scheme,
            tokens, self._evaluations(evaluation, judge, data.library), asked.device, data.library, config,
        )  # fmt: skip

    def _checked_plain(self, config: dict[str, Any]) -> Plain:
        try:
            key = tuple([config[name] for name in Plain.model_fields])
            if (known := self._plain.get(key)) is not None:
                return known
        except (
            KeyError,
            TypeError,
        ):  # a key is missing, or has a value of the wrong kind: let the check say so
            key = ()
        self.settings(config)  # a section that no job reads, or a key that nobody knows, is refused as well
        found = self._plain[key] = _read(
            Plain, "", {k: v for k, v in config.items() if k in Plain.model_fields}
        )
        return found

    def _scheme(self, asked: Plain, section: Any) -> Scheme:
        layers = self._section("scheme", {"scheme": section})
        if layers.overrides:
            return _scheme(asked, layers)
        if asked not in self._schemes:
            self._schemes[asked] = _scheme(asked, layers)
        return self._schemes[asked]

    def _evaluations(self, asked: EvalSettings, judge: JudgeSettings, library: Library) -> EvalPlan:
        # The sections are kept by _once, so that their ids stay their own.
        name = f"evaluation {id(judge)} {library}"
        return self._once(name, asked, lambda _: _evaluation(asked, judge, library))

    def _section(self, name: str, config: dict[str, Any]) -> Any:
        return self._once(name, config[name], _SECTIONS[name])

    def _once(self, name: str, part: Any, build: Callable[[Any], Any]) -> Any:
        key = (name, id(part))
        if (known := self._parts.get(key)) is None:
            known = self._parts[key] = part, build(part)  # the part is kept, so that its id stays its own
        return known[1]


def floating_point(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the unquantized model with the same evaluation."""
    return config | {"algo_name": "fp", "algo": _FLOATING_POINT}


_FLOATING_POINT = {"_target_": f"{FloatingPoint.__module__}.{FloatingPoint.__name__}"}

Read = TypeVar("Read", bound=_Strict)


def _read(kind: type[Read], name: str, config: dict[str, Any]) -> Read:
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (name, *first["loc"]) if part != "")
        problem = first["msg"][0].lower() + first["msg"][1:]
        raise ValueError(f"{key}={first['input']!r}: {problem}") from error


_SECTIONS: dict[str, Callable[[Any], _Strict]] = {
    name: partial(_read, kind, name)
    for name, kind in (
        ("model", ModelSettings), ("calib", CalibSettings), ("eval", EvalSettings), ("judge", JudgeSettings),
        ("data", DataSettings),
        ("scheme", SchemeSettings),
        ("tracker", TrackerSettings), ("launcher", LauncherSettings), ("job", JobSettings),
    )
}  # fmt: skip


def _model(asked: ModelSettings, device: str) -> ModelRef:
    model = asked.model_dump()
    if model["dtype"] == "auto":  # CPUs are exact and no slower in float32; accelerators want half precision
        model["dtype"] = "float32" if device == "cpu" else "bfloat16"
    if model["dtype"] == "fastest":
        model["dtype"] = fastest_dtype() if device == "cpu" else "bfloat16"
    return ModelRef(**model)


def calibration(asked: CalibSettings, seed: int) -> CalibrationSet:
    """The calibration set of a section."""
    return CalibrationSet(**asked.model_dump() | {"mix": tuple((asked.mix or {}).items())}, seed=seed)


def _evaluation(asked: EvalSettings, judge: JudgeSettings, library: Library) -> EvalPlan:
    plain = asked.model_dump(include={
        "ppl", "tasks", "seq_len", "max_windows", "stride", "limit", "batch_size", "task_batch_size", "against_fp", "split",
        "decode_ppl", "decode_windows", "streamed",
    })  # fmt: skip
    plan = EvalPlan(
        **plain, shots=Shots(tuple((asked.shots or {}).items()), asked.shots_split),
        talk=_talk(asked, judge), unsafe=asked.allow_code_execution,
    )  # fmt: skip
    return plan.resolved(library, skip=asked.skip_missing)


def _talk(asked: EvalSettings, judge: JudgeSettings) -> Talk | None:
    if not asked.dialogue:
        return None
    if (judge.base_url is None) != (judge.model is None):
        raise ValueError("a judge needs both judge.base_url and judge.model")
    by = Judge(judge.base_url, judge.model, judge.timeout) if judge.base_url and judge.model else None
    return Talk(asked.dialogue, asked.max_new_tokens, asked.limit, asked.plain_dialogue, by)


def build_algorithm(name: str, config: dict[str, Any]) -> Algorithm:
    """Instantiate an algorithm's config.

    Raises:
        ValueError: If a hyperparameter is unknown or refused.
    """
    try:
        return instantiate(in_full(config), _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, Unsuitable):
            raise cause from error
        kind = (
            "a hyperparameter has a value of the wrong type: "
            if "not supported between" in str(cause)
            else ""
        )
        raise ValueError(f"algo={name}: {kind}{' '.join(str(cause).split())}") from error
