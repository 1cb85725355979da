"""`qbench`: read a command, and hand it to the planner or to a sub-command.

Nothing heavy is imported here, so that `--help`, `--cfg job` and completion answer at once.
"""

import difflib
import inspect
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from qbench.cli import reports, roofline
from qbench.cli.bench import bench
from qbench.cli.export import export
from qbench.cli.models import models
from qbench.errors import UsageError
from qbench.sweep.composed import config_of

BAD_INPUT = 2

_QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_CONFIGURE_LOGGING": "0",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def main() -> None:
    """Entry point; exits with 0 (done), 2 (bad input), 3 (a job failed) or 130 (interrupted)."""
    arguments = sys.argv[1:]
    verbose = bool({"-v", "--verbose"} & set(arguments))
    arguments = [a for a in arguments if a not in ("-v", "--verbose")]
    sys.argv[1:] = arguments
    os.environ["QBENCH_COMMAND"] = shlex.join(["qbench", *arguments])  # for records; argv is about to change
    _silence(verbose)
    try:
        if arguments and arguments[0] in COMMANDS and {"--help", "-h"} & set(arguments[1:]):
            print(inspect.getdoc(COMMANDS[arguments[0]]))
            sys.exit(0)
        if arguments and arguments[0] in COMMANDS:
            sys.exit(COMMANDS[arguments[0]](arguments[1:]))
        if arguments and re.fullmatch(r"[a-z_]+", arguments[0]):
            near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"unknown command {arguments[0]!r}; {hint}there are {', '.join(sorted(COMMANDS))}"
            )
        sys.exit(_run())
    except KeyboardInterrupt:
        sys.exit(130)
    except UsageError as error:
        print(f"qbench: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _silence(verbose: bool) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
        return
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.ERROR)


def _run() -> int:
    """`qbench key=value …` and `qbench -m …`, through Hydra."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from qbench.sweep.explain import explain
    from qbench.sweep.grid import Cell, cell_of, held_back
    from qbench.sweep.shipped import CONF
    from qbench.sweep.steps import choose_custom
    from qbench.sweep.study import MULTIRUN, parts

    asked = parts(sys.argv[1:])  # a study that there is not is said before Hydra begins
    if MULTIRUN & set(sys.argv):
        sys.argv[1:] = held_back(sys.argv[1:])
    else:
        sys.argv[1:] = choose_custom(asked[0].arguments)
    # Hydra would print its own report and exit with 1; raise instead, and say it in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    cells: list[Cell] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def compose(config: DictConfig) -> None:
        cells.append(cell_of("", config, HydraConfig.get().runtime.choices["algo"]))

    try:
        compose()
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error)) from error
    if not cells:  # --help, --cfg and the like
        return 0
    from qbench.sweep.session import run_cells

    return run_cells(cells, is_sweep=False)


def _sync(arguments: list[str]) -> int:
    """`qbench sync [results=…] [tracker.uri=…]`: mirror records that MLflow does not hold yet."""
    config = config_of(arguments)
    from qbench.sweep.mirroring import sync
    from qbench.sweep.schema import TrackerSettings

    tracker = TrackerSettings(**config["tracker"])
    print(f"{sync(Path(config['results']), tracker)} records mirrored to {tracker.uri}")
    return 0


def _status(arguments: list[str]) -> int:
    """`qbench status [results=…]`: the sweeps of a results folder, and what their workers do; from anywhere."""
    results = Path(config_of(arguments)["results"])
    from qbench.sweep.status import print_status

    print_status(results)
    return 0


def _retry(arguments: list[str]) -> int:
    """`qbench retry [results=…] [smaller_batches=true] [launcher=…]`: run failed jobs again."""
    smaller = "smaller_batches=true" in arguments
    config = config_of([a for a in arguments if not a.startswith("smaller_batches=")])
    from qbench.sweep.retry import retry

    return retry(config, smaller_batches=smaller)


def _sensitivity(arguments: list[str]) -> int:
    """`qbench sensitivity [stats | solve budget=…] [mode=…] [by=…] [bits=…] [key=value …]`: bits where they count."""
    from qbench.sweep.request import read
    from qbench.sweep.steps import choose_custom

    request = read(arguments)
    config = config_of(choose_custom([*request.arguments]))
    if request.verb == "stats":
        from qbench.sweep.sensitivity import statistics

        return statistics(config)
    from qbench.sweep.measurements import Measurements
    from qbench.sweep.sensitivity import measure
    from qbench.sweep.solve import solve

    found = Measurements.of(config_of(choose_custom(request.measured)), request)
    return solve(found, config) if request.verb == "solve" else measure(found)


def _data(arguments: list[str]) -> int:
    """`qbench data list | fetch | verify [-m] [data.root=…] [key=value …]`: data and models for machines without a hub."""
    from qbench.sweep.provision import command

    return command(arguments)


def _recommend(arguments: list[str]) -> int:
    """`qbench recommend model=… [max_bytes=3GB | max_bits=4.5] [max_ppl_increase=2%] [max_latency=8ms hardware=h100 batch=1
    context=2048] [prefer=quality | size | speed] [algo=…] [scheme=…] [search=true]`: the recipe that meets the limits.

    Chosen among the recipes that are recorded for the model, with how sure the choice is, the runner-up, why the others
    lost, and the command that quantizes with it. Without records, or with `search=true`, candidates are run first: the
    study `recommend`, or those of `algo=` and `scheme=`, in rounds on more and more windows. Exit code 3: nothing meets
    the limits; the nearest is shown, and the limit that stands in the way.
    """
    from qbench.sweep.recommend import recommend

    return recommend(arguments)


def _worker(arguments: list[str]) -> int:
    """`qbench worker [results=…]`: help with the sweep that runs there, until nothing is left of it."""
    keys = {"results": "results", "launch": "", "name": "", "start": "0", "parent": ""}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in keys:
            raise UsageError(f"`qbench worker` takes results=, launch=, name= and start=; got {argument!r}")
        keys[key] = value
    from qbench.sweep.worker import serve

    parent = int(keys["parent"]) if keys["parent"] else None
    return serve(
        Path(keys["results"]), keys["launch"] or None, keys["name"] or None, float(keys["start"]), parent
    )


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    **reports.COMMANDS, **roofline.COMMANDS, "sync": _sync, "status": _status, "retry": _retry, "sensitivity": _sensitivity,
    "worker": _worker, "data": _data, "recommend": _recommend, "models": models, "bench": bench, "export": export,
}  # fmt: skip
