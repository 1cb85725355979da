"""`qbench compare`: two runs or recipes side by side."""

import shlex

from qbench.errors import UsageError

_SETTINGS = ("results", "from", "flips", "tracker")


def compare(arguments: list[str]) -> int:
    """`qbench compare <A> <B> [flips=true] [results=…] [from=<tracking uri>]`: two recipes side by side.

    A and B are each one of:
      4f1c2a                            the beginning of a fingerprint, four digits or more: one job
      gptq/w3a16g128/c4                 labels in any order: model, algo, scheme, calib, seed0; those that it takes to
                                        mean one recipe. Jobs that differ in the seed alone are draws of one recipe
      algo=gptq,calib=c4,n_samples=16   the same as key=value; a key is a label, or one of the config
      gptq/c4,n_samples=16              both

    Shows metrics with the paired difference of B against A, its interval and whether it is sure; costs; settings that
    differ; answers that became wrong or right; the windows of text that differ most; and errors by block. All of it is
    also written, under results/tables, as CSV, Markdown, LaTeX and HTML. With flips=true, so is a list of the documents
    whose answers changed.
    """
    # The other commands import this one.
    from qbench.cli.reports import _asked, console

    options = [a for a in arguments if a.startswith("-") or a.partition("=")[0].split(".")[0] in _SETTINGS]
    words = [a for a in arguments if a not in options]
    asked = _asked([a for a in options if "=" in a or a.startswith("-")], ("flips",))
    if len(words) != 2:
        raise UsageError(
            f"two recipes are compared, found {', '.join(words) or 'none'}; write e.g. "
            "`qbench compare rtn/w4a16g128 gptq/w4a16g128`"
        )
    if (listed := asked.views.get("flips", "false")) not in ("true", "false"):
        raise UsageError(f"flips={listed} is neither true nor false")
    from qbench.report.side_by_side import compare as side_by_side
    from qbench.report.side_by_side import save, show
    from qbench.report.sides import find

    records, out, folder = asked.records(), console(), asked.results / "tables"
    try:
        a, b = (find(word, records, asked.source) for word in words)
        comparison = side_by_side(a, b, asked.source)
    except ValueError as error:
        raise UsageError(str(error)) from error
    show(comparison, out)
    paths = save(comparison, folder, listed == "true")
    lines = [f"{len(paths)} files {folder / comparison.name}* (CSV, Markdown, LaTeX, HTML)"]
    tasks = comparison.tables.get("tasks")
    if tasks and listed == "false":
        lines.append(f"changed documents   {shlex.join(['qbench', 'compare', *arguments, 'flips=true'])}")
    else:
        kept = [a for a in options if not a.startswith("flips=")]
        lines.append(f"all recipes   {shlex.join(['qbench', 'tables', *kept])}")
    out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return 0
