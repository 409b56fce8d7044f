"""What a model's process gives up before it touches a model: the network, other programs and processes, most files.

A bug in a parser or a kernel that lets a file run code then has little to reach. Linux alone can do this without being root:
Landlock restricts files, seccomp system calls. Both hold for every thread that the process starts later and can never be
taken back, so `raise_walls` is the first thing that a child runs, before any library that starts threads. Where a kernel or
a container refuses one of them, the process runs without it, and the caller is told.

Not a package: what is on the registry wraps one of the two, or compiles. The numbers are from Linux's headers
(`linux/landlock.h`, `linux/seccomp.h`, `asm/unistd.h`), and the same in every version.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

WALLS = {
    "network": "no network",
    "programs": "no other program or process",
    "writing": "no file is written outside the store",
    "reading": "no file is read but the model, the data, the store and libraries",
}
"""What stands, and what that means."""

_PRINTED_BYTES = 64 << 20  # into the file that keeps what a library prints
_FILE_BYTES = 256 << 30  # of a file in the store
_MOST_BESIDE = 10_000  # files beside a model that lies in a home folder


@dataclass(frozen=True)
class Walls:
    """What a process may still reach. A path may be missing, or a link.

    Args:
        model: The file of a model: it is read, and what lies beside it.
        reads: Files and folders that are read too; None for no wall around reading.
        writes: Files and folders that are written to; None for no wall around files at all.
        gpu: Whether it runs a GPU, whose driver needs devices, its own cache, and libraries from anywhere.
    """

    model: str | None = None
    reads: tuple[str, ...] | None = None
    writes: tuple[str, ...] | None = None
    gpu: bool = False


@dataclass(frozen=True)
class _Calls:
    """Numbers of system calls on one architecture, and its name in a filter."""

    architecture: int
    clone: int
    own: tuple[int, ...]  # allowed on this process alone: kill, tgkill
    limits: int  # prlimit64, allowed on this process alone, which may be called 0
    socket: int
    refused: tuple[int, ...] = field(repr=False)


# On every architecture: pidfd_send_signal, io_uring (which opens sockets unseen by a filter), pidfd_open and pidfd_getfd,
# process_madvise, the new mounts, fchmodat2, setxattrat, removexattrat, file_setattr.
_NEW = (424, 425, 426, 427, 434, 438, 440, 428, 429, 430, 432, 442, 452, 463, 466, 469)
_CLONE3 = 435
_CALLS = {
    "x86_64": _Calls(
        architecture=0xC000003E,
        clone=56,
        own=(62, 234),
        limits=302,
        socket=41,
        refused=(
            *(57, 58, 59, 322),  # fork, vfork, execve, execveat
            *(200, 129, 297, 101, 310, 311, 312),  # tkill, the two that queue signals; ptrace, process_vm_*, kcmp
            *(272, 308, 165, 166, 155, 161),  # unshare, setns, mount, umount2, pivot_root, chroot
            *(248, 249, 250, 321, 298, 323, 304),  # the kernel's keys, bpf, perf_event_open, userfaultfd, open_by_handle_at
            *(90, 91, 268, 92, 93, 94, 260),  # what Landlock leaves of files: modes, owners,
            *(188, 189, 190, 197, 198, 199, 132, 235, 261, 280, 133, 259),  # attributes, times, special files
        ),
    ),
    "aarch64": _Calls(
        architecture=0xC00000B7,
        clone=220,
        own=(129, 131),
        limits=261,
        socket=198,
        refused=(
            *(221, 281),
            *(130, 138, 240, 117, 270, 271, 272),
            *(97, 268, 40, 39, 41, 51),
            *(217, 218, 219, 280, 241, 282, 265),
            *(52, 53, 54, 55),
            *(5, 6, 7, 14, 15, 16, 88, 33),
        ),
    ),
}

_EPERM, _ENOSYS = 1, 38
_KEPT = 1 << 1 | 1 << 2 | 1 << 14  # of root's capabilities: files whose modes forbid it, and locked memory
_CAPABILITIES = 0x20080522  # version of the record
_CLONE_THREAD = 0x10000
_AF_UNIX = 1
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # of prctl
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock's system calls

_EXECUTE, _WRITE, _READ, _LIST = 1, 1 << 1, 1 << 2, 1 << 3
_REMOVE, _MAKE_FOLDER, _MAKE_FILE, _REFER, _TRUNCATE, _DEVICE = 1 << 5, 1 << 7, 1 << 8, 1 << 13, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE | _DEVICE
_READING = _READ | _LIST
_CHANGING = _WRITE | _REMOVE | _MAKE_FOLDER | _MAKE_FILE | _REFER | _TRUNCATE
_RIGHTS = ((1, 1 << 13), (2, 1 << 14), (3, 1 << 15), (5, 1 << 16))  # each ABI from the first on handles the bits below

_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/opt", "/nix/store", "/gnu/store", "/proc", "/sys")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero")
_GPU_CACHES = ("~/.nv", "~/.cache/nvidia")


def raise_walls(walls: Walls) -> tuple[str, ...]:
    """Give up what `walls` does not name; the names in `WALLS` of what stands. Only for a process with one thread."""
    _limit_files(_FILE_BYTES if walls.writes is None or walls.writes else _PRINTED_BYTES)
    calls = _CALLS.get(platform.machine())
    if sys.platform != "linux" or calls is None or sys.maxsize < 1 << 32:
        return ()
    libc = ctypes.CDLL(None, use_errno=True)
    # With root's others it would read the memory and the environment of any process.
    libc.capset(struct.pack("<II", _CAPABILITIES, 0), struct.pack("<6I", *_capabilities(libc)))
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return ()
    files = _restrict_files(libc, walls)
    return (*_filter_calls(libc, calls, unix_sockets=walls.gpu), *files)


def missing(standing: Iterable[str], walls: Walls) -> list[str]:
    """The names of the walls that `walls` asks for and that do not stand."""
    unasked = {"reading"} if walls.reads is None or walls.gpu else set()
    unasked |= {"reading", "writing"} if walls.writes is None else set()
    return [name for name in WALLS if name not in unasked and name not in standing]


def _limit_files(size: int) -> None:
    try:
        import resource
    except ImportError:  # not POSIX
        return
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = size if most == resource.RLIM_INFINITY else min(size, most)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _capabilities(libc: ctypes.CDLL) -> list[int]:
    """Those to keep of what the process has: effective, permitted and inheritable, of the lower and the upper 32."""
    present = ctypes.create_string_buffer(24)
    if libc.capget(struct.pack("<II", _CAPABILITIES, 0), present):
        return [0] * 6
    permitted = struct.unpack("<6I", present.raw)[1]
    return [permitted & _KEPT, permitted & _KEPT, 0, 0, 0, 0]


# ---------------------------------------------------------------- system calls


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter_calls(libc: ctypes.CDLL, calls: _Calls, *, unix_sockets: bool) -> tuple[str, ...]:
    program = _program(calls, os.getpid(), unix_sockets=unix_sockets)
    if libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(_Program(len(program) // 8, program)), 0, 0):
        return ()
    return ("network", "programs")


def _program(calls: _Calls, own: int, *, unix_sockets: bool) -> bytes:
    """A filter of system calls in classic BPF: what is refused fails with EPERM, as if the system forbade it."""
    number, architecture, first = 0, 4, 16  # offsets in `struct seccomp_data`; `first`: lower half of the first argument
    equal, at_least, bits = 0x15, 0x35, 0x45  # jump if the loaded value is, is at least, or has one of
    allow, refuse, absent = 0x7FFF0000, 0x00050000 | _EPERM, 0x00050000 | _ENOSYS

    def load(offset: int) -> bytes:
        return struct.pack("<HBBI", 0x20, 0, 0, offset)

    def end(action: int) -> bytes:
        return struct.pack("<HBBI", 0x06, 0, 0, action)

    def unless(jump: int, value: int, skipped: int) -> bytes:  # skips that many instructions if it is not so
        return struct.pack("<HBBI", jump, 0, skipped, value)

    def checked(call: int, *accepted: tuple[int, int]) -> bytes:  # `call` with one of some first arguments alone
        tests = b"".join(unless(jump, value, 1) + end(allow) for jump, value in accepted)
        return unless(equal, call, 2 + len(tests) // 8) + load(first) + tests + end(refuse)

    parts = [load(architecture), struct.pack("<HBBI", equal, 1, 0, calls.architecture), end(refuse), load(number)]
    parts += [unless(at_least, 0x40000000, 1), end(refuse)]  # x32's own numbers
    parts += [unless(equal, _CLONE3, 1), end(absent)]  # its flags lie in memory; libraries then use clone
    parts += [checked(calls.clone, (bits, _CLONE_THREAD))]
    parts += [checked(call, (equal, own)) for call in calls.own]
    parts += [checked(calls.limits, (equal, 0), (equal, own))]
    parts += [checked(calls.socket, *([(equal, _AF_UNIX)] if unix_sockets else []))]
    parts += [unless(equal, call, 1) + end(refuse) for call in (*calls.refused, *_NEW)]
    return b"".join([*parts, end(allow)])


# ---------------------------------------------------------------- files


def landlock_version(libc: ctypes.CDLL) -> int:
    """Of Linux's interface; below 1 if there is none."""
    return int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _restrict_files(libc: ctypes.CDLL, walls: Walls) -> tuple[str, ...]:
    version = landlock_version(libc)
    if walls.writes is None or version < 1:
        return ()
    handled = max(bits for least, bits in _RIGHTS if version >= least) - 1
    free_to_read = walls.reads is None or walls.gpu
    if free_to_read:
        handled &= ~_READING
    if walls.gpu:
        handled &= ~_DEVICE
    # Then the network (ports to bind and to connect to), and what it may reach outside: abstract sockets, signals.
    attributes = struct.pack("<QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    if rules < 0:
        return ()
    try:
        for path, rights in _allowed(walls):
            _allow(libc, rules, path, rights & handled)
        if libc.syscall(_RESTRICT_SELF, rules, 0):
            return ()
    finally:
        os.close(rules)
    return ("writing",) if free_to_read else ("writing", "reading")


def _allow(libc: ctypes.CDLL, rules: int, path: str, rights: int) -> None:
    try:
        opened = os.open(path, getattr(os, "O_PATH", 0) | os.O_CLOEXEC)
    except (OSError, ValueError):  # it is not there
        return
    try:
        if not os.path.isdir(f"/proc/self/fd/{opened}"):
            rights &= _OF_FILES
        if rights:
            libc.syscall(_ADD_RULE, rules, 1, struct.pack("<Qi", rights, opened), 0)
    finally:
        os.close(opened)


def _allowed(walls: Walls) -> Iterator[tuple[str, int]]:
    """Paths, and the rights that the process keeps below each."""
    yield "/dev/null", _READING | _WRITE
    for path in walls.writes or ():
        yield path, _READING | _CHANGING
    if walls.gpu:
        yield "/dev", _READING | _WRITE
        for path in _GPU_CACHES:
            yield os.path.expanduser(path), _READING | _CHANGING
    if walls.reads is None or walls.gpu:
        return
    for path in (*_SYSTEM, *_SYSTEM_FILES, *_libraries()):
        yield path, _READING
    for path in walls.reads:
        yield path, _READING
        for entry in _entries(path):  # shards that lie elsewhere
            if entry.is_symlink():
                yield entry.path, _READING
    if walls.model:
        yield walls.model, _READING
        folder = os.path.dirname(os.path.abspath(walls.model))
        if _holds_home(folder):
            for entry in itertools.islice(_entries(folder), _MOST_BESIDE):
                if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                    yield entry.path, _READING
        else:
            yield folder, _READING


def _libraries() -> Iterator[str]:
    """Python's own folders, and where packages and shared libraries lie."""
    yield from {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    own = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    yield own
    for entry in _entries(own):
        if entry.is_symlink():
            yield entry.path
    for path in (*sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        if path and not _holds_home(path):
            yield path


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError:
        pass


def _holds_home(folder: str) -> bool:
    """Whether a folder is the user's home or holds it, and with it everything that is nobody else's business."""
    home, folder = os.path.realpath(os.path.expanduser("~")), os.path.realpath(folder)
    return os.path.commonpath([home, folder]) == folder
