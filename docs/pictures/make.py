"""The pictures of the documentation, from a real run: `make pictures` (as long as `make demo`; needs chromium).

    python docs/pictures/make.py [--folder .demo/pictures]

watch.svg   what `cgd watch` shows while the quick start trains
report.png  the top of the report that the run ends with

The quick start runs from its beginning, in a folder of its own, as `make demo` runs it.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from cgd_cli.table import table

HERE = Path(__file__).parent
KUBECTL = Path(sys.executable).parent / "kubectl"
WIDTH, HEIGHT = 1200, 1500
SHOWN = "train-cgd"
"""The picture is taken while this stage runs: most of the others have ended, and some have not begun."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(".demo/pictures"))
    folder = parser.parse_args().folder.resolve()
    chromium = shutil.which("chromium") or sys.exit("chromium is not on the PATH")
    shutil.rmtree(folder, ignore_errors=True)
    with subprocess.Popen([sys.executable, "-m", "cgd_local", "--folder", str(folder)]) as demo:
        try:
            draw(until_shown(demo, folder / "cluster/kubeconfig"), HERE / "watch.svg")
            if demo.wait():
                sys.exit("the quick start has failed")
        finally:
            demo.terminate()
            subprocess.run([sys.executable, "-m", "cgd_local", "down", "--folder", str(folder)], check=True)
    (page,) = folder.glob("runs/*/report.html")
    photograph(chromium, page, HERE / "report.png")
    for picture in ("watch.svg", "report.png"):
        print(f"{HERE / picture}: {(HERE / picture).stat().st_size:,} bytes")


def until_shown(demo: "subprocess.Popen[bytes]", kubeconfig: Path) -> dict[str, Any]:
    """The run as the API server has it once the stage shows progress."""
    command = [KUBECTL, "get", "cgd", "quickstart", "-o", "json"]
    while demo.poll() is None:
        time.sleep(0.5)
        answer = subprocess.run(
            command, env={**os.environ, "KUBECONFIG": str(kubeconfig)}, capture_output=True, text=True, check=False
        )
        run: dict[str, Any] = json.loads(answer.stdout) if answer.returncode == 0 else {}
        for stage in run.get("status", {}).get("stages", []):
            if stage["name"] == SHOWN and 20 <= stage.get("percent", 0) < 100:
                return run
    sys.exit(f"the quick start has ended before {SHOWN} could be seen")


def draw(run: dict[str, Any], path: Path) -> None:
    """What `cgd watch` prints of the run, without the fonts that Rich would have fetched from a network."""
    console = Console(record=True, width=92, file=io.StringIO())
    console.print(table(run))
    svg = console.export_svg(title=f"cgd watch {run['metadata']['name']}")
    path.write_text(re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL))


def photograph(chromium: str, page: Path, path: Path) -> None:
    """The top of a page as a reader sees it."""
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
    subprocess.run([chromium, *options, f"--screenshot={path}", page.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
