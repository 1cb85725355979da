"""What is asked of a judge, what is made of its words, and what must never leave: the key."""

import json
import logging
import math
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
from email.utils import formatdate
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from qbench.evaluate import judge as module
from qbench.evaluate.dialogue import PLAIN_TEMPLATE, Answer, Question, answer
from qbench.evaluate.judge import Judge, judge, prompt
from qbench.models.load import ModelRef
from tests.judge_server import Fault, JudgeServer

KEY = "sk-secret-0123456789"
ANSWERS = [
    Answer(Question(1, "math", ("1+1?", "+1?"), ("two", "")), ("it is 2", "it is 3"), False),
    Answer(Question(2, "text", ("A word?", "Another?")), ("cat", "dog"), False),
    Answer(Question(3, "text", ("A letter?",)), ("x",), False),
]
MARKS = {"it is 2": 9, "it is 3": 4, "cat": 8, "dog": 8, "x": 1}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("QBENCH_JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def mark(text):
    """The scripted rating of the last reply in a prompt."""
    last = text.split("<model>\n")[-1].split("\n</model>")[0]
    return f"[[{MARKS[last]}]]"


def patient(server, **kwargs):
    """A judge that notes how long it would have waited."""
    waits = []
    return Judge(server.base_url, "nano", sleep=waits.append, **kwargs), waits


def test_scores_are_means_over_questions_of_means_over_turns(tmp_path):
    with JudgeServer(mark) as server:
        result = judge(ANSWERS, "mt_bench", Judge(server.base_url, "nano"), tmp_path)
    scores = [6.5, 8.0, 1.0]
    assert result.samples == [
        {"metric": "judge/mt_bench", "item": item, "value": value, "part": part}
        for item, value, part in zip((1, 2, 3), scores, ("math", "text", "text"), strict=True)
    ]
    columns = {"judge": scores, "judge_turn1": [9, 8, 1], "judge_turn2": [4, 8]}
    expected = {"unjudged/mt_bench": 0.0}
    for name, values in columns.items():
        expected[f"{name}/mt_bench"] = statistics.mean(values)
        expected[f"{name}/mt_bench_stderr"] = statistics.stdev(values) / math.sqrt(len(values))
    assert result.metrics == pytest.approx(expected)


def test_a_request_is_an_openai_chat_completion_at_temperature_zero(tmp_path):
    with JudgeServer() as server:
        judge(ANSWERS[2:], "b", Judge(server.base_url + "/", "nano"), tmp_path)
    [request] = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == f"Bearer {KEY}"
    assert request["body"] == {
        "model": "nano", "temperature": 0, "max_tokens": 1024, "messages": prompt(ANSWERS[2], 0)
    }  # fmt: skip


def test_a_turn_is_shown_with_what_precedes_it_and_its_own_reference_only():
    first, second = (prompt(ANSWERS[0], turn)[-1]["content"] for turn in (0, 1))
    assert "1+1?" in first
    assert "it is 2" in first
    assert "it is 3" not in first
    assert "two" in first
    assert second.index("it is 2") < second.index("+1?\n</user>\n<model>\nit is 3")
    assert "known to be right" in first
    assert "known to be right" not in second
    assert "{" not in prompt(ANSWERS[1], 1)[-1]["content"]


@pytest.mark.parametrize("content", ["{reference}", "{0} {} {{x}} %s"])
def test_braces_in_an_answer_stay_what_they_are(content):
    said = Answer(Question(1, "code", (content,), (content,)), (content,), False)
    assert prompt(said, 0)[-1]["content"].count(content) == 3


def test_a_second_run_makes_no_request(tmp_path):
    with JudgeServer(mark) as server:
        first = judge(ANSWERS, "b", Judge(server.base_url, "nano"), tmp_path)
        assert len(server.requests) == 5
        assert judge(ANSWERS, "b", Judge(server.base_url, "nano"), tmp_path) == first
        assert len(server.requests) == 5
        assert {path.suffix for path in tmp_path.iterdir()} == {".json"}
        judge(ANSWERS, "b", Judge(server.base_url, "other"), tmp_path)
        assert len(server.requests) == 10


def test_another_prompt_revision_is_asked_again(tmp_path, monkeypatch):
    with JudgeServer(mark) as server:
        judge(ANSWERS, "b", Judge(server.base_url, "nano"), tmp_path)
        monkeypatch.setattr(module, "PROMPT_REVISION", module.PROMPT_REVISION + 1)
        judge(ANSWERS, "b", Judge(server.base_url, "nano"), tmp_path)
        assert len(server.requests) == 10


@pytest.mark.parametrize(
    ("said", "rating"),
    [
        ("[[10]]", 10), ("[[1]]", 1), ("[[ 7.5 ]]", 7.5), ("not [[3]] but [[4]]", 4), ("[[11]]", None),
        ("[[0]]", None), ("[[n]]", None), ("[7]", None), ("7/10", None), ("", None),
    ],
)  # fmt: skip
def test_a_rating_is_the_last_number_in_brackets_from_1_to_10(said, rating, tmp_path):
    with JudgeServer(lambda prompt: said) as server:
        result = judge(ANSWERS[2:], "b", Judge(server.base_url, "nano"), tmp_path)
    assert result.metrics.get("judge/b") == rating
    assert result.metrics["unjudged/b"] == (rating is None)
    assert len(server.requests) == (3 if rating is None else 1)


def test_an_unreadable_rating_is_asked_for_twice_more(tmp_path):
    said = iter(["no idea", "[[12]]", "[[6]]"])
    with JudgeServer(lambda prompt: next(said)) as server:
        result = judge(ANSWERS[2:], "b", Judge(server.base_url, "nano"), tmp_path)
        assert len(server.requests) == len(list(tmp_path.iterdir())) == 3
        assert result.metrics == {"judge/b": 6.0, "judge_turn1/b": 6.0, "unjudged/b": 0.0}
        assert judge(ANSWERS[2:], "b", Judge(server.base_url, "nano"), tmp_path) == result
        assert len(server.requests) == 3


def test_what_is_unjudged_is_counted_and_left_out(tmp_path):
    def silent_on_animals(text):
        return "" if "<model>\ndog" in text or "<model>\nx\n" in text else mark(text)

    with JudgeServer(silent_on_animals) as server:
        result = judge(ANSWERS, "b", Judge(server.base_url, "nano"), tmp_path)
        assert len(server.requests) == 3 + 2 * 3
        assert judge(ANSWERS, "b", Judge(server.base_url, "nano"), tmp_path) == result
        assert len(server.requests) == 9
    assert result.metrics["unjudged/b"] == 2
    assert [(s["item"], s["value"]) for s in result.samples] == [(1, 6.5), (2, 8.0)]
    assert result.metrics["judge_turn2/b"] == 4.0
    assert "judge_turn2/b_stderr" not in result.metrics


def test_nothing_to_judge_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no answers to vicuna to judge"):
        judge([], "vicuna", Judge("http://127.0.0.1/v1", "nano"), tmp_path)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(429),
        Fault(408),
        Fault(409),
        Fault(500),
        Fault(503, "busy"),
        Fault(200, "<html>"),
        Fault(200, "[]"),
    ],
    ids=lambda fault: f"{fault.status}-{fault.body}",
)
def test_passing_faults_are_tried_again_with_growing_waits(fault, tmp_path):
    before = random.getstate()
    with JudgeServer(mark, (fault,) * 4) as server:
        asked, waits = patient(server)
        assert judge(ANSWERS[2:], "b", asked, tmp_path).metrics["judge/b"] == 1
        assert len(server.requests) == 5
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits))
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("asked_for", "waited"), [("7", 7), ("0.5", None), ("86400", 60), ("soon", None), ("date", 30)]
)
def test_the_server_says_how_long_to_wait_within_reason(asked_for, waited, tmp_path):
    value = formatdate(time.time() + 30, usegmt=True) if asked_for == "date" else asked_for
    with JudgeServer(mark, (Fault(429, headers={"Retry-After": value}),)) as server:
        asked, waits = patient(server)
        judge(ANSWERS[2:], "b", asked, tmp_path)
    [wait] = waits
    if waited is None:
        assert 0.5 <= wait <= 1
    else:
        assert wait == pytest.approx(waited, abs=5 if asked_for == "date" else 1e-9)


def test_a_lasting_fault_stops_after_all_attempts_and_what_was_judged_is_kept(tmp_path):
    with JudgeServer(mark) as server:
        asked, _ = patient(server, attempts=3)
        judge(ANSWERS[:1], "b", asked, tmp_path)
        server.faults += [Fault(503, "come back later\nmuch later")] * 3
        with pytest.raises(
            ConnectionError, match="gave status 503 at the last of 3 attempts: come back later;"
        ):
            judge(ANSWERS, "b", asked, tmp_path)
        assert len(server.requests) == 2 + 3
        judge(ANSWERS, "b", asked, tmp_path)
        assert len(server.requests) == 2 + 3 + 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 301, 307])
def test_a_refusal_stops_at_once_and_says_where(status, tmp_path):
    elsewhere = {"Location": "http://127.0.0.1:9/v1/chat/completions"} if status in (301, 307) else {}
    with JudgeServer(mark, (Fault(status, "no such model\ndetails", elsewhere),)) as server:
        asked, waits = patient(server)
        with pytest.raises(ConnectionError) as error:
            judge(ANSWERS, "b", asked, tmp_path)
    assert str(error.value) == f"judge at {asked.endpoint} refused with status {status}: no such model"
    assert len(server.requests) == 1
    assert not waits
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_not_there_is_tried_again(tmp_path):
    with JudgeServer() as server:
        asked, waits = patient(server, attempts=4)
    with pytest.raises(ConnectionError, match=r"gave no answer at the last of 4 attempts: URLError.*refused"):
        judge(ANSWERS, "b", asked, tmp_path)
    assert len(waits) == 3


def test_a_server_that_says_nothing_times_out():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        asked = Judge(f"http://127.0.0.1:{mute.getsockname()[1]}", "nano", timeout=0.1, attempts=1)
        with pytest.raises(ConnectionError, match=r"no answer .* timed out"):
            asked.ask([])


def everything(folder):
    return "".join(path.read_text(encoding="utf-8") for path in folder.iterdir())


def test_the_key_is_in_no_repr_error_log_or_cache(tmp_path, caplog, capfd):
    """Even where the server says it back."""
    caplog.set_level(logging.DEBUG)
    with JudgeServer(lambda text: f"your key is {KEY} [[5]]") as server:
        asked, _ = patient(server, attempts=1)
        assert judge(ANSWERS, "b", asked, tmp_path).metrics["judge/b"] == 5
        assert server.requests[0]["headers"]["Authorization"].endswith(KEY)
        assert KEY not in repr(asked) + str(vars(asked)) + everything(tmp_path)
        for fault in (Fault(401, f"bad key {KEY}"), Fault(500, f"{KEY} broke"), Fault(200, f"no JSON {KEY}")):
            server.faults.append(fault)
            with pytest.raises(ConnectionError, match=r"\[key\]") as error:
                asked.ask([])
            assert KEY not in repr(error.value)
    output = capfd.readouterr()
    assert KEY not in caplog.text + output.out + output.err


def test_the_key_comes_from_the_environment_alone(monkeypatch):
    def sent():
        with JudgeServer() as server:
            Judge(server.base_url, "nano").ask(prompt(ANSWERS[2], 0))
        return server.requests[0]["headers"].get("Authorization")

    monkeypatch.setenv("OPENAI_API_KEY", "second")
    assert sent() == f"Bearer {KEY}"
    monkeypatch.delenv("QBENCH_JUDGE_KEY")
    assert sent() == "Bearer second"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert sent() is None
    with (
        JudgeServer(faults=(Fault(401, "who are you"),)) as server,
        pytest.raises(ConnectionError, match="who are you; set QBENCH_JUDGE_KEY"),
    ):
        Judge(server.base_url, "nano").ask([])


def test_a_key_that_no_header_can_hold_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("QBENCH_JUDGE_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ValueError, match=r"QBENCH_JUDGE_KEY.*no HTTP header") as error:
        Judge("http://127.0.0.1:9/v1", "nano").ask([])
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "url", ["judge/v1", "ftp://h/v1", "http://", f"https://me:{KEY}@h/v1", f"https://h/v1?key={KEY}"]
)
def test_an_address_that_cannot_be_or_holds_a_secret_is_refused_unseen(url):
    with pytest.raises(ValueError, match="base_url must look like https://host/v1") as error:
        Judge(url, "nano")
    assert KEY not in str(error.value)


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"timeout": 0}])
def test_a_judge_that_could_never_answer_is_refused(wrong):
    with pytest.raises(ValueError, match="needs 1 attempt and a timeout above 0"):
        Judge("http://127.0.0.1/v1", "nano", **wrong)


def test_a_model_is_asked_and_judged_from_end_to_end(tmp_path):
    reference = ModelRef("zoo/nano-llama")
    said = answer(
        reference.load(), reference.tokenizer(), [a.question for a in ANSWERS], max_new_tokens=4,
        template=PLAIN_TEMPLATE, keep=tmp_path / "answers.jsonl",
    )  # fmt: skip
    with JudgeServer() as server:
        result = judge(said, "mt_bench", Judge(server.base_url, "nano"), tmp_path / "judge")
    assert result.metrics["judge/mt_bench"] == 7
    assert result.metrics["judge/mt_bench_stderr"] == 0


@pytest.mark.slow
def test_the_server_of_transformers_is_understood(tmp_path):
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("`transformers serve` needs `pip install transformers[serving]`")
    folder = tmp_path / "nano"
    shutil.copytree(ModelRef("zoo/nano-llama").folder, folder)
    (folder / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log, env=os.environ.copy()
    )
    try:
        wait_for(process, f"http://127.0.0.1:{port}/health", tmp_path / "log")
        asked = Judge(f"http://127.0.0.1:{port}/v1", str(folder), max_tokens=8, attempts=1)
        result = judge(ANSWERS[2:], "b", asked, tmp_path / "judge")
    finally:
        process.kill()
        process.wait()
        log.close()
    assert result.metrics == {"unjudged/b": 1.0}
    replies = [json.loads(path.read_text())["reply"] for path in (tmp_path / "judge").iterdir()]
    assert len(replies) == 3
    assert all(replies)


def wait_for(process, url, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            with urlopen(url, timeout=1):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"no server after a minute: {log.read_text()}")
