"""Data sets by their hub id: which files of a plain folder hold them too.

A folder given as `data.root` may hold data sets in the hub's layout (`<root>/<hub id>/...`) or plainly, as one file
per split (`<root>/piqa/validation.jsonl`). Rows have the hub's field names in both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".arrow")


@dataclass(frozen=True)
class Source:
    """One configuration of a data set.

    Attributes:
        hub_id: On the hub; without a slash where the data set is not there and can only be given as files.
        config: Its configuration, `None` for the only one.
        revision: Commit, tag or branch on the hub; `None` for what is newest there.
        hub_files: By split: files to read of it, where reading all would be far too much.
    """

    hub_id: str
    config: str | None = None
    revision: str | None = None
    hub_files: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.hub_id + (f" ({self.config})" if self.config else "")

    @property
    def on_hub(self) -> bool:
        return "/" in self.hub_id

    def hub_file(self, split: str) -> str | None:
        return dict(self.hub_files).get(split)

    def patterns(self, split: str) -> list[str]:
        """Where a plain folder may hold a split: paths below it without a suffix, `*` for any text."""
        plain = _PLAIN.get(self.hub_id, Plain(self.hub_id.rpartition("/")[2] + "/{split}"))
        name = plain.names.get(self.config or "", self.config or "default")
        path = plain.path.format(config=name.replace("/", "_"), split=plain.splits.get(split, split))
        folder, _, stem = path.rpartition("/")
        file = self.hub_file(split)
        here = [f"{self.hub_id}/{file}"] if file else []
        here.append(f"{self.hub_id}/{self.config or 'default'}/{split}")
        if plain.only not in (None, split):
            return here
        return [
            *here,
            path,
            *([f"{folder}/{self.config}_{stem}"] if self.config and "{config}" not in plain.path else []),
        ]

    def keeps(self, row: Mapping[str, Any], split: str) -> bool:
        """Whether a row of a plain file that holds several configurations belongs to this one."""
        plain = _PLAIN.get(self.hub_id)
        if plain is None:
            return True
        if plain.by and self.config not in (None, "all") and row[plain.by] != self.config:
            return False
        if plain.ids is None:
            return True
        first, last = plain.ids[split]
        return first <= row["task_id"] <= last


@dataclass(frozen=True)
class Plain:
    """How a plain folder names the files of a data set.

    Attributes:
        path: Below the folder, without suffix; `{config}` and `{split}` stand for their names.
        names: Of configurations, and
        splits: of splits, where files call them otherwise.
        by: The field that tells configurations apart where one file holds them all.
        ids: By split: first and last `task_id`, where one file holds all splits.
        only: The one split that the files hold, where their names do not say.
    """

    path: str
    names: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    by: str | None = None
    ids: Mapping[str, tuple[int, int]] | None = None
    only: str | None = None


_PLAIN = {
    "AI-Secure/adv_glue": Plain(
        "advglue/{config}_{split}",
        {f"adv_{name}": name for name in ("sst2", "qqp", "mnli", "qnli", "rte")}
        | {"adv_mnli_mismatched": "mnli_mm"},
        {"validation": "dev"},
    ),
    "EdinburghNLP/xsum": Plain("xsum/*", only="test"),
    "EleutherAI/hendrycks_ethics": Plain("ethics/{config}_{split}"),
    "HuggingFaceH4/mt_bench_prompts": Plain("mt_bench/question", only="train"),
    "SaylorTwift/bbh": Plain("bbh/*", by="task", only="test"),
    "Salesforce/wikitext": Plain("wikitext2/{config}_{split}"),
    "abisee/cnn_dailymail": Plain("cnn_dailymail/{split}"),
    "allenai/ai2_arc": Plain("{config}/{split}", {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"}),
    "aps/super_glue": Plain("{config}/{split}"),
    "boss": Plain("boss/{config}_{split}"),
    "cais/mmlu": Plain("mmlu/{split}*", by="subject"),
    "ceval/ceval-exam": Plain("ceval/{split}", by="subject"),
    "clue/clue": Plain("{config}/{split}"),
    "google-research-datasets/mbpp": Plain(
        "mbpp/*",
        ids={"test": (11, 510), "prompt": (1, 10), "validation": (511, 600), "train": (601, 974)},
    ),
    "haonan-li/cmmlu": Plain("cmmlu/{split}", by="subject"),
    "jannalu/crows_pairs_multilingual": Plain("crows_pairs/{config}_{split}"),
    "lighteval/siqa": Plain("social_iqa/{split}"),
    "longeval": Plain("longctx/longeval_{config}_*", only="test"),
    "lost_in_the_middle": Plain("longctx/litm_{config}_*", {"qa": "nq"}, only="test"),
    "mit-han-lab/pile-val-backup": Plain("pileval/{split}"),
    "mt_bench_references": Plain("mt_bench/reference_answer*", only="train"),
    "nyu-mll/glue": Plain("{config}/{split}"),
    "openai/openai_humaneval": Plain("humaneval/{split}"),
    "oskarvanderwal/bbq": Plain("bbq/{split}"),
    "passkey": Plain("longctx/*passkey*", only="test"),
    "ptb-text-only/ptb_text_only": Plain("ptb/{split}"),
    "ruler": Plain("longctx/ruler_niah_*", only="test"),
    "skg/toxigen-data": Plain("toxigen/{split}"),
    "tasksource/bigbench": Plain("{config}/*", only="train"),
    "tatsu-lab/alpaca": Plain("alpaca/{split}"),
    "truthfulqa/truthful_qa": Plain("truthfulqa/{config}_{split}"),
    "vicuna_bench": Plain("vicuna_bench/question", only="train"),
    "HuggingFaceH4/ultrachat_200k": Plain("ultrachat/{split}"),
}
