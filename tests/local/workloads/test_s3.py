"""SeaweedFS as S3: keys are checked, data survive, and nothing is left running."""

import asyncio
import os
import signal
import socket
import sys

import pytest
from botocore.exceptions import ClientError
from support.local_world import alive, eventually
from support.patience import PATIENCE

from cgd_local.s3 import GRPC_OFFSET, SeaweedFS, choose_ports

KEYS = {"access_key": "local", "secret_key": "local-secret", "bucket": "data"}


async def test_what_is_put_survives_a_kill_and_a_restart_at_the_same_endpoint(tmp_path):
    s3 = SeaweedFS(tmp_path, **KEYS)
    await s3.start()
    try:
        s3.client().put_object(Bucket="data", Key="a/b", Body=b"rows")
        endpoint = s3.endpoint
        assert s3._process is not None
        s3._process.send_signal(signal.SIGUSR1)  # kill -9 of everything below the launcher
        await asyncio.to_thread(s3._process.wait)
        await s3.start()
        assert s3.endpoint == endpoint
        assert s3.client().get_object(Bucket="data", Key="a/b")["Body"].read() == b"rows"
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.client().put_object(Bucket="data", Key="a/b", Body=b"other", IfNoneMatch="*")
        s3.secret_key = "wrong"
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            s3.client().list_objects_v2(Bucket="data")
    finally:
        await s3.stop()


async def test_ports_are_kept_unless_somebody_took_them(tmp_path):
    first = choose_ports(tmp_path)
    assert choose_ports(tmp_path) == first
    with socket.create_server(("127.0.0.1", first["filer"] + GRPC_OFFSET)):
        assert first["filer"] not in choose_ports(tmp_path).values()


async def test_it_dies_with_its_parent(tmp_path):
    program = (
        "import asyncio, sys, pathlib\n"
        "from cgd_local.s3 import SeaweedFS\n"
        "async def main():\n"
        f"    s3 = SeaweedFS(pathlib.Path({str(tmp_path)!r}), access_key='a', secret_key='b' * 8, bucket='data')\n"
        "    await s3.start()\n"
        "    print(s3._process.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout
    launcher = int(await asyncio.wait_for(parent.stdout.readline(), PATIENCE))
    os.kill(parent.pid, signal.SIGKILL)
    await parent.wait()
    await eventually(lambda: not alive(launcher), "end of the server")
    log = (tmp_path / "weed.log").read_text()
    assert "telemetry" not in log.lower() or "telemetry: disabled" in log.lower()
