"""The isolation of a rehearsed kernel: its own file tree, no network, and a watch over both.

Run as a script inside fresh user, network and mount namespaces; `WATCH` is the `sitecustomize.py` of the kernel's Python.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

WATCH = '''"""Records every use of the network and every write where none is allowed, in this Python and in those it starts."""
import os
import re
import socket
import sys

_LOG, _REFUSE = os.environ["MELFOLD_WATCH"], os.environ.get("MELFOLD_REFUSE")
_INPUTS = os.environ["MELFOLD_INPUTS"].split(os.pathsep)
_WRITABLE = [os.path.realpath(path) for path in os.environ["MELFOLD_WRITABLE"].split(os.pathsep)]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LOCAL = {None, "", "localhost", "127.0.0.1", "::1", b"localhost", socket.gethostname()}
_CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink", "os.utime"}


def _record(text):
    file = os.open(_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (text + "\\n").encode())
    os.close(file)


def _watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and args[1] is not None:
        _used(event, args[1][0] if isinstance(args[1], tuple) else None)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        _used(event, args[0])
    elif event == "open":
        path, mode, flags = args
        if isinstance(path, (str, bytes)) and isinstance(flags, int):
            if flags & _WRITES:
                _written(path, "opened for writing")
            elif _REFUSE and re.fullmatch(r"/proc/\\d+/environ", os.fsdecode(path)):
                raise PermissionError(13, "Permission denied", path)
    elif event in _CHANGES:
        for path in args[1:2] if event == "os.symlink" else args[: 2 if event in ("os.rename", "os.link") else 1]:
            if isinstance(path, (str, bytes)):
                _written(path, event)


def _used(event, where):
    if where not in _LOCAL and not (isinstance(where, str) and where.startswith("127.")):
        _record(f"network: {event} {where}")
        if _REFUSE:
            raise OSError(101, "Network is unreachable")


def _below(path, tops):
    return any(path == top or path.startswith(top + os.sep) for top in tops)


def _written(path, what):
    full = os.path.abspath(os.fsdecode(path))
    if _below(full, _INPUTS):
        _record(f"inputs: {full} ({what})")
    elif _REFUSE and full != _LOG and not _below(os.path.realpath(full), _WRITABLE):
        _record(f"outside: {full} ({what})")
    else:
        return
    if _REFUSE:
        raise OSError(30, "Read-only file system", full)


sys.addaudithook(_watch)
'''

_LIBC = ctypes.CDLL(None, use_errno=True)
_BIND, _REC, _AT_RECURSIVE, _ATTR_READ_ONLY, _SYS_MOUNT_SETATTR = 4096, 16384, 0x8000, 1, 442


def run_inside(spec: dict[str, Any]) -> int:
    """Build the file tree of `spec`, read-only but for some folders, and run its command there. Returns: its exit code.

    `spec`: `folder` (it gets the tree in `new`, and in `counters` the number of packets without a route: a kernel cannot hide
    them by ignoring the error), `binds` ([source, target, read-only]), `argv`, `env`, `cwd`.
    """
    root = Path(spec["folder"], "new")
    root.mkdir()
    _mount("tmpfs", root, "tmpfs", 0)
    for entry in sorted(os.listdir("/")):
        if entry not in ("kaggle", "tmp", "proc"):
            _bind(Path("/") / entry, root / entry)
    (root / "proc").mkdir()
    _mount("proc", root / "proc", "proc", 0)  # it shows the kernel's own processes alone
    for source, target, _ in spec["binds"]:
        _bind(Path(source), root / target.lstrip("/"))
    _make_read_only(root)
    for _, target, read_only in spec["binds"]:
        if not read_only:
            _make_read_only(root / target.lstrip("/"), undo=True)
    _mount("tmpfs", root / "dev" / "shm", "tmpfs", 0)
    _loopback_up()
    before = _no_route()
    pid = os.fork()
    if pid == 0:
        os.chroot(root)
        os.chdir(spec["cwd"])
        os.execve(spec["argv"][0], spec["argv"], spec["env"])
    _, status = os.waitpid(pid, 0)
    Path(spec["folder"], "counters").write_text(str(_no_route() - before))
    return os.waitstatus_to_exitcode(status)


def command(spec: dict[str, Any], folder: Path) -> list[str]:
    """The command that runs `spec` in namespaces of its own; the folder is for its tree."""
    (folder / "spec.json").write_text(json.dumps(spec | {"folder": str(folder)}))
    return [*UNSHARE, sys.executable, __file__, str(folder / "spec.json")]


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this system allows all of this to a user. Tried once, with a command that does nothing."""
    with tempfile.TemporaryDirectory(prefix="melfold-sandbox-") as folder:
        spec: dict[str, Any] = {"binds": [[folder, "/tmp", True]], "argv": ["/bin/sh", "-c", "test ! -w /tmp"], "cwd": "/tmp"}
        spec["env"] = {"PATH": os.environ.get("PATH", "")}
        try:
            return subprocess.run(command(spec, Path(folder)), capture_output=True, timeout=20).returncode == 0
        except (OSError, subprocess.SubprocessError):
            return False


def wait(process: subprocess.Popen[bytes], limit: float) -> tuple[float, bool]:
    """Wait for a process. Returns: the peak memory of its session, MiB; whether it exceeded its limit."""
    started, peak = time.monotonic(), 0.0
    while process.poll() is None:
        peak = max(peak, _memory_mib(process.pid))
        if time.monotonic() - started > limit:
            return peak, True
        time.sleep(0.2)
    return peak, False


def _memory_mib(session: int) -> float:
    pages = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):  # it has ended meanwhile
            if int((process / "stat").read_text().rsplit(")", 1)[1].split()[3]) == session:
                pages += int((process / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


UNSHARE = ["unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]


def _mount(source: str | Path, target: Path, kind: str | None, flags: int) -> None:
    encoded = kind.encode() if kind else None
    _check(_LIBC.mount(str(source).encode(), str(target).encode(), encoded, ctypes.c_ulong(flags), None), target)


def _bind(source: Path, target: Path) -> None:
    if source.is_symlink() and len(source.parts) == 2:  # /bin -> usr/bin
        target.symlink_to(os.readlink(source))
        return
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    _mount(source, target, None, _BIND | _REC)


def _make_read_only(target: Path, *, undo: bool = False) -> None:
    """Make a mount and all below it read-only, or one of them writable again."""
    attributes = struct.pack("QQQQ", *((0, _ATTR_READ_ONLY) if undo else (_ATTR_READ_ONLY, 0)), 0, 0)
    recursive = 0 if undo else _AT_RECURSIVE
    arguments = (-1, str(target).encode(), recursive, attributes, ctypes.c_size_t(len(attributes)))
    _check(_LIBC.syscall(_SYS_MOUNT_SETATTR, *arguments), target)


def _check(result: int, target: Path) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        name = b"lo"
        request = struct.pack("16sH14s", name, 0, b"")
        flags = struct.unpack("16sH14s", fcntl.ioctl(sock, 0x8913, request))[1]  # SIOCGIFFLAGS
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH14s", name, flags | 1, b""))  # SIOCSIFFLAGS, IFF_UP


def _no_route() -> int:
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Ip:")]
    six = Path("/proc/net/snmp6")
    counts = dict(zip(*lines, strict=True)) | (dict(map(str.split, six.read_text().splitlines())) if six.exists() else {})
    return int(counts["OutNoRoutes"]) + int(counts.get("Ip6OutNoRoutes", 0))


if __name__ == "__main__":
    sys.exit(run_inside(json.loads(Path(sys.argv[1]).read_text())))
