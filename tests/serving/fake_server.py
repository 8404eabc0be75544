"""Stands in for the server process: says what the real one says, without SGLang. Its way of ending is FAKE_SERVER."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.serving.test_summary import RESOLVED

from idlm_sglang.serving.server import end_with_parent


# Lines of a server that logs faster than its log is looked at: several times what a pipe holds.
TALK = 3_000


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


def main(events: int, argv: list[str]) -> None:
    end_with_parent()
    way = os.environ["FAKE_SERVER"]
    port = int(argv[argv.index("--port") + 1])
    # A worker that outlives its parent unless somebody ends it.
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["FAKE_PIDS"]).write_text(f"{os.getpid()} {worker.pid}")
    with os.fdopen(events, "w") as out:
        if way == "refused":
            json.dump({"refused": "idlm: IDLM_STRIDE=9 is out of range; allowed: less"}, out)
            out.close()
            sys.exit(1)
        json.dump({"summary": RESOLVED | {"host": "127.0.0.1", "port": port}}, out)
    print("[t] Load weight begin.", flush=True)
    if way == "failed":
        print("Traceback (most recent call last):\n  File x\nRuntimeError: no memory left", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "port taken":
        print("[t] ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use", flush=True)
        print("[t] INFO:     Waiting for application shutdown.", flush=True)
        time.sleep(600)
    if way == "stubborn":
        signal.signal(signal.SIGTERM, lambda *_: print("[t] still draining", flush=True))
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    server = http.server.HTTPServer(("127.0.0.1", port), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if way == "talkative":
        time.sleep(1.5)
        for number in range(TALK):
            print(f"[t] line {number} " + "x" * 200, flush=True)
        print("ValueError: said enough", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "crashes":
        time.sleep(1.5)
        print("AttributeError: a worker went away", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
