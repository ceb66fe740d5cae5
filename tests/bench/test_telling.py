"""A benchmark says where it is while it runs, and ends when it is told to, though it was started in the background."""

import os
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = (
    "import telling, time\ntelling.EVERY_SECONDS = 0.1\ntelling.begin()\ntelling.at('round 2 of 3')\ntime.sleep(60)\n"
)


def test_a_line_says_where_it_is_and_ctrl_c_ends_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stderr
    assert process.stderr.readline() == "0:00  round 2 of 3\n"
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
    assert process.returncode == -signal.SIGINT
