"""The demo: a whole CGDRun on one machine, with everything that a cluster would provide.

    python -m cgd_local [--manifest FILE] [--folder .demo] [--file CONFIGMAP/KEY=PATH ...] [--model FOLDER ...]

Real: the operator process, kubectl, vLLM, DeepSpeed, the S3 server, the language model. Stand-ins: the API server, the
controllers and the node of this package. With KUBECONFIG set, the demo uses that API server, which must have no nodes
of its own; the KUBECONFIG of an earlier demo in the same folder is ignored, because its API server has ended. The
folder's S3 keeps its data: the next demo resumes the run.
"""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from cgd_local.demo import DemoError, demo
from cgd_stages.text.printable import printable

QUICKSTART = [
    "quickstart-problems/problems.jsonl=examples/quickstart-problems.jsonl",
    "quickstart-problems/heldout.jsonl=examples/quickstart-heldout.jsonl",
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="cgd_local", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--manifest", type=Path, default=Path("examples/quickstart.yaml"))
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="state: S3 data, logs, kubeconfig, report")
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="CONFIGMAP/KEY=PATH",
        help="put a file into a ConfigMap before the run is applied (repeatable)",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="store a model beside the demo's own, as s3://cgd/models/<name of the folder> (repeatable)",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background commands ignore SIGINT
    options.folder.mkdir(parents=True, exist_ok=True)
    files = QUICKSTART + options.file
    try:
        sys.exit(asyncio.run(_until_stopped(options.manifest, options.folder.resolve(), files, options.model)))
    except DemoError as error:
        sys.exit(printable(f"demo: {error}", lines=True))
    except KeyboardInterrupt:
        sys.exit(130)


async def _until_stopped(manifest: Path, folder: Path, files: list[str], models: list[Path]) -> int:
    """Ctrl-C and SIGTERM end every process; a second Ctrl-C is not needed."""
    work = asyncio.create_task(demo(manifest, folder, files, models, given_kubeconfig(folder)))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, work.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        print("stopped; every process has ended. `make demo` resumes from the stored data.")
        return 130


def given_kubeconfig(folder: Path) -> Path | None:
    """The file of $KUBECONFIG; None where it is unset, or names the demo's own file."""
    given = os.environ.get("KUBECONFIG")
    own = (folder / "cluster/kubeconfig").resolve()
    return Path(given) if given and Path(given).resolve() != own else None


if __name__ == "__main__":
    main()
