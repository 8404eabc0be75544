"""The server as a child process: its signals, its exit code, and that nothing of it is left. A fake stands in for SGLang."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.serving.fake_server import TALK

from idlm_sglang.serving.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
import signal
import sys
# Tests may run under nohup or in the background, which ignore these; a child inherits that.
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from idlm_sglang.serving import cli, launch
launch.SERVER_MODULE = "tests.serving.fake_server"
sys.exit(cli.main(["serve", *sys.argv[1:]]))
"""


class Command:
    """`idlm serve` with the fake server, its output collected in a file."""

    def __init__(self, tmp_path: Path, way: str, *words: str):
        self.pids, self.output = tmp_path / "pids", tmp_path / "output"
        environ = os.environ | {
            "FAKE_SERVER": way,
            "FAKE_PIDS": str(self.pids),
            "PYTHONPATH": str(ROOT),  # where -P finds the fake
        }
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "--port", str(free_port()), *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environ,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.output.read_text()

    def until(self, text: str) -> None:
        deadline = time.monotonic() + 20
        while text not in self.text():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def left(self) -> list[int]:
        """Pids of the server and its worker that are still running."""
        pids = [int(p) for p in self.pids.read_text().split()]
        return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def start(tmp_path):
    commands = []

    def begin(way: str, *words: str) -> Command:
        commands.append(Command(tmp_path, way, *words))
        return commands[-1]

    yield begin
    for command in commands:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()
        for pid in command.left():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_server_and_workers_in_order(start, number):
    command = start("orderly")
    command.until("idlm: ready after")
    assert "curl -sS http://127.0.0.1:" in command.text()
    command.process.send_signal(number)
    assert command.process.wait(timeout=10) == 0
    assert f"idlm: stopped ({number.name})" in command.text()
    assert command.left() == []


def test_the_same_signal_passed_on_twice_is_one_wish_and_a_later_one_ends_it_at_once(start):
    command = start("stubborn")
    command.until("idlm: ready after")
    command.process.send_signal(signal.SIGTERM)
    command.process.send_signal(signal.SIGTERM)
    command.until("still draining")
    time.sleep(1.2)
    assert command.process.poll() is None and len(command.left()) == 2
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(timeout=10) == 128 + signal.SIGTERM
    assert "idlm: stopped at once (SIGTERM)" in command.text()
    assert command.left() == []


def test_a_server_that_cannot_start_ends_with_its_reason_and_a_code(start):
    command = start("failed")
    assert command.process.wait(timeout=10) == 1
    assert "idlm: the server ended: RuntimeError: no memory left" in command.text()
    assert command.left() == []


def test_a_port_taken_during_the_start_ends_it_in_one_line(start):
    """SGLang would wait two minutes for an answer from the port."""
    command = start("port taken")
    assert command.process.wait(timeout=10) == 1
    assert re.search(r"idlm: --port \d+ was taken by another program during the start; allowed: a free port$", command.text().strip())
    assert command.left() == []


def test_a_server_that_fails_later_does_so_too(start):
    command = start("crashes")
    command.until("idlm: ready after")
    assert command.process.wait(timeout=10) == 1
    assert "idlm: the server ended: AttributeError: a worker went away" in command.text()
    assert command.left() == []


def test_a_refusal_is_one_line_in_the_words_that_were_typed(start):
    command = start("refused", "--stride", "9")
    assert command.process.wait(timeout=10) == 1
    assert command.text().splitlines()[-1] == "idlm: --stride=9 is out of range; allowed: less"
    assert "Traceback" not in command.text()


def test_a_server_whose_command_is_killed_ends_by_itself(start):
    command = start("orderly")
    command.until("idlm: ready after")
    server = int(command.pids.read_text().split()[0])
    command.process.kill()
    command.process.wait()
    deadline = time.monotonic() + 10
    while server in command.left():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_log_goes_to_a_file_that_is_named_and_the_terminal_stays_quiet(start, tmp_path):
    log = tmp_path / "logs" / "server.log"
    command = start("orderly", "--log-file", str(log))
    command.until("idlm: ready after")
    assert f"log          {log}" in command.text() and "Load weight begin" not in command.text()
    assert "Load weight begin" in log.read_text()


def test_a_busy_log_is_whole_up_to_the_reason_of_the_end(start, tmp_path):
    log = tmp_path / "server.log"
    command = start("talkative", "--log-file", str(log))
    command.until("idlm: ready after")
    assert command.process.wait(timeout=20) == 1
    assert "idlm: the server ended: ValueError: said enough" in command.text()
    lines = log.read_text().splitlines()
    assert [int(line.split()[2]) for line in lines if line.startswith("[t] line ")] == list(range(TALK))


def test_a_log_file_that_cannot_be_written_is_refused(start):
    command = start("orderly", "--log-file", "/proc/nothing/server.log")
    assert command.process.wait(timeout=10) == 1
    assert command.text().startswith("idlm: --log-file /proc/nothing/server.log cannot be written (")
    command.pids.write_text("")


@pytest.mark.parametrize("asked, wanted", [({}, "0"), ({"CUDA_ENABLE_USER_TRIGGERED_COREDUMP": "1"}, None), ({"SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "1"}, "1")])
def test_a_server_that_ends_itself_waits_for_a_core_dump_only_where_one_was_asked_for(start, monkeypatch, asked, wanted):
    """SGLang's clients would wait for a minute with it."""
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    command = start("orderly")
    command.until("idlm: ready after")
    server = psutil.Process(int(command.pids.read_text().split()[0]))
    assert server.environ().get("SGLANG_CUDA_COREDUMP_BEFORE_CRASH") == wanted
