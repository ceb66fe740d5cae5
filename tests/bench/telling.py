"""What every benchmark begins with: it says where it is every half minute, and Ctrl-C ends it however it began."""

import signal
import sys
import threading
import time

EVERY_SECONDS = 30.0


class Whereabouts:
    """What the benchmark is at, told in a line every so often, on a terminal and in a log alike."""

    def __init__(self) -> None:
        self._place, self._started = "starting", time.monotonic()

    def begin(self) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background commands ignore it
        threading.Thread(target=self._tell, daemon=True).start()

    def at(self, place: str) -> None:
        self._place = place

    def _tell(self) -> None:
        while True:
            time.sleep(EVERY_SECONDS)
            minutes, seconds = divmod(round(time.monotonic() - self._started), 60)
            print(f"{minutes}:{seconds:02d}  {self._place}", file=sys.stderr, flush=True)


_whereabouts = Whereabouts()
begin, at = _whereabouts.begin, _whereabouts.at
