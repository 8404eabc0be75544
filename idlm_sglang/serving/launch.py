"""Run the server as a child: start it, tell how far it is, hand signals on, leave nothing behind.

The child leads a process group of its own, so that Ctrl-C reaches it once, as an orderly stop, and so that everything
it started can be ended with it. This process may be PID 1 of a container.
"""

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from idlm_sglang.config import SettingError
from idlm_sglang.serving import summary
from idlm_sglang.serving.options import Launch, default_log_file
from idlm_sglang.serving.ports import check_port
from idlm_sglang.serving.progress import Display, LogReader

SERVER_MODULE = "idlm_sglang.serving.server"
_POLL = 0.25  # seconds between looks at the child while it starts
_LOG_PIECE = 65536  # bytes of the log read at a time: what the pipe holds
_LOG_INTERVAL = 0.1  # seconds between looks at the log of a server that answers: one for each line would take its processors' time
_HEALTH_INTERVAL = 1.0  # seconds between requests to /health, each of which the server logs
_HEALTH_TIMEOUT = 5.0  # seconds; SGLang's answer to /health takes a generated token and up to a second of its own
_SWEEP_TIMEOUT = 10.0  # seconds for killed processes to be gone
_SAME_STOP = 1.0  # seconds in which a second signal is the same wish: make and timeout pass on what the group got, too
# Where the detokenizer dies, SGLang waits a minute for CUDA core dumps, its clients on the line, whether CUDA was told to write any or not.
_NO_DUMP = {} if os.environ.get("CUDA_ENABLE_USER_TRIGGERED_COREDUMP") == "1" else {"SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve(launch: Launch) -> int:
    """Start the server, wait for its end, return the exit code for `idlm serve`."""
    check_port(launch.host, launch.port)
    launch, log = _open_log(launch)
    with log:
        return Server(launch, log).run()


def _open_log(launch: Launch) -> tuple[Launch, BinaryIO]:
    """Where SGLang's output goes: standard error, or a file (the one of the last run is kept beside it)."""
    if launch.verbose:
        return launch, os.fdopen(os.dup(sys.stderr.fileno()), "wb", buffering=0)
    path = (launch.log_file or default_log_file(launch.port)).expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if launch.log_file is None and path.exists():
            path.replace(path.with_suffix(".previous.log"))
        log = Path.open(path, "wb", buffering=0)
    except OSError as error:
        raise SettingError(f"--log-file {path} cannot be written ({error.strerror}); allowed: a writable path, or --verbose") from None
    return replace(launch, log_file=path), log


class Server:
    """The child process and what is known about it."""

    def __init__(self, launch: Launch, log: BinaryIO):
        self._launch = launch
        self._log = log
        self._reader = LogReader()
        # With the log on the same terminal an updating line would be torn to pieces.
        self._display = Display(sys.stdout, live=not launch.verbose)
        self._resolved: dict[str, Any] | None = None
        self._refused: str | None = None
        self._stopping = 0  # the signal that asked for the end
        self._stop_time = 0.0
        self._forced = False
        self._ready = False
        self._ended = threading.Event()

    def run(self) -> int:
        self._display.say(f"idlm: serving {self._launch.model} on {self._launch.address}; {summary.versions()}")
        events_read, events_write = os.pipe()
        environ = _NO_DUMP | os.environ | self._launch.environ | {"PYTHONUNBUFFERED": "1"}
        # -P: the directory this runs in stays off sys.path, where it could shadow a library.
        command = [sys.executable, "-P", "-m", SERVER_MODULE, str(events_write), *self._launch.argv]
        # Blocked until the handlers stand: a signal in between would end us and leave the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
                pass_fds=(events_write,),
                preexec_fn=_unblock,
            )
            for number in _STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    signal.signal(number, self._stop)
        finally:
            _unblock()
        os.close(events_write)
        copier = threading.Thread(target=self._copy_log, daemon=True)
        events = threading.Thread(target=self._read_events, args=(events_read,), daemon=True)
        copier.start()
        events.start()
        try:
            self._wait_until_ready(events)
            code = self._process.wait()
        finally:
            self._ended.set()
            _end_group(self._process)
        copier.join(timeout=5)
        events.join(timeout=5)
        return self._farewell(code)

    def _copy_log(self) -> None:
        pipe = self._process.stdout
        while piece := os.read(pipe.fileno(), _LOG_PIECE):
            self._reader.feed(piece)
            with suppress(OSError):  # a full disk must not stop the server
                self._log.write(piece)
            if self._ready and len(piece) < _LOG_PIECE:
                self._ended.wait(_LOG_INTERVAL)

    def _read_events(self, descriptor: int) -> None:
        with os.fdopen(descriptor) as events:
            text = events.read()
        if text:
            event = json.loads(text)
            self._refused = event.get("refused")
            self._resolved = event.get("summary")

    def _wait_until_ready(self, events: threading.Thread) -> None:
        """Show the start's progress until the server answers, it ends, or its end is asked for."""
        told, asked = False, 0.0
        while self._process.poll() is None and not self._stopping:
            if self._resolved is not None and not told:
                told = True
                self._display.say(summary.text(self._launch, self._resolved))
            if told and time.monotonic() - asked >= _HEALTH_INTERVAL:
                asked = time.monotonic()
                self._ready = self._healthy()
            if self._reader.port_taken:
                self._refused = f"idlm: --port {self._launch.port} was taken by another program during the start; allowed: a free port"
                _signal_group(self._process, signal.SIGKILL)
                return
            if self._ready:
                self._reader.started()
                url = summary.base_url(self._launch, self._resolved)
                self._display.say(f"idlm: ready after {self._display.elapsed:.0f} s at {url}/v1; Ctrl-C ends it")
                self._display.say(f"  {summary.curl(self._launch, self._resolved)}")
                return
            self._display.update(self._reader.stage)
            time.sleep(_POLL)

    def _healthy(self) -> bool:
        url = f"{summary.base_url(self._launch, self._resolved)}/health"
        # Our own server on our own machine: its certificate names another host.
        unverified = ssl._create_unverified_context() if self._resolved["tls"] else None
        # A proxy from the environment has no business here.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified))
        try:
            with opener.open(url, timeout=_HEALTH_TIMEOUT) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def _stop(self, number: int, frame: Any) -> None:
        """First signal: the server finishes what it is doing. A later one: it is ended at once."""
        if self._stopping:
            if time.monotonic() - self._stop_time > _SAME_STOP:
                self._forced = True
                _signal_group(self._process, signal.SIGKILL)
            return
        self._stopping, self._stop_time = number, time.monotonic()
        self._process.send_signal(signal.SIGTERM)

    def _farewell(self, code: int) -> int:
        """Say how it ended; the exit code of the command."""
        if self._stopping:
            name = signal.Signals(self._stopping).name
            how = " at once" if self._forced else "" if self._ready else " before it was ready"
            self._display.say(f"idlm: stopped{how} ({name})")
            return 0 if self._ready and not self._forced else 128 + self._stopping
        self._display.clear()
        reason = self._refused or self._reader.failure()
        line = reason if reason and reason.startswith("idlm: ") else f"idlm: the server ended: {reason or 'it gave no reason'}"
        print(self._launch.in_typed_words(line), file=sys.stderr, flush=True)
        if self._refused is None:
            where = "its log is above" if self._launch.log_file is None else f"its log is in {self._launch.log_file}"
            print(f"  exit code {code}; {where}", file=sys.stderr, flush=True)
        if code > 0:
            return code
        # SGLang ends itself with SIGKILL when a worker fails. Without a reason in the log it was someone else's.
        return 1 if reason else 128 - code


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def _signal_group(process: subprocess.Popen, number: int) -> bool:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS, for a group of zombies
        return False
    return True


def _end_group(process: subprocess.Popen) -> None:
    """Kill what the server left of its process group, and wait until it is gone."""
    if not _signal_group(process, signal.SIGKILL):
        return
    deadline = time.monotonic() + _SWEEP_TIMEOUT
    while _signal_group(process, 0) and time.monotonic() < deadline:
        # As PID 1 the orphans are ours to reap; elsewhere there is nothing to wait for.
        with suppress(ChildProcessError):
            os.waitpid(-process.pid, os.WNOHANG)
        time.sleep(0.05)
