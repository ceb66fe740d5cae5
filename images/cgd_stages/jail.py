"""Runs the Python program on its standard input where it can do nothing but compute: `sandbox` starts it.

    python -I -S jail.py NONCE SECONDS MEGABYTES < program

Before the program is compiled this process gives away, for good: its limits (setrlimit), every file but Python's own
libraries, to read (Landlock), and every system call but those that computing needs (seccomp), so that there is no
network, no other process to start, trace or signal, and nothing to write to. The verdict goes to what was standard
output: the nonce and "passed", or how the program ended. Needs nothing but the standard library, no privilege, and a
Linux of 5.13 or newer that has Landlock switched on.
"""

import ctypes
import errno
import os
import resource
import struct
import sys
from pathlib import Path

MEBIBYTE = 1 << 20
LIBRARIES = ("/usr/lib", "/lib", "/lib64", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/urandom")

# linux/landlock.h
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Numbers of the system calls, the same on every architecture."""
VERSION_FLAG, PATH_BENEATH = 1, 1
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""ABI -> how many rights over files it knows; newer ones know as many as 5."""
NETWORK, SCOPES = 0b11, 0b11
"""TCP's bind and connect, from ABI 4; abstract sockets and signals, from ABI 6."""

NO_NEW_PRIVILEGES = 38  # prctl
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
"""libseccomp's actions."""
COMPUTING = """
    read readv pread64 write writev lseek close fstat newfstatat stat lstat statx access faccessat faccessat2 readlink
    readlinkat open openat getdents64 getcwd fcntl ioctl dup dup2 dup3 poll ppoll select pselect6
    mmap munmap mremap mprotect madvise brk
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    futex set_robust_list get_robust_list set_tid_address rseq sched_yield sched_getaffinity
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getrandom
    getpid getppid gettid getuid geteuid getgid getegid getpgrp uname sysinfo getrlimit
    exit exit_group
"""


class Unavailable(Exception):
    """The system cannot lock this process in."""


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
    """Leave nothing of the file system but Python's libraries, to read."""
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
        raise Unavailable("the kernel does not take new privileges away")
    _called(libc, RESTRICT_SELF, rules, 0)
    os.close(rules)


def _called(libc: ctypes.CDLL, number: int, *arguments: object) -> int:
    done = int(libc.syscall(number, *arguments))
    if done < 0:
        raise Unavailable(f"Landlock refused ({os.strerror(ctypes.get_errno())})")
    return done


def lock_calls() -> None:
    """Leave no system call but `COMPUTING`; others fail with EPERM."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise Unavailable("libseccomp.so.2 is not installed") from error
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(REFUSE))
    for name in COMPUTING.split():
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0 and library.seccomp_rule_add(rules, ALLOW, number, 0):  # below 0: not of this architecture
            raise Unavailable(f"seccomp takes no rule for {name}")
    if library.seccomp_load(rules):
        raise Unavailable("the kernel takes no seccomp filter")


def main() -> None:
    nonce, seconds, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    text = sys.stdin.read()
    verdict = os.dup(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)

    def say(words: str) -> None:
        os.write(verdict, f"{nonce} {words}"[:1000].encode())

    try:
        limit(seconds, megabytes)
        lock_files()
        lock_calls()
    except Unavailable as error:
        say(f"unavailable {error}")
        return
    try:
        exec(compile(text, "<program>", "exec"), {"__name__": "__main__"})  # noqa: S102  what this is for
    except BaseException as error:  # noqa: BLE001  whatever the program did, this is how it ended
        say(f"failed {type(error).__name__}: {error}")
    else:
        say("passed")


if __name__ == "__main__":
    main()
