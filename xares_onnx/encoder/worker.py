"""A process for a stranger's model, which can be killed.

Before it imports anything else, the child gives up what it does not need (`walls`), and its environment has no tokens.

The parent writes pickled calls to the child's stdin; the child answers on its stdout with msgpack records, never with
pickles, because what runs there is not trusted. Every record is also a sign of life: a child that is silent for longer
than a call's limit is killed, whether it hangs while loading, inside one run, or in a decoder. A child whose parent is
gone reads the end of its stdin and exits.

Not multiprocessing or pebble: their spawned children import the caller's `__main__` again (so that a script without a main
guard would start itself over and over), unpickle what a child sends, and limit whole tasks instead of silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pickle
import queue
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, Self, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from .. import errors
from ..errors import MachineError, ModelError, ModelLimitError, XaresError
from ..progress import Doing, Event, Note, Observer, Progress
from .walls import WALLS, Walls, missing

T = TypeVar("T")
Tell = Callable[["Event | Beat"], None]
_HEADER = struct.Struct("<Q")
_MAX_MESSAGE = 1 << 33

# Otherwise glibc keeps freed waveforms in one arena per thread, and peak memory grows with the number of clips: 1.5x from
# 500 to 5,000, measured; with these it stays flat. Smaller blocks than the threshold are used again without new pages from
# the system, which took a third of the host's time. Other allocators do not read these.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(16 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
# What a child needs of the environment: where libraries and folders are, and what sets threads, allocators and devices.
_ENVIRONMENT = re.compile(
    "(?:PATH|HOME|USER|LANG|LANGUAGE|TZ|TMPDIR|TEMP|TMP|LD_LIBRARY_PATH|LD_PRELOAD|GLIBC_TUNABLES|VIRTUAL_ENV|SYSTEMROOT|WINDIR"
    "|APPDATA|LOCALAPPDATA|USERPROFILE|NUMBER_OF_PROCESSORS"
    "|(?:LC_|PYTHON|DYLD_|XARES_ONNX_|XDG_|MALLOC_|OMP_|GOMP_|KMP_|MKL_|OPENBLAS_|BLIS_|VECLIB_|ORT_|TORCH|PYTORCH_|CUDA|CUDNN_"
    "|CUBLAS_|NVIDIA_|HF_|TRANSFORMERS_|TOKENIZERS_|ROCR_|HIP_|HSA_|COVERAGE_).*)",
    re.IGNORECASE if os.name == "nt" else 0,
)
_SECRET = re.compile("TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL|AUTH|_KEY", re.IGNORECASE)
_DEATH_SECONDS = 5.0  # from the end of a child's records to its own
# Exit codes of a child that asked for more memory than it may have: by its allocator, or by the system.
_OUT_OF_MEMORY = {-signal.SIGABRT, -getattr(signal, "SIGKILL", 9)}
# Exit codes of a child that somebody else ended: a user, a batch system, or Linux for want of memory.
_KILLED = {-signal.SIGTERM, -getattr(signal, "SIGKILL", 9), -getattr(signal, "SIGHUP", 1)}


class KilledError(Exception):
    """The cause of the error of a call whose process somebody else ended: the call may succeed in a new one."""


def was_killed(error: BaseException) -> bool:
    """Whether a call failed because somebody else ended its process."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KilledError):
        cause = cause.__cause__
    return cause is not None


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """A sign of life, and nothing else."""


class _Standing(msgspec.Struct, frozen=True, tag="standing"):
    """The walls around the child, which it says first."""

    walls: tuple[str, ...]


class Array(msgspec.Struct, frozen=True):
    """An array as a worker returns it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> Array:
        return cls(array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes())

    def numpy(self) -> npt.NDArray[Any]:
        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape).copy()


class _Done(msgspec.Struct, frozen=True, tag="done"):
    result: msgspec.Raw


class _Failed(msgspec.Struct, frozen=True, tag="failed"):
    error: str
    message: str
    about: str | None = None


_Message = Progress | Note | Doing | Beat | _Standing | _Done | _Failed
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Message)


class Worker:
    """One child process, which starts with the first call. Calls run one after another.

    Close it, or use it as a context manager:

        with Worker() as worker:
            scan = worker.call(scan_model, path, returns=ModelScan, silence_limit=15.0, observer=ignore)

    `subject` names the process in messages, and `environment` is added to its environment.

    Args:
        walls: What the process may still reach; by default every file, but no network and no other process.
    """

    subject = "the model's process"
    environment: Mapping[str, str] = _ALLOCATOR
    _said: ClassVar[set[str]] = set()  # by all of this process: it is one machine

    def __init__(self, walls: Walls = Walls()) -> None:  # noqa: B008 - it is frozen
        self.walls = walls
        self.standing: tuple[str, ...] | None = None
        """The names of the walls around the child; None before it has started."""
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: queue.Queue[_Message | None] = queue.Queue()
        self._stderr: IO[bytes] | None = None
        self._end: weakref.finalize[..., Worker] | None = None
        self._one_call = threading.Lock()

    def call(
        self, function: Callable[..., T], *arguments: Any, returns: type[T], silence_limit: float | None, observer: Observer
    ) -> T:
        """Run `function(*arguments, tell=…)` in the child.

        Args:
            function: Picklable; it reports events and signs of life to `tell`.
            *arguments: Picklable.
            returns: The type of its result, which msgpack decodes.
            silence_limit: The longest time without any record, in seconds; None for no limit.
            observer: Called with the child's progress and notes.

        Raises:
            ModelLimitError: The child was silent for too long, or ran out of memory.
            ModelError: The child died, or sent what cannot be read. The cause is `KilledError` if somebody else ended it.
            XaresError: As the function raised it.
        """
        payload = pickle.dumps((function, arguments))
        with self._one_call:
            reply = self._reply_to(payload, silence_limit, observer)
        if isinstance(reply, _Failed):
            raise _error(reply)
        return msgspec.msgpack.decode(reply.result, type=returns)

    def _reply_to(self, payload: bytes, silence_limit: float | None, observer: Observer) -> _Done | _Failed:
        if self._process is not None and self._process.poll() is not None:  # ended between two calls
            self.close()
        doing, patience = "waiting for work" if self._process else "starting", 0.0  # more seconds of silence, as it asked
        process = self._process or self._start()
        try:
            assert process.stdin is not None
            with contextlib.suppress(ConnectionError):  # a dead child is met below, by the end of its records
                process.stdin.write(_HEADER.pack(len(payload)) + payload)
                process.stdin.flush()
            while True:
                match self._messages.get(timeout=None if silence_limit is None else silence_limit + patience):
                    case None:
                        raise self._death(doing)
                    case Doing(text, seconds):
                        doing, patience = text, seconds
                    case _Done() | _Failed() as reply:
                        return reply
                    case _Standing(names):
                        self._stand(names, observer)
                    case Progress() | Note() as event:
                        observer(event)
        except queue.Empty:
            self.close()
            seconds = (silence_limit or 0.0) + patience
            raise ModelLimitError(
                f"{self.subject} gave no sign of life for {seconds:.3g} s while {doing} and was stopped",
                about="process",
            ) from None
        except BaseException:  # in the middle of a call: the child's state is unknown
            self.close()
            raise

    def close(self) -> None:
        """Kill the child. Calling again starts a new one."""
        self._process = None
        if self._end is not None:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        _keep_bytecode()
        self._stderr = None if os.environ.get("XARES_ONNX_DEBUG") else tempfile.TemporaryFile()  # noqa: SIM115
        self._messages = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, json.dumps(dataclasses.asdict(self.walls))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**self.environment, **_environment(), "PYTHONPATH": _python_path()},
        )
        assert self._process.stdout is not None
        # Also runs when a worker is garbage-collected, and at exit while the reading thread is alive.
        self._end = weakref.finalize(self, _end, self._process, self._stderr)
        threading.Thread(target=_receive, args=(self._process.stdout, self._messages), daemon=True).start()
        return self._process

    def _stand(self, names: tuple[str, ...], observer: Observer) -> None:
        """Keep the names of the child's walls; the first time that one is missing, say so."""
        self.standing = names
        lacking = [name for name in missing(names, self.walls) if name not in Worker._said]
        Worker._said.update(lacking)
        if lacking:
            what = ", ".join(WALLS[name] for name in lacking)
            observer(Note(f"the system cannot promise of {self.subject}: {what}; run a stranger's model in a container"))

    def _death(self, doing: str) -> XaresError:
        """Why the child's records ended, as an error. `doing` is its last message."""
        assert self._process is not None
        try:
            code = self._process.wait(_DEATH_SECONDS)
        except subprocess.TimeoutExpired:  # it lives, but its records cannot be read
            return ModelError(f"{self.subject} sent a malformed reply while {doing} and was stopped", about="process")
        finally:
            printed = _tail(self._stderr)
            self.close()
        if doing == "starting" and code not in _KILLED:
            return MachineError(f"a worker process could not start: {_last_line(printed) or f'exit code {code}'}")
        fate = f"{self.subject} died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'}) while {doing}"
        error = self._fault(fate, out_of_memory=code in _OUT_OF_MEMORY or b"bad_alloc" in printed)
        if code in _KILLED:
            error.__cause__ = KilledError()
        return error

    def _fault(self, fate: str, *, out_of_memory: bool) -> XaresError:
        """Whose fault the child's death is, as an error."""
        if out_of_memory:
            return ModelLimitError(f"{fate}; it may need more memory than its limit", about="process")
        return ModelError(fate, about="process")


def _end(process: subprocess.Popen[bytes], stderr: IO[bytes] | None) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


@functools.cache
def _keep_bytecode() -> None:
    """Import what a child imports in a process without walls, if that would keep bytecode, which a child cannot. Installers
    such as uv leave that to the first import; without it every child would take 0.6 s longer.
    """
    spec = importlib.util.find_spec("onnxruntime")
    kept = Path(spec.cached) if spec and spec.cached and not sys.dont_write_bytecode else None
    if kept is None or kept.exists() or not os.access(next(path for path in kept.parents if path.exists()), os.W_OK):
        return
    command = [
        sys.executable,
        "-P",
        "-c",
        "import xares_onnx.embedding.embed, xares_onnx.encoder.measuring.taps, onnxruntime, onnx",
    ]
    subprocess.run(
        command, env={**_environment(), "PYTHONPATH": _python_path()}, stdin=subprocess.DEVNULL, capture_output=True
    )


def _python_path() -> str:
    return os.pathsep.join(path for path in sys.path if path)


def _environment() -> dict[str, str]:
    """What of this process's environment a child gets; nothing that looks like a secret."""
    return {name: value for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name) and not _SECRET.search(name)}


def limit_memory(limit: int | None) -> None:
    """Cap this process's address space, on systems that can (POSIX).

    Args:
        limit: In bytes; None lifts the cap.
    """
    _limit("RLIMIT_AS", limit)


def _limit(resource_name: str, limit: int | None) -> None:
    try:
        import resource
    except ImportError:  # not POSIX
        return
    kind = getattr(resource, resource_name)
    _, most = resource.getrlimit(kind)
    if limit is None:
        limit = most
    elif most != resource.RLIM_INFINITY:
        limit = min(limit, most)
    resource.setrlimit(kind, (limit, most))


def _error(failure: _Failed) -> XaresError:
    """The exception that the child raised; of this package's classes alone."""
    kind = getattr(errors, failure.error, None)
    if not (isinstance(kind, type) and issubclass(kind, XaresError)):
        return XaresError(failure.message)
    return kind(failure.message, about=failure.about) if issubclass(kind, ModelError) else kind(failure.message)


def _tail(file: IO[bytes] | None, size: int = 2000) -> bytes:
    """The last bytes of an open file."""
    if file is None or file.closed:
        return b""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - size))
    return file.read()


def _last_line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def _receive(stream: IO[bytes], messages: queue.Queue[_Message | None]) -> None:
    """Parent's thread: records from the child, and None at its end."""
    try:
        while len(header := stream.read(_HEADER.size)) == _HEADER.size:
            (size,) = _HEADER.unpack(header)
            if size > _MAX_MESSAGE or len(data := stream.read(size)) < size:
                break
            messages.put(_decoder.decode(data))
    except (OSError, ValueError, msgspec.DecodeError):
        pass
    messages.put(None)


# The child: the walls before the libraries, some of which start threads.
_START = (
    "import sys, json; from xares_onnx.encoder.walls import Walls, raise_walls; "
    "walls = raise_walls(Walls(**json.loads(sys.argv[1]))); "
    f"from {__name__} import main; main(walls)"
)


def main(walls: Sequence[str]) -> None:
    """The child: take calls until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    _limit("RLIMIT_CORE", 0)  # a crash must not leave gigabytes on the disk
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the records
    lock = threading.Lock()

    def send(message: _Message) -> None:
        data = _encoder.encode(message)
        with lock:
            out.write(_HEADER.pack(len(data)) + data)
            out.flush()

    send(_Standing(tuple(walls)))
    calls: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_take_calls, args=(calls,), daemon=True).start()
    while True:
        try:
            function, arguments = pickle.loads(calls.get())
            result = function(*arguments, tell=send)
            send(_Done(msgspec.Raw(_encoder.encode(result))))
        except XaresError as error:
            send(_Failed(type(error).__name__, str(error), getattr(error, "about", None)))
        except MemoryError:
            send(_Failed("ModelLimitError", "the model's process ran out of the memory it may use"))
        except BaseException:  # SystemExit too is only a failed call
            send(_Failed("XaresError", traceback.format_exc()))


def _take_calls(calls: queue.Queue[bytes]) -> None:
    """Child's thread: calls from the parent. When the parent ends, so does the child, whatever its main thread is doing."""
    stream = sys.stdin.buffer
    while len(header := stream.read(_HEADER.size)) == _HEADER.size:
        (size,) = _HEADER.unpack(header)
        calls.put(stream.read(size))
    os._exit(0)
