"""`qbench recommend`: constraints in, recipe out; without records, the smallest sweep that decides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qbench.deploy.roofline import bits_of, latency
from qbench.errors import Unsuitable, UsageError
from qbench.export.run import prepared
from qbench.job import skeleton
from qbench.models.load import ModelRef
from qbench.models.shape import shape_of
from qbench.report.recommend.candidates import Latency
from qbench.report.recommend.decision import Limits
from qbench.report.recommend.export import write
from qbench.report.recommend.telling import show
from qbench.report.speed import Setting, fastest, usual_setting
from qbench.sweep.composed import config_of
from qbench.sweep.limits import MEASURED, Constraints, read
from qbench.sweep.named import named
from qbench.sweep.retype import command_of
from qbench.sweep.rounds import SURE, Outcome, Search
from qbench.sweep.sensitivity import output, say
from qbench.sweep.session import OK, SOME_FAILED
from qbench.sweep.settings import Jobs, floating_point
from qbench.track.records import Record, RecordStore

_STEP = "decode_ms"


def recommend(arguments: Sequence[str]) -> int:
    """Recommend, and say how sure that is; returns the exit code.

    Raises:
        UsageError: If a constraint or an argument cannot be understood, or nothing can be compared.
    """
    asked = read(arguments)
    names = named(asked.arguments)
    config = config_of([*names.base])
    store = RecordStore(Path(config["results"]))
    try:
        model = Jobs().job(floating_point(config)).model
        mine = [r for r in store.all() if r["identity"]["model"] == model.identity() and names.holds(r)]
        timed = _timed(asked, model.name, mine)
        clock = _latency(asked, model, timed)
    except (ValueError, NotImplementedError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if timed is not None:
        mine = [r for r in mine if fastest(r, timed, _STEP) is not None]
    search = Search(asked, config, store, clock)
    outcome = None if asked.search or search.began else search.judge(mine, names.texts)
    if outcome is None and timed is not None:
        raise UsageError(
            f"{len(mine)} recipes of {model.name} were timed on {timed}; a recommendation takes floating point and at least "
            f"one recipe beside it, each timed by itself: `qbench bench fp/{model.name}`, `qbench bench <fingerprint>`"
        )
    if outcome is None and not asked.search and asked.max_bits is None and asked.limits == Limits():
        raise UsageError(
            f"nothing is recorded of {model.name} under {store.records}, and no limit is set by which candidates could be "
            "judged; set one, such as max_ppl_increase=2%, or search=true"
        )
    if outcome is None:
        outcome = search.run()
    if outcome is None:  # only a plan was asked for
        return OK
    _tell(outcome, asked, store, model.name, timed)
    if outcome.settled.decision.share < SURE:
        n = max(text.shape[1] for text in outcome.settled.found.floating.change)
        say(output(), f"surer      the same with search=true eval.max_windows={2 * n}, and seed=0,1,2")
    return OK if outcome.settled.decision.meets else SOME_FAILED


def _tell(
    outcome: Outcome, asked: Constraints, store: RecordStore, model: str, timed: Setting | None
) -> None:
    """Show and write the outcome."""
    record = outcome.settled.decision.chosen.record
    command = command_of(record)
    console = output()
    show(outcome.settled, outcome.limits, console, hardware=_hardware(asked, timed))
    path = write(outcome.settled, outcome.limits, store.root / "tables", model, command)
    say(
        console,
        f"{'evaluate' if record['labels']['algo'] == 'fp' else 'quantize'}   {command or _its_own(record)}",
        *([f"ship       {ship}"] if (ship := _shipping(record, store)) else []),
        f"record     {store.path(record['fingerprint'])}",
        f"written    {path}",
    )


def _shipping(record: Record, store: RecordStore) -> str:
    """The command that exports a recipe, to the first format that holds it; empty where there is nothing to export."""
    if record["labels"]["algo"] == "fp":
        return ""
    where = "" if str(store.root) == "results" else f" results={store.root}"
    for to in ("compressed-tensors", "compressed-tensors dtype=bfloat16", "gguf", "hf"):
        name, _, dtype = to.partition(" dtype=")
        try:
            prepared(Jobs().job(record["config"]), name, dtype or None)
        except Unsuitable:
            continue
        except (
            ValueError,
            NotImplementedError,
            OSError,
        ):  # the model is not here, or the job is another by now
            return ""
        return f"qbench export {record['fingerprint'][:8]} --to {to}{where}"
    return ""


def _its_own(record: Record) -> str:
    return f"no short command gives this job again; it was one of `{record['environment']['command']}`"


def _hardware(asked: Constraints, timed: Setting | None) -> str:
    if timed is not None:
        return f"a step of decoding as measured on {timed}, with the fastest backend"
    if asked.hardware is None or asked.hardware == MEASURED:
        return ""
    return (
        f"a step of decoding on {asked.hardware.name}, batch {asked.batch}, {asked.context} tokens before it, "
        "by the roofline: a bound, nothing was measured"
    )


def _timed(asked: Constraints, model: str, records: Sequence[Record]) -> Setting | None:
    """Where and how recipes were timed, of measured speeds; `None` where the roofline or nothing is asked.

    Raises:
        ValueError: If nothing was timed.
    """
    if asked.hardware != MEASURED:
        return None
    if (found := usual_setting(records, asked.batch, asked.context)) is None:
        raise ValueError(
            f"no recipe of {model} was timed with {asked.batch} sequences at once; `qbench bench <fingerprint> "
            f"batch={asked.batch}` times a record's recipe, or name a device of the roofline, such as hardware=this"
        )
    return found


def _latency(asked: Constraints, model: ModelRef, timed: Setting | None) -> Latency | None:
    if timed is not None:
        return lambda record: (fastest(record, timed, _STEP) or 0.0) / 1e3
    if asked.hardware is None or asked.hardware == MEASURED:
        return None
    shape, hardware = shape_of(skeleton(model).config, model.trust_remote_code), asked.hardware

    def seconds(record: dict[str, Any]) -> float:
        bits = bits_of(record)
        return latency(shape, bits, hardware, asked.batch, asked.context, "decode", fused=True).seconds

    return seconds
