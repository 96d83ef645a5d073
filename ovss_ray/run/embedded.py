"""A Ray of this process's own: reached from this machine only, and gone when the process is, however that ends.

Its files lie in a folder of their own; that of a dead driver is removed by whoever starts next. A second process, the
guard, outlives the driver, ends what Ray leaves running, and removes the folder at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ovss_ray.run.own_folders import OwnFolder, folder_of_folders

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 2**20  # pixels never pass through it
LONGEST_SOCKET = len("/session_2026-01-31_12-00-00_000000_4194304/sockets/plasma_store")
SOCKET_LIMIT = 107  # bytes of the path of a Unix socket
END_S = 15.0
NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# Ray's processes are told by the log files that they have open: they change their names and their parents.
_GUARD = """
import os, re, shutil, sys, time
folder = sys.argv[1]
last_words = sys.stdin.buffer.read()
RAYS = re.compile(rb"^ray::|/ray/(core|_private|dashboard|autoscaler)/")
def left():
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if not RAYS.search(file.read()):
                    continue
            opened = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        if any(name.startswith(folder + "/") for name in opened):
            yield int(pid)
for _ in range(50):
    pids = list(left())
    for pid in pids:
        try:
            os.kill(pid, 9)
        except OSError:
            pass
    if not pids:
        break
    time.sleep(0.1)
if b"keep" not in last_words:
    shutil.rmtree(folder, ignore_errors=True)
"""


class EmbeddedRay:
    """Starts Ray in this process.

    Attributes:
        folder: of its sockets and logs.

    Raises:
        ConnectionError, RuntimeError, ValueError, OSError: as `ray.init`.
    """

    def __init__(self) -> None:
        import ray

        self._own = OwnFolder(_root())
        self.folder = self._own.path
        command = [sys.executable, "-I", "-S", "-c", _GUARD, str(self.folder)]
        quiet = subprocess.DEVNULL
        # In a session of its own: what ends the driver's whole group is not for the guard.
        self._guard = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, cwd="/", start_new_session=True
        )
        try:
            with _on_loopback():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(self.folder),
                )
        except BaseException:
            self.close(keep_logs=False)
            raise
        log.info("Ray: its logs are in %s/session_latest/logs", self.folder)

    def close(self, *, keep_logs: bool) -> None:
        """End Ray and remove its folder; what is kept of it goes with the next start."""
        import ray

        ray.shutdown()
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError):  # somebody has ended the guard: the next start sweeps
            self._guard.stdin.write(b"keep" if keep_logs else b"remove")
            self._guard.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guard.wait(END_S)
        self._own.leave()
        if keep_logs:
            log.warning("workers died: Ray's logs are kept in %s until the next start", self.folder)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """All ports on the loopback interface, as Ray does where it does not expect a cluster (on macOS and Windows).

    An address that is passed to it would not do: it replaces 127.0.0.1 by the address in the network.
    """
    from ray._private import ray_constants

    variable, constant = os.environ.get(NO_CLUSTER), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[NO_CLUSTER], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        os.environ.pop(NO_CLUSTER)
        if variable is not None:
            os.environ[NO_CLUSTER] = variable


def _root() -> Path:
    """The folder of folders; its path is short enough for the names of Ray's sockets."""
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    driver = len(f"/ovss-ray-{os.getuid()}/4194304-abcdefgh")
    if len(os.fsencode(base)) + driver + LONGEST_SOCKET > SOCKET_LIMIT:
        base = "/tmp"
    return folder_of_folders(Path(base))
