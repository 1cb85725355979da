"""Long-context rows that hold their text; here each gets its answer and its part, as "75 keys, 0.5".

A position is the quarter of the text in which the answer stands, by its beginning: 0, 0.25, 0.5 or 0.75.
"""

import json
from typing import Any

from datasets import Dataset

Row = dict[str, Any]


def longeval_lines(rows: Dataset) -> Dataset:
    """`{"prompt", "target", "part"}`."""
    return Dataset.from_list([_longeval_lines(row) for row in rows])


def _longeval_lines(row: Row) -> Row:
    lines = [line for line in row["prompt"].split("\n") if line.startswith("line ")]
    asked = lines.index(row["correct_line"].strip())
    part = f"{len(lines)} lines, {_quarter(asked, len(lines))}"
    return {"prompt": row["prompt"], "target": str(row["expected_number"]), "part": part}


def longeval_topics(rows: Dataset) -> Dataset:
    """`{"prompt", "answers", "part"}`; always the first topic is asked for."""
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "answers": row["topics"][:1],
                "part": f"{len(row['topics'])} topics, 0",
            }
            for row in rows
        ]
    )


def key_values(rows: Dataset) -> Dataset:
    """`{"records", "key", "answers", "part"}`; the records are a JSON object, a pair on a line."""
    return Dataset.from_list([_key_values(row) for row in rows])


def _key_values(row: Row) -> Row:
    pairs = row["ordered_kv_records"]
    asked = [key for key, _ in pairs].index(row["key"])
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs)
    return {
        "records": "{" + ",\n ".join(lines) + "}",
        "key": row["key"],
        "answers": [row["value"]],
        "part": f"{len(pairs)} keys, {_quarter(asked, len(pairs))}",
    }


def passkey(rows: Dataset) -> Dataset:
    """`{"input", "target", "part"}`; the length is in characters."""
    # `passkey_position` counts something else than characters, so the key is looked up.
    return Dataset.from_list(
        [
            {
                "input": row["input"],
                "target": row["target"],
                "part": f"{len(row['input'])} chars, "
                f"{_quarter(row['input'].index(row['target']), len(row['input']))}",
            }
            for row in rows
        ]
    )


def needles(rows: Dataset) -> Dataset:
    """`{"input", "answers", "part"}`; the length is RULER's nominal one, a power of two of tokens."""
    return Dataset.from_list([_needles(row) for row in rows])


def _needles(row: Row) -> Row:
    nominal = 1 << (row["length"] - 1).bit_length()
    position = _quarter(row["input"].index(row["outputs"][0]), len(row["input"]))
    return {"input": row["input"], "answers": row["outputs"], "part": f"{nominal} tokens, {position}"}


def _quarter(index: int, n: int) -> str:
    return f"{4 * index // n / 4:g}"
