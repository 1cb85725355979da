"""Generated code reaches nothing outside its sandbox, and passes only by running to its end."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from qbench.evaluate import sandbox

TASKS = Path(sandbox.__file__).parent / "tasks" / "code"
SLOW_MACHINE_S = 60.0  # for what should end by itself


@pytest.fixture(scope="module", autouse=True)
def _isolation():
    try:
        sandbox.check()
    except RuntimeError as error:
        pytest.skip(str(error))


def run(program: str, timeout_s: float = SLOW_MACHINE_S, **limits: int) -> sandbox.Outcome:
    return sandbox.run(program, timeout_s=timeout_s, **limits)


def processes_with(marker: str) -> list[Path]:
    return [p for p in Path("/proc").glob("[0-9]*/cmdline") if marker.encode() in _bytes(p)]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_program_passes_by_running_to_its_end():
    assert sandbox.passes("assert sum([1, 2]) == 3", timeout_s=SLOW_MACHINE_S)
    assert run("") == "passed"
    assert (
        run("if __name__ == '__main__':\n    import sys\n    assert sys.modules['__main__'].__name__")
        == "passed"
    )


@pytest.mark.parametrize(
    "program",
    ["assert sum([1, 2]) == 4", "def f(:", "\0", "'\ud800'", "import absent_module", "raise SystemExit(2)"],
)
def test_a_wrong_program_fails(program):
    assert run(program) == "failed"


@pytest.mark.parametrize(
    "program",
    [
        "exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import os\nif os.fork():\n    os.wait()\n    os._exit(0)",
        "import atexit, os; atexit.register(os._exit, 1)",
        "import atexit, os; atexit.register(os._exit, 2)",
        "import os, sys; sys.stdout.close(); os.closerange(0, 256)",
    ],
)
def test_an_early_or_late_exit_does_not_pass(program):
    assert run(program) == "failed"


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.kill(0, 9)",
        "import os\ntry: os.kill(-1, 9)\nexcept ProcessLookupError: os.abort()",
    ],
)
def test_signals_of_a_program_end_only_itself(program):
    assert run(program) == "killed"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError: pass\ntime.sleep(60)",
        "import atexit, time; atexit.register(time.sleep, 60)",
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
    ],
)
def test_what_does_not_end_is_ended_at_the_deadline(program):
    start = time.monotonic()
    assert run(program, timeout_s=1.0) == "timeout"
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("end", "outcome"), [("time.sleep(60)", "timeout"), ("", "passed")])
def test_no_process_outlives_its_program(end, outcome):
    marker = f"qbench-test-{os.getpid()}-{outcome}"
    program = (
        "import os, subprocess, sys, time\n"
        f"command = [sys.executable, '-c', 'import time; time.sleep(60)', {marker!r}]\n"
        "subprocess.Popen(command, start_new_session=True)\n"
        "if not os.fork():\n    os.setsid()\n    if not os.fork():\n        os.execv(command[0], command)\n"
    )
    assert run(program + end, timeout_s=2.0 if end else SLOW_MACHINE_S) == outcome
    deadline = time.monotonic() + 10
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel reaps what the deadline killed
    assert not processes_with(marker)


def test_memory_is_bounded():
    assert run("x = bytearray(100 << 20)", memory_mb=512) == "passed"
    assert run("x = bytearray(600 << 20)", memory_mb=512) == "failed"
    assert run("x = []\nwhile True: x.append(bytearray(1 << 20))", memory_mb=256) == "failed"


def test_forks_are_bounded():
    forks = "import os, time\nfor _ in range({}):\n    if not os.fork(): time.sleep(60)\n"
    assert run(forks.format(8)) == "passed"
    assert run(forks.format(64)) == "failed"
    assert run("import os\nwhile True: os.fork()") == "failed"


def test_files_are_bounded():
    assert run("open('a', 'wb').write(bytes(1 << 20)); assert open('a', 'rb').read(1)") == "passed"
    assert run("with open('a', 'wb') as file: file.write(bytes(32 << 20))") == "failed"
    many = "for i in range(16):\n    with open(str(i), 'wb') as file: file.write(bytes(8 << 20))"
    assert run(many) == "failed"


def test_output_is_discarded():
    assert (
        run("import sys\nfor _ in range(64): print('x' * 2**20); sys.stderr.write('y' * 2**20)") == "passed"
    )
    assert run("while True: print('x' * 2**20)", timeout_s=1.0) == "timeout"


def test_input_is_empty():
    assert run("import sys; assert sys.stdin.read() == ''") == "passed"
    assert run("input()") == "failed"


@pytest.mark.parametrize("family", ["AF_INET", "AF_UNIX"])
def test_a_listening_server_cannot_be_reached(family):
    address = f"\0qbench-{os.getpid()}" if family == "AF_UNIX" else ("127.0.0.1", 0)
    with socket.socket(getattr(socket, family)) as server:
        server.bind(address)
        server.listen()
        with socket.socket(getattr(socket, family)) as client:
            client.connect(server.getsockname())  # from outside the sandbox it works
        connect = f"socket.socket(socket.{family}).connect({server.getsockname()!r})"
        assert run(f"import socket\n{connect}") == "failed"
        caught = f"import socket\ntry: {connect}\nexcept OSError: pass\nelse: raise ValueError"
        assert run(caught) == "passed"


def test_there_is_no_interface_but_a_loopback_that_is_down():
    program = (
        "import socket\nassert socket.if_nameindex() == [(1, 'lo')]\nserver = socket.create_server(('', 0))\n"
        "try: socket.create_connection(('127.0.0.1', server.getsockname()[1]), timeout=1)\n"
        "except OSError: pass\nelse: raise ValueError"
    )
    assert run(program) == "passed"


def test_the_environment_of_the_caller_is_not_seen(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-caller")
    assert (
        run("import os; assert 'HF_TOKEN' not in os.environ and os.environ['HOME'] == os.getcwd()")
        == "passed"
    )
    assert run(f"open('/proc/{os.getpid()}/environ').read()") == "failed"
    program = (
        "import glob\nfor path in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try: text = open(path).read()\n    except OSError: continue\n"
        "    assert 'secret-of-the-caller' not in text"
    )
    assert run(program) == "passed"


def test_nothing_outside_the_scratch_space_can_be_written(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    tmp_path.chmod(0o777)
    kept.chmod(0o666)
    assert run(f"assert open({str(kept)!r}).read() == 'as it was'") == "passed"
    for attack in (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.chmod({str(kept)!r}, 0)",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "open('/dev/shm/qbench-test', 'w')",
    ):
        assert run(attack) == "failed", attack
    assert kept.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [kept]


def test_the_scratch_space_is_empty_and_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = "import os, tempfile\nassert os.listdir() == []\nopen('a', 'w').close()\ntempfile.mkdtemp()"
    assert run(program) == "passed"
    assert run(program + "\nwhile True: pass", timeout_s=1.0) == "timeout"
    assert list(tmp_path.iterdir()) == []


def test_a_program_has_no_privileges():
    status = "import os\nstatus = dict(line.split(':\\t') for line in open('/proc/self/status') if ':\\t' in line)\n"
    assert (
        run(status + "assert not any(int(status[s], 16) for s in ('CapEff', 'CapPrm', 'CapInh'))") == "passed"
    )
    assert run(status + "assert int(status['NoNewPrivs']) == 1 and os.geteuid() != 0") == "passed"
    unmount = "import ctypes; assert ctypes.CDLL(None).umount2({!r}, 2) == 0"
    assert run(unmount.format(b"/run")) == "failed"


def test_results_do_not_depend_on_the_hash_seed(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    hashed = subprocess.run(
        [sys.executable, "-c", "print(hash('a'))"], capture_output=True, check=True, text=True
    )
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    assert run(f"assert hash('a') == {hashed.stdout}") == "passed"


def test_a_denied_system_call_is_an_error_and_not_an_outcome(tmp_path, monkeypatch):
    launcher = tmp_path / "launcher.py"
    denied = 'raise OSError(1, "Operation not permitted", "unshare")'
    text = (
        Path(sandbox.__file__)
        .read_text()
        .replace("    uid, gid = os.geteuid()", f"    {denied}\n    uid, gid = 0")
    )
    launcher.write_text(text)
    monkeypatch.setattr(sandbox, "__file__", str(launcher))
    with pytest.raises(RuntimeError, match=r"Operation not permitted \(unshare\); namespaces of Linux"):
        sandbox.run("", timeout_s=SLOW_MACHINE_S)
    with pytest.raises(RuntimeError, match="cannot be isolated here"):
        sandbox.check()


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="Linux namespaces and this is darwin"):
        sandbox.check()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def build(name: str, **splits: list[dict]):
    manager = TaskManager(verbosity="ERROR", include_defaults=False, include_path=str(TASKS))
    data = {split: Dataset.from_list(documents) for split, documents in splits.items()}
    group = {"group": "g", "task": [{"task": name, "custom_dataset": lambda **_: data}]}
    return manager.load([group])["tasks"][name]


def humaneval(shared_data: Path, documents: slice):
    return build("humaneval", test=rows(shared_data / "humaneval" / "test.jsonl")[documents])


def mbpp(shared_data: Path, documents: slice):
    all_rows = rows(shared_data / "mbpp" / "mbpp.jsonl")
    by_id = {row["task_id"]: row for row in all_rows}
    return build(
        "mbpp", prompt=[by_id[i] for i in range(1, 11)], test=[by_id[i] for i in range(11, 511)][documents]
    )


SOLUTION = {"humaneval": "canonical_solution", "mbpp": "code"}
LOAD = {"humaneval": humaneval, "mbpp": mbpp}


@pytest.mark.parametrize("name", LOAD)
@pytest.mark.parametrize(
    "documents", [slice(0, 8), pytest.param(slice(None), marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_reference_solutions_pass(shared_data, name, documents):
    task = LOAD[name](shared_data, documents)
    assert [
        row["task_id"]
        for row in task.test_docs()
        if task.process_results(row, [row[SOLUTION[name]]]) != {"pass@1": 1}
    ] == []


@pytest.mark.parametrize("name", LOAD)
def test_a_mutilated_solution_does_not_pass(shared_data, name):
    for row in LOAD[name](shared_data, slice(0, 4)).test_docs():
        solution = row[SOLUTION[name]]
        task = LOAD[name](shared_data, slice(0, 1))
        for broken in ("", solution[: len(solution) // 2], solution.replace("return", "exit(0); return")):
            assert task.process_results(row, [broken]) == {"pass@1": 0}, broken


def test_humaneval_shows_the_prompt_of_the_row_alone(shared_data):
    task = humaneval(shared_data, slice(0, 1))
    row = next(iter(task.test_docs()))
    assert task.fewshot_context(row, 0) == row["prompt"]
    assert task.config.num_fewshot == 0


def test_mbpp_shows_three_solved_tasks_and_the_tests(shared_data):
    task = mbpp(shared_data, slice(0, 2))
    row = next(iter(task.test_docs()))
    prompt = task.fewshot_context(row, task.config.num_fewshot)
    assert prompt.count("Task: ") == 4
    assert prompt.count("```") == 4 * 4 - 1  # the last fence is the model's to close
    assert all(test in prompt for test in row["test_list"])
    assert "\r" not in prompt
    assert prompt.endswith("```python\n")


class Oracle(LM):
    """Answers every other request with the reference solution, the others with nothing."""

    def generate_until(self, requests, disable_tqdm=True):
        return [r.doc[SOLUTION[r.task_name]] if i % 2 == 0 else "" for i, r in enumerate(requests)]

    def loglikelihood(self, requests, disable_tqdm=True):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        raise NotImplementedError


@pytest.mark.parametrize("name", LOAD)
def test_pass_at_1_is_a_mean_over_rows_given_consent(shared_data, name):
    tasks = {"tasks": {name: LOAD[name](shared_data, slice(0, 4))}}
    with pytest.raises(ValueError, match="unsafe"):
        evaluate(Oracle(), tasks, bootstrap_iters=0)
    results = evaluate(Oracle(), tasks, bootstrap_iters=0, confirm_run_unsafe_code=True)
    assert results["results"][name]["pass@1,none"] == 0.5
    assert [document["pass@1"] for document in results["samples"][name]] == [1, 0, 1, 0]
