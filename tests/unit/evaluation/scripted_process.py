"""A process for tests of `Worker`: it does what each request asks for. Run as a module."""

from __future__ import annotations

import json
import os
import signal
import sys

for line in sys.stdin:
    request = json.loads(line)
    if "signal" in request:
        os.kill(os.getpid(), signal.Signals[request["signal"]])
    if "message" in request:
        sys.stderr.write(f"{request['message']}\n")
        sys.exit(1)
    sys.stdout.write(json.dumps({"job": json.loads(sys.argv[1]), **request}) + "\n")
    sys.stdout.flush()
