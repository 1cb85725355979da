"""HumanEval and MBPP: from a row to a prompt, and from a completion to a program that tests it.

lm-eval's own module for these tasks downloads a metric when imported and runs code in this process.
"""

from collections.abc import Iterable
from typing import Any

from qbench.evaluate import sandbox

Row = dict[str, Any]

_FENCE = "```"


def humaneval_program(row: Row, completion: str) -> str:
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})\n"


def humaneval_result(row: Row, results: list[str]) -> dict[str, int]:
    return _pass_at_1(humaneval_program(row, results[0]))


def mbpp_examples(rows: Iterable[Row]) -> list[Row]:
    """The rows that the paper's prompt shows, in its order."""
    return [row for row in rows if row["task_id"] in (2, 3, 4)]


def mbpp_prompt(row: Row) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"Task: {row['text'].strip()}\n"
        f"The Python code must pass these tests:\n{_FENCE}python\n{tests}\n{_FENCE}\n"
        f"Code:\n{_FENCE}python\n"
    )


def mbpp_solution(row: Row) -> str:
    # The rows were written on several systems: without this a model is shown, and learns, carriage returns.
    code = row["code"].replace("\r\n", "\n").strip()
    return f"{code}\n{_FENCE}"


def mbpp_program(row: Row, completion: str) -> str:
    """The setup comes after the completion, whose classes it uses."""
    return "\n".join([completion, row["test_setup_code"], *row["test_list"], ""])


def mbpp_result(row: Row, results: list[str]) -> dict[str, int]:
    return _pass_at_1(mbpp_program(row, results[0]))


def _pass_at_1(program: str) -> dict[str, int]:
    return {"pass@1": int(sandbox.passes(program))}
