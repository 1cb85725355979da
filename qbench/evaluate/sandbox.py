"""Run Python programs that a language model wrote: no network, nothing writable but a small scratch space.

Linux only. The file is also its own launcher: `run` starts it as a program, which gives up the network, the
file system and its privileges, and only then forks the process that runs the generated code:

    qbench ── launcher (namespaces, limits) ── init (process 1 of its namespace) ── the program

Nothing outlives init, whatever the program forks. The guard is against what models write by accident, not against
somebody who writes code to deceive it: a program that searches the interpreter can find the token and pass.
"""

import ctypes
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

Outcome = Literal["passed", "failed", "timeout", "killed"]

_NEEDED = (
    "namespaces of Linux 5.12 or later that any user may create are needed: see `sysctl user.max_user_namespaces` "
    "and `kernel.apparmor_restrict_unprivileged_userns`, and in a container its seccomp profile; or leave out the "
    "tasks that run generated code"
)
_TOKEN_BYTES = 16
_PROGRAM_BYTES = 2**20
_FILE_BYTES = 16 * 2**20
_SCRATCH = b"size=64m,nr_inodes=1024,mode=700"
_PROCESSES = 32
_OPEN_FILES = 256
_NOBODY = 65534

_KILLED, _DENIED = 2, 3  # exit codes of the launcher, beside 0 and 1

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/capability.h>
_NEW_MOUNTS, _NEW_IPC, _NEW_USERS, _NEW_PIDS, _NEW_NETWORK = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
_MS_READ_ONLY, _MS_NO_SETUID, _MS_NO_DEVICES, _MS_RECURSIVE, _MS_PRIVATE = 1, 2, 4, 1 << 14, 1 << 18
_SYS_MOUNT_SETATTR, _AT_CWD, _AT_RECURSIVE, _ATTR_READ_ONLY = 442, -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CAPABILITY_VERSION = 0x20080522


def check() -> None:
    """Make sure that programs can be isolated on this machine.

    Raises:
        RuntimeError: What the system denied; nothing is ever run without isolation.
    """
    outcome = run("import socket\nassert socket.if_nameindex() == [(1, 'lo')]", timeout_s=60.0)
    if outcome != "passed":
        raise RuntimeError(
            f"a program that looks for network interfaces {outcome} in the sandbox, it should pass; check that "
            f"{sys.prefix} can be read without privileges, or leave out the tasks that run generated code"
        )


def passes(program: str, *, timeout_s: float = 5.0, memory_mb: int = 1024) -> bool:
    """Whether a program runs to its end and exits with 0; see `run`."""
    return run(program, timeout_s=timeout_s, memory_mb=memory_mb) == "passed"


def run(program: str, *, timeout_s: float = 5.0, memory_mb: int = 1024) -> Outcome:
    """How a program ends: `passed` if its last line was reached and it exited with 0.

    `timeout_s` is wall-clock time and includes the start of the interpreter; `memory_mb` is address space, of each
    process. A program that ends itself early, `exit(0)` say, has `failed`; one that a signal ended was `killed`.

    Raises:
        RuntimeError: If the system denies isolation.
    """
    if sys.platform != "linux":
        raise RuntimeError(
            f"generated code is run in Linux namespaces and this is {sys.platform}; run these tasks on Linux, or in "
            "a Linux container, or leave them out"
        )
    text = program.encode(errors="surrogatepass")
    if len(text) > _PROGRAM_BYTES:
        return "failed"
    token = secrets.token_bytes(_TOKEN_BYTES)
    read_end, write_end = os.pipe()
    with open(read_end, "rb", buffering=0) as report, open(write_end, "wb", buffering=0) as keep:
        with tempfile.TemporaryDirectory(prefix="qbench-sandbox-") as scratch:
            code, message = _launch(token + text, keep.fileno(), scratch, timeout_s, memory_mb)
        keep.close()
        reached = code == 0 and report.read(len(token) + 1) == token
    if code == _DENIED:
        raise RuntimeError(f"generated code cannot be isolated here: {message}")
    if code is None:
        return "timeout"
    if code < 0 or code == _KILLED:
        return "killed"
    return "passed" if reached else "failed"


def _launch(
    stdin: bytes, keep: int, scratch: str, timeout_s: float, memory_mb: int
) -> tuple[int | None, str]:
    """Exit code of the launcher, None at the deadline, and what it said before the program began."""
    # `-I` without its `-E`, which would ignore PYTHONHASHSEED; the environment is ours anyway.
    command = [sys.executable, "-s", "-P", __file__, scratch, str(keep)]
    process = subprocess.Popen(
        [*command, str(math.ceil(timeout_s) + 1), str(memory_mb)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=(keep,),
        start_new_session=True, cwd=scratch, env=_environment(scratch),
    )  # fmt: skip
    try:
        _, stderr = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:
            # Init is in the group, and its whole namespace dies with it.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, stderr.decode(errors="replace").strip()


def _environment(scratch: str) -> dict[str, str]:
    """Nothing of the caller's: no secrets, and no setting that a result could depend on."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": scratch,
        "TMPDIR": scratch,
        "PYTHONHASHSEED": "0",  # the order of a set of strings must not decide whether a program passes
        "OMP_NUM_THREADS": "1",  # each of numpy's threads would reserve address space
        "OPENBLAS_NUM_THREADS": "1",
    }


def _main(scratch: str, report: int, cpu_s: int, memory_mb: int) -> None:
    """The launcher: isolate, then become the parent of init, which is the parent of the program."""
    stdin = sys.stdin.buffer.read()
    token, program = stdin[:_TOKEN_BYTES], stdin[_TOKEN_BYTES:]
    try:
        _isolate(scratch)
        _limit(cpu_s, memory_mb)
    except OSError as error:
        sys.stderr.write(f"{error.strerror} ({error.filename}); {_NEEDED}")
        sys.exit(_DENIED)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    if init := os.fork():
        code = _end_of(init)
        os._exit(_KILLED if code < 0 else code)
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if child := os.fork():
        code = _end_of(child)
        os._exit(_KILLED if code < 0 else min(code, 1))
    os.setsid()  # or kill(0, …) in the program would reach the launcher, which has its user
    _execute(program, report, token)


def _end_of(child: int) -> int:
    """Exit code, or the negative of the signal that ended it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _isolate(scratch: str) -> None:
    """Give up the network, other processes, all writing outside `scratch`, and every privilege."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        os.setresuid(_NOBODY, 0, 0)  # no limit on processes ever holds for the real user root
    _call("unshare", _NEW_USERS | _NEW_MOUNTS | _NEW_IPC | _NEW_PIDS | _NEW_NETWORK)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_NOBODY} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{_NOBODY} {gid} 1")
    _call("mount", None, b"/", None, _MS_RECURSIVE | _MS_PRIVATE, None)
    read_only = (ctypes.c_uint64 * 4)(_ATTR_READ_ONLY, 0, 0, 0)
    _call("syscall", _SYS_MOUNT_SETATTR, _AT_CWD, b"/", _AT_RECURSIVE, read_only, ctypes.sizeof(read_only))
    flags = _MS_NO_SETUID | _MS_NO_DEVICES
    if os.path.isdir("/run"):  # sockets of services, which a read-only file system does not close
        _call("mount", b"none", b"/run", b"tmpfs", flags | _MS_READ_ONLY, None)
    _call("mount", b"none", os.fsencode(scratch), b"tmpfs", flags, _SCRATCH)
    os.chdir(scratch)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    none = (ctypes.c_uint32 * 6)()
    _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), none)
    # Last: a change of credentials clears it.
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _call(function: str, *arguments: Any) -> None:
    """Call the C library; integers are passed as `long`, as wide as any parameter.

    Raises:
        OSError: With `function` as its file name.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), function)


def _limit(cpu_s: int, memory_mb: int) -> None:
    import resource  # not on Windows, where the rest of the module must import

    for kind, limit in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_mb * 2**20),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NPROC, _PROCESSES),  # counted in the user namespace, hence after it is made
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def _execute(program: bytes, report: int, token: bytes) -> None:
    """Run the program as a script would be, then report that its end was reached."""
    write, process, itself = os.write, os.getpid, os.getpid()  # the program may replace them
    sys.argv = [""]
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(program, "<program>", "exec", dont_inherit=True), vars(main))
    if process() == itself:  # not a child that the program forked
        write(report, token)


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))
