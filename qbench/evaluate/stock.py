"""lm-eval's tasks by name, and ours, with their data from the library.

lm-eval's index of all its tasks takes ten seconds to build. Here the files that mention a name are found by their
text, in one, and only their folders are indexed.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qbench.data.library import Library
from qbench.data.sources import Source

REVISION = 1  # of our tasks, raised when a change of one changes numbers; part of a job's identity

_OWN = Path(__file__).parent / "tasks"
_NAMED = re.compile(
    r"""^["']?(task|group|tag)["']?:[ \t]*(?:\[([^\]]*)\]|([^\s#\[][^#\n]*)|\n((?:[ \t]*-[^\n]*\n?)+))""",
    re.MULTILINE,
)
_INCLUDED = re.compile(
    r"""^include:[ \t]*(?:\[([^\]]*)\]|([^\s#\[][^#\n]*)|\n((?:[ \t]*-[^\n]*\n?)+))""", re.MULTILINE
)
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Leaf:
    """One task of lm-eval.

    Attributes:
        part: Which part of the task that was asked for it is; empty where it is that task.
        overrides: What a group sets for it.
    """

    name: str
    part: str
    config: Mapping[str, Any]
    overrides: Mapping[str, Any]

    def setting(self, key: str) -> Any:
        return self.overrides.get(key, self.config.get(key))

    @property
    def source(self) -> Source | None:
        """Its data set; `None` where it makes its own."""
        path = self.setting("dataset_path")
        if path is None or self.setting("custom_dataset") is not None:
            return None
        return Source(path, self.setting("dataset_name"))

    @property
    def tested(self) -> str:
        """The split whose documents are asked."""
        found = (
            self.setting("test_split") or self.setting("validation_split") or self.setting("training_split")
        )
        assert found, f"task {self.name} has no split"
        return str(found)


@dataclass(frozen=True)
class Shots:
    """How many solved examples stand before a question, and where they come from.

    Attributes:
        by_task: For tasks by name (of a group, for all its parts); what is not named is as the task says.
        split: The split they are drawn from, in place of the task's.
    """

    by_task: tuple[tuple[str, int], ...] = ()
    split: str | None = None

    def of(self, name: str, leaf: Leaf) -> int:
        return int(dict(self.by_task).get(name, leaf.setting("num_fewshot") or 0))

    def source_split(self, leaf: Leaf) -> str | None:
        """The split that examples come from; `None` where the task brings its own."""
        config = leaf.setting("fewshot_config") or {}
        if self.split is None and config.get("samples") is not None:
            return None
        names = ("fewshot_split", "training_split", "validation_split", "test_split")
        return self.split or config.get("split") or next(filter(None, map(leaf.setting, names)), None)


@cache
def versions() -> dict[str, Any]:
    """What tasks are but for their names."""
    return {"lm_eval": version("lm_eval"), "ours": REVISION}


def check_names(names: tuple[str, ...]) -> None:
    """Refuse a task that neither qbench nor lm-eval has.

    Raises:
        ValueError: Naming the nearest tasks.
    """
    for name in names:
        if name not in _places():
            near = difflib.get_close_matches(name, list(_places()), n=3)
            raise ValueError(
                f"unknown task {name!r}; "
                + (f"nearest are {', '.join(near)}" if near else "see `lm_eval ls tasks`")
            )


def missing(name: str, library: Library, shots: Shots) -> str:
    """Which data of a task cannot be found, in words; empty where all is there."""
    reasons = []
    for leaf in leaves(name):
        if leaf.source is None:
            continue
        for split in needed(name, leaf, shots):
            try:
                library.rows(leaf.source, split)
            except FileNotFoundError as error:
                why = (
                    "" if split == leaf.tested else "for the solved examples before a question (eval.shots), "
                )
                reasons.append(why + str(error))
    more = f" (and {len(reasons) - 1} more of its parts)" if len(reasons) > 1 else ""
    return reasons[0] + more if reasons else ""


def needed(name: str, leaf: Leaf, shots: Shots) -> list[str]:
    """The splits that are read: of the questions, and of the examples where there are such."""
    split = shots.source_split(leaf) if shots.of(name, leaf) else None
    return list(dict.fromkeys([leaf.tested, *([split] if split else [])]))


@cache
def build(name: str, library: Library, shots: Shots) -> dict[str, tuple[str, Any]]:
    """The task objects behind a name, by their own names, each with the part it is; building them reads the data.

    Raises:
        FileNotFoundError: If data are missing.
    """
    found = leaves(name)
    members = []
    for leaf in found:
        member: dict[str, Any] = {"task": leaf.name, **leaf.overrides, "num_fewshot": shots.of(name, leaf)}
        if leaf.source is not None:
            splits = needed(name, leaf, shots)
            data = {split: library.rows(leaf.source, split).data for split in splits}
            member["custom_dataset"] = _Handed(data)
            # lm-eval draws examples from the first of its splits that a task names: it may name what it was given.
            member |= {key: None for key in _SPLITS if leaf.setting(key) not in (None, *splits)}
            if shots.of(name, leaf):
                source = shots.source_split(leaf)
                if shots.split is not None:
                    member["fewshot_split"] = source
                if source == leaf.tested:  # only then, and of a test split, does it leave the question out
                    member |= {"fewshot_split": source, "test_split": source, "validation_split": None}
        members.append(member)
    group = {"group": "qbench", "task": members}
    tasks = _manager(_folders(name)).load([group])["tasks"]
    return {leaf.name: (leaf.part, tasks[leaf.name]) for leaf in found}


@dataclass(frozen=True)
class _Handed:
    """What lm-eval calls for a task's data. Every copy is the same: deep copies of tables take memory and time."""

    data: Mapping[str, Any]

    def __call__(self, **_: Any) -> Mapping[str, Any]:
        return self.data

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Handed":
        return self


@cache
def leaves(name: str) -> tuple[Leaf, ...]:
    """The tasks behind the name of a task, group or tag."""
    index = _manager(_folders(name)).task_index
    if index[name].kind.name == "TASK":
        return (Leaf(name, "", index[name].cfg, {}),)
    found = [
        Leaf(leaf, _part(leaf, name), index[leaf].cfg, overrides)
        for leaf, overrides in _members(index, name, {})
    ]
    return tuple({leaf.name: leaf for leaf in found}.values())


def is_weighted(name: str) -> bool:
    """Whether a group's mean is over documents; otherwise it is over its tasks."""
    entry = _manager(_folders(name)).task_index[name]
    listed = (entry.cfg or {}).get("aggregate_metric_list") or []
    listed = listed if isinstance(listed, list) else [listed]
    return all(metric.get("weight_by_size", True) for metric in listed)


def is_tag(name: str) -> bool:
    """Whether a name only lists tasks, which have no mean together."""
    entry = _manager(_folders(name)).task_index[name]
    return entry.kind.name == "TAG" or (
        entry.kind.name == "GROUP" and not (entry.cfg or {}).get("aggregate_metric_list")
    )


def _members(
    index: Mapping[str, Any], name: str, overrides: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    entry = index[name]
    if entry.kind.name == "TAG":
        yield from ((task, overrides) for task in sorted(entry.tags))
    elif entry.kind.name == "GROUP":
        config = entry.cfg
        if _for_tasks(config):  # the index has functions as their names
            from lm_eval.tasks._yaml_loader import load_yaml

            config = load_yaml(entry.yaml_path)
        yield from _listed(index, config, overrides)
    else:
        yield name, overrides


def _listed(
    index: Mapping[str, Any], group: Mapping[str, Any], overrides: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The members of a group; what it sets for them yields to what is set outside, and a member's own does not."""
    overrides = _for_tasks(group) | overrides
    for member in group["task"]:
        entry = {"task": member} if isinstance(member, str) else member
        inner = str(entry.get("group") or entry.get("task") or "")
        if inner in index:
            yield from _members(index, inner, overrides | _for_tasks(entry))
        elif "group" in entry:
            yield from _listed(index, entry, overrides)
        else:
            raise NotImplementedError(
                f"group {group['group']!r} holds a task {inner!r} that is defined nowhere else, "
                "which is not covered; name other tasks of it one by one"
            )


def _for_tasks(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group, or the mention of a member in one, sets for the tasks in it."""
    from lm_eval.config.group import GroupConfig

    own = {"tag", *(field.name for field in fields(GroupConfig))}
    return {key: value for key, value in group.items() if key not in own}


def _part(leaf: str, name: str) -> str:
    return leaf.removeprefix(name).lstrip("_-") or leaf


@cache
def _manager(folders: tuple[Path, ...]) -> Any:
    """lm-eval's manager of what these folders hold, the first that has a name before others.

    Given several folders itself, it would forget a tag's tasks in all but the last.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    index = manager.task_index
    for folder in folders:
        for name, entry in _index(folder).items():
            known = index.get(name, entry)
            index[name] = replace(known, tags=known.tags | entry.tags)
    return manager


@cache
def _index(folder: Path) -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False, include_path=str(folder)).task_index


@cache
def _folders(name: str) -> tuple[Path, ...]:
    """The folders of the tasks behind a name; ours hide lm-eval's of the same name."""
    folders, left, seen = list[Path](), [name], {name}
    while left:
        for folder in _places()[(asked := left.pop())]:
            if folder not in folders:
                folders.append(folder)
            entry = _index(folder).get(asked)
            for inner in _mentioned(entry.cfg) if entry and entry.kind.name == "GROUP" else ():
                if inner not in seen and inner in _places():
                    seen.add(inner)
                    left.append(inner)
    return tuple(folders)


def _mentioned(group: Mapping[str, Any]) -> Iterator[str]:
    for member in group["task"]:
        entry = {"task": member} if isinstance(member, str) else member
        yield from (entry[key] for key in ("group", "task") if isinstance(entry.get(key), str))
        if isinstance(entry.get("task"), list):
            yield from _mentioned(entry)


@cache
def _places() -> dict[str, tuple[Path, ...]]:
    """By the name of a task, group or tag: the folders that mention it."""
    import lm_eval.tasks

    found: dict[str, dict[Path, None]] = {}
    for root in (_OWN, Path(lm_eval.tasks.__file__).parent):
        ours = set(found)
        for path in sorted(root.rglob("*.yaml")):
            for _, name in _names(path):
                if name not in ours:
                    found.setdefault(name, {})[path.parent] = None
    return {name: tuple(places) for name, places in found.items()}


def _names(path: Path) -> list[tuple[str, str]]:
    """What a file names, each with its kind: itself, and tags, which may stand in a file that it includes."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = []
    for kind, *words in _NAMED.findall(text):
        if kind != "task" or words[1]:  # else the members of a group
            found += [(kind, name) for name in _words(*words)]
    if all(kind != "tag" for kind, _ in found):
        for words in _INCLUDED.findall(text):
            for included in _words(*words):
                found += _tags((path.parent / included).resolve())
    return found


@cache
def _tags(path: Path) -> tuple[tuple[str, str], ...]:
    return tuple((kind, name) for kind, name in _names(path) if kind == "tag") if path.is_file() else ()


def _words(listed: str, single: str, lines: str) -> list[str]:
    """The items of a YAML list in brackets, one word, or a list in lines."""
    words = listed.split(",") if listed else [single] if single else re.findall(r"-\s*(\S+)", lines)
    return [word.strip().strip("\"'") for word in words]
