"""What a model would try if a bug let it run code. Each runs in the worker, and returns if it got through."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xares_onnx.errors import ClipError

LIBC = ctypes.CDLL(None, use_errno=True)


def attempt(name: str, *arguments: Any, tell: Any) -> str:
    """ "escaped", or the name of the error that stopped it."""
    try:
        globals()[name](*arguments)
    except OSError as error:
        return type(error).__name__
    return "escaped"


def attempt_in_thread(name: str, *arguments: Any, tell: Any) -> str:
    """The same from a thread that started behind the walls."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(attempt, name, *arguments, tell=tell).result()


def called(result: int) -> None:
    """Raise `OSError` for a system call that failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ---------------------------------------------------------------- network


def tcp(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def udp() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"secret", ("127.0.0.1", 9))


def name_server() -> None:
    socket.getaddrinfo("localhost", 80)
    socket.socket(socket.AF_INET6).close()


def unix_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def netlink() -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()


def io_uring() -> None:
    called(LIBC.syscall(425, 8, ctypes.create_string_buffer(120)))


# ---------------------------------------------------------------- programs and processes


def run_program() -> None:
    subprocess.run(["/bin/true"], check=True)


def become_program() -> None:
    os.execv("/bin/true", ["true"])


def spawn() -> None:
    os.posix_spawn("/bin/true", ["true"], {})


def fork() -> None:
    if not os.fork():
        os._exit(0)


def clone_by_hand() -> None:
    process = LIBC.syscall({"x86_64": 56, "aarch64": 220}[os.uname().machine], signal.SIGCHLD, 0, 0, 0, 0)
    if not process:
        os._exit(0)
    called(process)


def fork_by_hand() -> None:
    numbers = {"x86_64": (57, 58)}.get(os.uname().machine, (220,))  # fork, vfork, or clone with no flag
    for number in numbers:
        process = LIBC.syscall(number, 0, 0, 0, 0, 0)
        if not process:
            os._exit(0)
        if process > 0:
            return
    called(process)


def signal_parent() -> None:
    os.kill(os.getppid(), 0)


def signal_group() -> None:
    os.kill(0, 0)


def signal_everyone() -> None:
    os.kill(-1, 0)


def limit_parent() -> None:
    import resource

    resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)


def trace_parent() -> None:
    called(LIBC.ptrace(0x4206, os.getppid(), 0, 0))  # PTRACE_SEIZE


def read_parent_memory() -> None:
    with open(f"/proc/{os.getppid()}/mem", "rb") as memory:
        memory.read(0)


def read_parent_environment() -> None:
    Path(f"/proc/{os.getppid()}/environ").read_bytes()


def take_parent_descriptor() -> None:
    called(LIBC.syscall(434, os.getppid(), 0))  # pidfd_open


def new_namespace() -> None:
    called(LIBC.unshare(0x10000000))  # CLONE_NEWUSER


def keyring() -> None:
    called(LIBC.syscall({"x86_64": 250, "aarch64": 219}[os.uname().machine], 0, -3, 0))


# ---------------------------------------------------------------- files


def write(path: str) -> None:
    Path(path).write_text("planted")


def append(path: str) -> None:
    with open(path, "a") as file:
        file.write("planted")


def make_folder(path: str) -> None:
    Path(path).mkdir()


def remove(path: str) -> None:
    Path(path).unlink()


def empty(path: str) -> None:
    os.truncate(path, 0)


def rename(source: str, target: str) -> None:
    os.rename(source, target)


def hard_link(source: str, target: str) -> None:
    os.link(source, target)


def link(source: str, target: str) -> None:
    os.symlink(source, target)


def pipe(path: str) -> None:
    os.mkfifo(path)


def mode(path: str) -> None:
    os.chmod(path, 0o777)


def owner(path: str) -> None:
    os.chown(path, os.getuid(), os.getgid())


def times(path: str) -> None:
    os.utime(path, (0, 0))


def attribute(path: str) -> None:
    os.setxattr(path, "user.planted", b"x")


def read(path: str) -> None:
    Path(path).read_bytes()


def map_file(path: str) -> None:
    with open(path, "rb") as file:
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ).close()


def list_folder(path: str) -> None:
    os.listdir(path)


# ---------------------------------------------------------------- what honest work needs


def environment(*, tell: Any) -> dict[str, str]:
    return {**dict(os.environ), **{"/proc": Path("/proc/self/environ").read_text()}}


def limits(*, tell: Any) -> dict[str, int]:
    import resource

    return {name: resource.getrlimit(getattr(resource, name))[0] for name in ("RLIMIT_CORE", "RLIMIT_FSIZE")}


def store(folder: str) -> None:
    """Make a folder, write, sync, rename, read, remove: as a store does."""
    shard = Path(folder) / "ab"
    shard.mkdir()
    (shard / "x.part").write_bytes(b"longer than embeddings")
    (shard / "x.part").write_bytes(b"embeddings")
    os.replace(shard / "x.part", shard / "x.safetensors")
    assert (shard / "x.safetensors").read_bytes() == b"embeddings"
    (shard / "x.safetensors").unlink()


def nothing() -> None:
    os.kill(os.getpid(), 0)
    Path("/dev/null").write_bytes(b"")


# ---------------------------------------------------------------- decoders


@dataclass
class Length:
    """What a decoder gives for a clip."""

    characters: int


def decoded(name: str) -> Length:
    """A clip's length; some names are those of clips that a decoder does not survive."""
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "end":
        os._exit(0)
    if name == "memory":
        bytearray(64 << 30)
    if name == "unreadable":
        raise ClipError("it cannot be read")
    return Length(len(name))
