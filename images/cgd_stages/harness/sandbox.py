"""Runs a Python program, and its checks, where they can do nothing but compute. `sandboxed` starts both processes.

    python -I -S sandbox.py program SECONDS MEGABYTES QUESTIONS ANSWERS < {"program": ..., "entry": ...}
    python -I -S sandbox.py checks SECONDS MEGABYTES ANSWERS QUESTIONS < {"head": ..., "entry": ..., "checks": ...}

Before it compiles any of that, each process locks itself in, for good. It limits its time and memory (setrlimit). It
gives up every file but Python's libraries, which it can only read (Landlock), and every system call that computing does
not need (seccomp). So it has no network, starts, traces and signals no other process, and writes to no file.

A program is not trusted. Its process reads arguments as lines of JSON from the descriptor QUESTIONS, calls the function
`entry` with them, and writes the result, as plain data, to ANSWERS. The checks run in the other process. Only that one
knows them, and only that one keeps its standard output, for the verdict: "passed", or how it ended. Both need nothing
but the standard library, no privilege, and Linux 5.13 or newer with Landlock switched on.
"""

import ctypes
import errno
import fcntl
import json
import os
import resource
import struct
import sys
import termios
from pathlib import Path
from typing import Any, NoReturn, TextIO

MEBIBYTE = 1 << 20
LIBRARIES = ("/usr/lib", "/lib", "/lib64", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/urandom")

# linux/landlock.h
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Numbers of system calls, the same on every architecture."""
VERSION_FLAG, PATH_BENEATH = 1, 1
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Version of the ABI -> its number of rights over files; versions above 5 have as many as 5."""
NETWORK, SCOPES = 0b11, 0b11
"""Bind and connect of TCP, from ABI 4; abstract sockets and signals, from ABI 6."""

NO_NEW_PRIVILEGES = 38  # prctl
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
"""libseccomp's actions."""
COMPUTING = """
    read readv pread64 write writev lseek close fstat newfstatat stat lstat statx access faccessat faccessat2 readlink
    readlinkat open openat getdents64 getcwd dup dup2 dup3 poll ppoll select pselect6
    mmap munmap mremap mprotect madvise brk
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    futex set_robust_list get_robust_list set_tid_address rseq sched_yield sched_getaffinity
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getrandom
    getpid getppid gettid getuid geteuid getgid getegid getpgrp uname sysinfo getrlimit
    exit exit_group
"""
COMMANDS = {
    "fcntl": (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL),
    "ioctl": (termios.TCGETS, termios.FIOCLEX, termios.FIONCLEX),
}
"""The allowed second arguments of these calls. Others make the kernel signal any process (F_SETOWN, F_NOTIFY,
FIOSETOWN), which Landlock prevents only from Linux 6.12 on."""
MASKED_EQUAL = 7
"""libseccomp's comparison under a mask."""
LINE = 1 << 24
"""The most characters of a question or an answer."""
LONGEST_NAME = 50
"""The most characters of an error's name."""
SERIES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Unavailable(Exception):
    """The system cannot lock this process in."""


class Lost(Exception):
    """The program's process has ended, or writes something other than lines of JSON."""


class Comparison(ctypes.Structure):
    """libseccomp's scmp_arg_cmp."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


def limit(seconds: int, megabytes: int) -> None:
    for name, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, megabytes * MEBIBYTE),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(name, (most, most))


def lock_files() -> None:
    """Give up the file system but for Python's libraries, which stay readable."""
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION_FLAG)
    if abi < 1:
        raise Unavailable(f"the kernel has no Landlock ({os.strerror(ctypes.get_errno())})")
    handled = (1 << RIGHTS.get(abi, RIGHTS[5])) - 1
    fields = [handled, NETWORK if abi >= 4 else 0, SCOPES if abi >= 6 else 0]
    packed = struct.pack("=QQQ", *fields)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = _called(libc, CREATE_RULESET, packed, ctypes.c_size_t(len(packed)), 0)
    for path in map(Path, (f"{sys.base_prefix}/lib", *LIBRARIES, *DEVICES)):
        if path.exists():
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights = EXECUTE | READ_FILE | READ_DIR if path.is_dir() else READ_FILE
            _called(libc, ADD_RULE, rules, PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
            os.close(place)
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise Unavailable("the kernel refuses PR_SET_NO_NEW_PRIVS")
    _called(libc, RESTRICT_SELF, rules, 0)
    os.close(rules)


def _called(libc: ctypes.CDLL, number: int, *arguments: object) -> int:
    result = int(libc.syscall(number, *arguments))
    if result < 0:
        raise Unavailable(f"Landlock refused ({os.strerror(ctypes.get_errno())})")
    return result


def lock_calls() -> None:
    """Give up all system calls but `COMPUTING` and `COMMANDS`; the others fail with EPERM."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise Unavailable("libseccomp.so.2 is not installed") from error
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(REFUSE))
    for name in COMPUTING.split():
        _allow(library, rules, name)
    for name, commands in COMMANDS.items():
        for command in commands:
            # The register has 64 bits, and the kernel reads 32 of them.
            _allow(library, rules, name, Comparison(1, MASKED_EQUAL, 0xFFFFFFFF, command))
    if library.seccomp_load(rules):
        raise Unavailable("the kernel refuses the seccomp filter")


def _allow(library: ctypes.CDLL, rules: ctypes.c_void_p, name: str, *only: Comparison) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    comparisons = (Comparison * len(only))(*only)
    # A call that this architecture lacks has a number below 0.
    if number >= 0 and library.seccomp_rule_add_array(rules, ALLOW, number, len(only), comparisons):
        raise Unavailable(f"seccomp refuses the rule for {name}")


# --- the program ------------------------------------------------------------------------------------------------


def run(program: str, entry: str, questions: TextIO, answers: TextIO) -> None:
    """Execute the program, then call its function `entry` for every question until no more come."""

    def write(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(program, "<program>", "exec"), names)  # noqa: S102  the purpose of this process
    except BaseException as error:  # noqa: BLE001  a program may raise anything
        write(kind=type(error).__name__, words=str(error))
        return
    write(value=None)
    for question in questions:
        try:
            arguments, named = made(json.loads(question))
            write(value=plain(names[entry](*arguments, **named)))
        except BaseException as error:  # noqa: BLE001  so may its function
            write(kind=type(error).__name__, words=str(error))


# --- the checks -------------------------------------------------------------------------------------------------


def check(code: dict[str, str], questions: TextIO, answers: TextIO) -> None:
    """Run the checks. Raises what the checks or the program raise, and Lost."""

    def read_answer() -> Any:
        line = answers.readline(LINE)
        if not line.endswith("\n"):
            raise Lost
        answer = json.loads(line)
        if "kind" in answer:
            raise type(error_name(answer["kind"]), (Exception,), {})(answer["words"])
        return made(answer["value"])

    def entry(*arguments: Any, **named: Any) -> Any:
        print(json.dumps(plain((arguments, named))), file=questions, flush=True)
        return read_answer()

    read_answer()
    names: dict[str, Any] = {"__name__": "__main__"}
    if code["head"]:
        exec(compile(code["head"] + "    pass\n", "<head>", "exec"), names)  # noqa: S102  the purpose of this process
    names[code["entry"]] = entry
    exec(compile(code["checks"], "<checks>", "exec"), names)  # noqa: S102  likewise


def error_name(kind: object) -> str:
    """The name of an error that a program reports. It may be any text, such as the words of a verdict."""
    name = str(kind)[:LONGEST_NAME]
    return name if name.isascii() and name.isidentifier() and name[0].isupper() else "Exception"


def plain(value: Any) -> Any:
    """A value in a form that JSON can hold. Raises TypeError for a value that is not plain data."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for name, kind in SERIES.items():
        if isinstance(value, kind):
            return {name: [plain(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[plain(key), plain(item)] for key, item in value.items()]}
    raise TypeError(f"a value of type {type(value).__name__} cannot be checked")


def made(value: Any) -> Any:
    """The inverse of `plain`."""
    if not isinstance(value, dict):
        return value
    ((name, parts),) = value.items()
    if name == "dict":
        return {made(key): made(item) for key, item in parts}
    return SERIES[name](made(item) for item in parts)


# --- the process ------------------------------------------------------------------------------------------------


def main() -> None:
    part, seconds, megabytes, reading, writing = sys.argv[1], *map(int, sys.argv[2:])
    code, verdict = json.load(sys.stdin), os.dup(1)
    # The parent may have many open files; here the pipes get the lowest numbers, below the limit of open files.
    incoming, outgoing = os.fdopen(os.dup(reading)), os.fdopen(os.dup(writing), "w")
    os.close(reading)
    os.close(writing)
    nothing = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)
    try:
        limit(seconds, megabytes)
        lock_files()
        lock_calls()
    except Unavailable as error:
        say(verdict, f"unavailable {error}")
    if part == "program":
        os.close(verdict)
        run(code["program"], code["entry"], incoming, outgoing)
        return
    try:
        check(code, outgoing, incoming)
    except (Lost, BrokenPipeError):
        say(verdict, "lost")
    except BaseException as error:  # noqa: BLE001  checks may raise anything
        say(verdict, f"failed {type(error).__name__}: {error}")
    say(verdict, "passed")


def say(verdict: int, words: str) -> NoReturn:
    """Write the verdict and end."""
    os.write(verdict, words.encode(errors="replace")[:1000])
    os._exit(0)


if __name__ == "__main__":
    main()
