"""`qbench data`: which data sets there are, what the jobs of a command need, and bringing it here."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.initialize import initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qbench.data.corpora import CORPORA, Use
from qbench.data.library import Library
from qbench.data.provision import MANIFEST, Manifest, Piece, Weights, size, wrong
from qbench.errors import Unsuitable, UsageError
from qbench.evaluate.plan import EvalPlan
from qbench.evaluate.stock import Shots
from qbench.evaluate.talk import Talk
from qbench.job import Job
from qbench.sweep.grid import Grid, unite
from qbench.sweep.progress import complain
from qbench.sweep.schema import DataSettings
from qbench.sweep.settings import Jobs
from qbench.sweep.shipped import CONF
from qbench.sweep.study import MULTIRUN, parts
from qbench.zoo import stdlib

OK, BAD_INPUT, SOME_LACKING = 0, 2, 3
_MADE = "made from this Python's standard library"


def command(arguments: list[str]) -> int:
    """Do what `qbench data <verb> [key=value …]` asks for, and return the exit code.

    Raises:
        UsageError: If it cannot be understood, or lacks what it needs.
    """
    verbs: dict[str, Callable[[Grid], int]] = {"list": show, "fetch": fetch, "verify": verify}
    if (verb := arguments[0] if arguments else "nothing") not in verbs:
        raise UsageError(f"`qbench data` is followed by {', '.join(verbs)}; got {verb}")
    # What may be left out of a job is fetched too: a plan that leaves out would ask the hub for each task now.
    own = [a for a in arguments[1:] if not a.startswith("eval.skip_missing=")]
    return verbs[verb](_grid([*own, "eval.skip_missing=false"]))


def _grid(arguments: list[str]) -> Grid:
    """The cells that the arguments of a run or a sweep ask for."""
    if unknown := [a for a in arguments if a.startswith("-") and a not in MULTIRUN]:
        raise UsageError(f"`qbench data` knows no option {unknown[0]}; it takes -m and key=value")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
        grid = unite(parts(arguments), loader, master)
    if len(grid) > 1 and not MULTIRUN & set(arguments):
        several = next(values for values in _axes(grid) if len(values) > 1)
        raise UsageError(f"{several[0].partition('=')[0]} has {len(several)} values; write -m for a grid")
    return grid


def _axes(grid: Grid) -> list[list[str]]:
    return [axis for product in grid.products for axis in product.axes]


def _library(grid: Grid) -> Library:
    """Where the first cell looks for data sets."""
    if (cell := next(iter(grid))).config is None:
        raise UsageError(str(cell.problem))
    return DataSettings(**cell.config["data"]).library


def _root(grid: Grid) -> Path:
    if (root := _library(grid).root) is None:
        raise UsageError("data.root is not set; give the folder that data are kept in: data.root=<folder>")
    if any(len(values) > 1 and values[0].startswith("data.root=") for values in _axes(grid)):
        raise UsageError("data.root is one for a whole fetch; give it a single value")
    return root


def fetch(grid: Grid) -> int:
    """Bring what the cells need into `data.root` and into the hub's cache.

    Raises:
        UsageError: If `data.root` is not set, differs between cells, or cannot be written.
    """
    manifest, problems = Manifest.of(root := _root(grid)), list[str]()
    needed = needs(_jobs(grid, problems))
    for problem in dict.fromkeys(problems):
        complain(problem)
    if problems and not needed:
        return BAD_INPUT
    try:
        manifest.save()
    except OSError as error:
        raise UsageError(f"data.root={root} cannot be written ({error.strerror})") from error
    total, failed = len(needed), 0
    for number, (what, library) in enumerate(needed.items(), 1):
        try:
            complain(f"{number} of {total}: {what}: {what.fetch(library, manifest)}")
        except (OSError, ValueError, NotImplementedError) as error:
            failed += 1
            complain(f"{number} of {total}: {what} could not be had: {' '.join(str(error).split())}")
    complain(f"{total - failed} of {total} are there; {root / MANIFEST} says what was fetched")
    return SOME_LACKING if failed else BAD_INPUT if problems else OK


def _jobs(grid: Grid, problems: list[str]) -> Iterator[Job]:
    """The jobs of the cells; what is wrong with others goes to `problems`. Exclusions of a study are not looked at."""
    jobs = Jobs()
    for cell in grid:
        try:
            if cell.config is None:
                raise ValueError(cell.problem)
            yield jobs.job(cell.config)
        except (ValueError, NotImplementedError, OSError) as error:
            if len(grid) == 1 or not isinstance(error, Unsuitable):
                problems.append(" ".join(str(error).split()))


def needs(jobs: Iterable[Job]) -> dict[Piece | Weights, Library]:
    """What jobs read that is neither embedded nor the user's own, each with where to look for it; models last."""
    found: dict[Piece | Weights, Library] = {}
    parts = dict.fromkeys((job.model, job.calib, job.evaluation, job.library) for job in jobs)
    for model, calib, plan, library in parts:
        here: dict[Piece | Weights, Library] = {Piece(*about): library for about in plan.needed()}
        texts = [name for name, _ in calib.mix] or [calib.name] if calib else []
        here |= {_text(name, "calibration"): library for name in texts if name in CORPORA}
        found = here | found
        if model.folder is None:
            found[Weights(model.id, model.revision, model.trust_remote_code)] = library
    return found


def _text(name: str, use: Use) -> Piece:
    return Piece(CORPORA[name].source, CORPORA[name].splits[use], name)


def verify(grid: Grid) -> int:
    """Read everything that was fetched again, and say what is missing or not as it was."""
    if not (path := _root(grid) / MANIFEST).is_file():
        raise UsageError(f"{path} does not exist; run `qbench data fetch data.root={path.parent} …` first")
    manifest = Manifest.of(path.parent)
    if found := wrong(manifest):
        for line in (*found, "delete what has changed, and run `qbench data fetch` again"):
            complain(line)
        return SOME_LACKING
    if not (manifest.data or manifest.models):
        raise UsageError(
            f"{path} lists nothing: nothing could be had when it was fetched; run `qbench data fetch` again"
        )
    sizes = [about["bytes"] for _, about in manifest.files()]
    print(f"{len(sizes)} files of {size(sum(sizes))} are as they were fetched")
    return OK


def show(grid: Grid) -> int:
    """Print every data set that is known by name, and where this machine has it; no hub is asked."""
    library, console = _library(grid), Console()
    console = console if console.is_terminal else Console(width=200)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("name", "data set", "split", "serves", "found"):
        table.add_column(column, overflow="fold")
    for row in known(library):
        table.add_row(*map(escape, row))
    console.print(table)
    return OK


def known(library: Library) -> Iterator[tuple[str, str, str, str, str]]:
    """Of every data set: name, hub id and configuration, split, what it serves, and where it is."""
    for name, use in ((name, use) for name in stdlib.NAMES for use in ("calibration", "perplexity")):
        yield name, "embedded", "", use, _MADE
    for name, corpus in CORPORA.items():
        for use in corpus.splits:
            yield _row(name, "perplexity" if use == "test" else use, [_text(name, use)], library)
    for path in sorted((CONF / "eval").glob("*.yaml")):
        family: Any = OmegaConf.to_container(OmegaConf.load(path))
        shots = Shots(tuple((family.get("shots") or {}).items()))
        plans = [(name, EvalPlan(tasks=(name,), shots=shots)) for name in family.get("tasks") or ()]
        plans += [(name, EvalPlan(talk=Talk((name,)))) for name in family.get("dialogue") or ()]
        for name, plan in plans:
            serves = f"{'dialogue' if plan.talk else 'task'} of eval={path.stem}"
            pieces = [Piece(*about) for about in plan.needed()]
            yield _row(name, serves, pieces, library) if pieces else (name, "embedded", "", serves, _MADE)


def _row(name: str, serves: str, pieces: list[Piece], library: Library) -> tuple[str, str, str, str, str]:
    sources = list(dict.fromkeys(piece.source for piece in pieces))
    shown = str(sources[0]) + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
    splits = ", ".join(dict.fromkeys(piece.split for piece in pieces))
    found = list(dict.fromkeys(_place(piece, library) for piece in pieces))
    found.sort(key=lambda place: not place.startswith("missing"))
    return name, shown, splits, serves, found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def _place(piece: Piece, library: Library) -> str:
    try:
        place = library.on_machine(piece.source, piece.split, piece.name)
    except FileNotFoundError as error:  # data.files names what is not there
        return f"missing: {error}"
    expected = library.expected(piece.source, piece.split).replace(f"{library.root}/", "")
    return place or f"missing: {expected}".rstrip(": ")
