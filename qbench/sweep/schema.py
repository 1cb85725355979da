"""What the keys of a config may be; nothing is built here."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt

from qbench.data.library import Library


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSettings(Strict):
    id: str
    revision: str | None = None
    dtype: Literal["auto", "fastest", "checkpoint", "float32", "bfloat16", "float16"] = "auto"
    attn: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    outliers: float | None = None
    offload: Literal["auto", "memory", "disk"] = "auto"


class CalibSettings(Strict):
    name: str
    n_samples: int
    seq_len: int
    propagate_error: bool = True
    batch_size: int = 2
    recipe: Literal["windows", "document", "pack", "truncate"] | None = None
    path: str | None = None
    mix: dict[str, float] | None = None
    experts: Literal["routed", "all"] = "routed"
    spill_above: float | None = None
    spill_folder: str | None = None


class EvalSettings(Strict):
    """What is evaluated.

    Attributes:
        shots: Solved examples before a question, by task; `shots_split` is where they come from.
        task_batch_size: `None` for as many as the GPU holds.
        skip_missing: Leave out tasks whose data are missing, rather than refuse the job.
        streamed: Keep one block at a time on the device; `None` where the model does not fit otherwise.
        device_map: Spread the model over all CUDA devices; `None` for the job's device alone.
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
    device_map: Literal["auto"] | None = None


class JudgeSettings(Strict):
    """Who marks dialogue: an endpoint that speaks OpenAI's protocol. Its key is read from the environment alone."""

    base_url: str | None = None
    model: str | None = None
    timeout: PositiveFloat = 120.0


class SchemeSettings(Strict):
    """What single layers have in place of the scheme: bits (and a group size) by pattern, `{down_proj: w8a8}`."""

    overrides: dict[str, str] | None = None


class DataSettings(Strict):
    """Where data sets are.

    Attributes:
        files: Paths that serve in place of the usual ones, by `<corpus or hub id>/<split>`.
    """

    root: Path | None = None
    files: dict[str, str] | None = None

    @property
    def library(self) -> Library:
        return Library(self.root, tuple((self.files or {}).items()))


class TrackerSettings(Strict):
    """Where records are mirrored to.

    Attributes:
        system_metrics: Record what each job uses of processor and memory, every second.
    """

    uri: str | None = None
    experiment: str = "qbench"
    system_metrics: bool = False


class JobSettings(Strict):
    """How a job is run.

    Attributes:
        timeout: Seconds after which it counts as failed; it needs a process of its own.
        attempts: How many workers may be lost on it before it counts as failed.
    """

    timeout: PositiveFloat | None = None
    attempts: PositiveInt = 2


class LauncherSettings(Strict):
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


class Plain(Strict):
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
    act_symmetric_mode: Literal["full", "restricted", "gptq"]
    kv_layout: Literal["token", "kivi", "tensor"]
    kv_group_size: PositiveInt | None
    kv_symmetric: bool
    kv_format: str
    kv_residual: NonNegativeInt | None
    kv_rotate: bool
    quant_bmm: bool
    seed: int
    device: str
    results: Path
    force: bool
    baseline: bool
    plan: bool


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
