"""Runs Python programs as `python program.py` would, in forks of a process that has imported the large libraries.

Importing torch and transformers takes seconds, the programs of a page that run at small size take less. `terminal.py`
starts this file and puts CLIENT on the PATH as `python`. Only libraries are imported beforehand, never this
repository's code: every program imports that from the folder that it lies in.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing.process
import os
import signal
import socket
import sys

# Not wandb, mujoco, metaworld or bitsandbytes: they read the environment, or look for devices, when they are imported.
LIBRARIES = (
    "torch.distributed",
    "torch.utils.data",
    "pyarrow.parquet",
    "matplotlib.figure",
    "transformers.models.auto.modeling_auto",
    "transformers.models.paligemma.modeling_paligemma",
    "transformers.models.gemma.modeling_gemma",
    "transformers.models.siglip.modeling_siglip",
    "transformers.models.gemma.tokenization_gemma",
    "websockets.sync.client",
    "av",
)

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    socket.send_fds(connection, [b"x"], [0, 1, 2])
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    connection.sendall(len(request).to_bytes(8) + request)
    pid = int.from_bytes(connection.recv(8))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    status = int.from_bytes(connection.recv(8), signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def wait_for_a_program(address: str) -> str:
    """Serve requests for ever; returns, in a process of its own for each request, the program that it shall become."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # those that have ended
                    pass
            if os.fork() == 0:
                listener.close()
                return start_program(connection)
            connection.close()


def start_program(connection: socket.socket) -> str:
    """Fork again: this process reports how the program ended, the other one returns to become it."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    arguments, folder, environment = json.loads(receive(connection, int.from_bytes(receive(connection, 8))))
    pid = os.fork()
    if pid:
        for descriptor in (0, 1, 2, *descriptors):
            os.close(descriptor)
        connection.sendall(pid.to_bytes(8))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(status.to_bytes(8, signed=True))
        os._exit(0)
    connection.close()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    multiprocessing.process.ORIGINAL_DIR = folder  # from where spawned processes look for the program
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    return arguments[0]


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes."""
    found = b""
    while len(found) < size:
        found += connection.recv(size - len(found))
    return found


def become(program: str) -> None:
    """Run a file as the main module: the one that exists, since pickle finds no other."""
    main = vars(sys.modules["__main__"])
    with open(program, "rb") as file:
        code = compile(file.read(), program, "exec")
    for name in [name for name in main if not name.startswith("__")]:
        del main[name]
    main.update(__file__=program, __doc__=None)
    exec(code, main)


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    del sys.path[0]  # this folder
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # so that no fork copies what it only looks through
    program = wait_for_a_program(sys.argv[1])
    sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
    become(program)


if __name__ == "__main__":
    main()
