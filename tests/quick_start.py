"""Commands without their start-up time: a server has imported their libraries once, and forks for each call.

    with QuickStart(folder) as quick:
        subprocess.run([quick.program("kaggle"), "--version"])

The command itself runs as always: the same code, in a process of its own, with the caller's arguments, environment, folder and
streams. It ends when the caller is killed. The real start is tried elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = [{name!r}, sys.argv[1:], dict(os.environ), os.getcwd()]
socket.send_fds(connection, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
sys.exit(int(connection.recv(16) or 137))
"""


class QuickStart:
    """The server, and programs that ask it. The folder's name must be short, since it holds a socket."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, folder / "socket"

    def __enter__(self) -> QuickStart:
        command, root = [sys.executable, "-m", "tests.quick_start", str(self.address)], Path(__file__).parents[1]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=root)
        while not self.address.exists():
            assert self.process.poll() is None, "the server did not start"
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def program(self, name: str) -> str:
        """The path of `kaggle` or `melfold`."""
        path = self.folder / name
        if not path.exists():
            path.write_text(CLIENT.format(python=sys.executable, address=str(self.address), name=name))
            path.chmod(0o755)
        return str(path)


def serve(address: str) -> None:
    """Import what takes long, then fork for each call, for ever."""
    os.environ |= {"KAGGLE_USERNAME": "nobody", "KAGGLE_KEY": "none", "KAGGLE_API_ENVIRONMENT": "LOCALHOST"}
    os.environ["KAGGLE_CONFIG_DIR"] = os.path.dirname(address)
    import kaggle.cli  # noqa: F401  it reads the environment, so that each call imports it again, but not what it imports

    import melfold.cli.ledger
    import melfold.cli.main
    import melfold.kaggle.standings
    import melfold.kaggle.submit  # noqa: F401

    for module in [module for module in sys.modules if module.partition(".")[0] == "kaggle"]:
        del sys.modules[module]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    while True:
        connection, _ = listener.accept()
        data, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        while not data.endswith(b"\n"):
            data += connection.recv(1 << 20)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            run(connection, streams, *json.loads(data))
        connection.close()
        for stream in streams:
            os.close(stream)


def run(
    connection: socket.socket, streams: list[int], name: str, arguments: list[str], environment: dict[str, str], folder: str
) -> None:
    """Be the command."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), write_through=True) for n in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [name, *arguments]

    def watch() -> None:
        if not connection.recv(1):
            os._exit(137)

    threading.Thread(target=watch, daemon=True).start()
    code: object = 0
    try:
        if name == "kaggle":
            from kaggle.cli import main
        else:
            from melfold.cli.main import main
        main()
    except SystemExit as stop:
        code = stop.code or 0
    with contextlib.suppress(OSError):
        connection.sendall(str(code if isinstance(code, int) else 1).encode())
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(sys.argv[1])
