"""The object store: bytes by key under `storage.uri`, through boto3, with every foreign error translated here."""

import copy
import functools
import itertools
import logging
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    IncompleteReadError,
    InvalidEndpointDiscoveryConfigurationError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from cgd_stages.contract import Storage
from cgd_stages.errors import StageError, TransientError, UserError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""Tries of one request, with pauses that double; the SDK makes them."""
CONFLICTS = 5
"""Tries of a new object while another writer stores it too."""
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
"""How long one try waits for a connection, and for the next bytes."""
AWAY_SECONDS = 600.0
"""How long a caller that waits for a store waits at most."""
LONGEST_PAUSE = 15.0
"""Seconds between two tries of a caller that waits, at most."""
PROBE_ROUNDS, PROBE_WRITERS, PROBE_BYTES = 3, 2, 1 << 16
"""How often the probe has so many writers store one object at once, and its bytes: a store that looks first and writes
then has the more time to go wrong."""

CREDENTIALS_HINT = (
    "Check the Secret of spec.storage.credentialsSecretRef (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), "
    "or the cloud identity of spec.serviceAccountName."
)
# The SDK tries a request again, but not the reading of an answer's body.
_BROKEN_BODY = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
_CONFIGURATION = (NoRegionError, InvalidEndpointDiscoveryConfigurationError, ProfileNotFound, ParamValidationError)

LONGEST_NAME = 200
"""Bytes of a file's name. File systems take 255, and a file has a longer name while it is downloaded."""
_NO_NAME = re.compile(r"[\\\x00-\x1f\x7f]")

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class Stored:
    """One object; `key` is relative to the bucket object that listed it, `etag` without quotes."""

    key: str
    size: int
    etag: str


@dataclass
class Outage:
    """Since when a store is away; all copies of a bucket share it."""

    since: float | None = None

    @property
    def too_long(self) -> bool:
        return self.since is not None and time.monotonic() - self.since > AWAY_SECONDS


def patient(request: Callable[Concatenate["Bucket", P], T]) -> Callable[Concatenate["Bucket", P], T]:
    """The request, made again while the store is away, as long as the bucket's caller waits (see `Bucket.waiting`)."""

    @functools.wraps(request)
    def repeated(bucket: "Bucket", /, *args: P.args, **kwargs: P.kwargs) -> T:
        for attempt in itertools.count():
            try:
                result = request(bucket, *args, **kwargs)
            except TransientError as error:
                outage, stop = bucket.outage, bucket._waits_until
                outage.since = time.monotonic() if outage.since is None else outage.since
                if stop is None or stop.is_set() or outage.too_long:
                    raise
                log.warning("waiting for the store: %s", error.message)
                stop.wait(min(2.0 ** min(attempt, 8), LONGEST_PAUSE))
            else:
                bucket.outage.since = None
                return result
        raise AssertionError("unreachable")

    return repeated


class Bucket:
    """Objects under one `s3://bucket/prefix`. Safe to share between threads.

    Raises UserError when the user must change the storage block of the spec, TransientError when the store is away.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._client: S3Client = _connect(storage)
        self._bucket, self._prefix = split_uri(storage.uri)
        self._where = storage.endpoint or "AWS S3"
        self.outage = Outage()
        self._waits_until: threading.Event | None = None

    def waiting(self, stop: threading.Event) -> "Bucket":
        """The same place for a caller that waits: while the store is away, each request is made again until `stop` is
        set (then once more) or the store has been away for `AWAY_SECONDS`."""
        bucket = copy.copy(self)
        bucket._waits_until = stop
        return bucket

    def at_once(self) -> "Bucket":
        """The same place for a caller that does not wait."""
        bucket = copy.copy(self)
        bucket._waits_until = None
        return bucket

    def one_try(self) -> "Bucket":
        """The same place for a caller that would rather do without than wait: each request is made once."""
        bucket = self.at_once()
        bucket._client = _connect(self.storage, attempts=1, read_seconds=CONNECT_SECONDS)
        return bucket

    def at(self, uri: str) -> "Bucket":
        """The same store and credentials at another `s3://bucket/prefix`."""
        bucket = copy.copy(self)
        bucket.storage = self.storage.model_copy(update={"uri": uri})
        bucket._bucket, bucket._prefix = split_uri(uri)
        return bucket

    def uri(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._absolute(key)}"

    @patient
    def get(self, key: str) -> bytes | None:
        """The object's bytes; None when it does not exist."""
        with self._translated(key):
            for tries_left in reversed(range(ATTEMPTS)):
                try:
                    return self._client.get_object(Bucket=self._bucket, Key=self._absolute(key))["Body"].read()
                except ClientError as error:
                    if _code(error) in {"NoSuchKey", "404"}:
                        return None
                    raise
                except _BROKEN_BODY as error:
                    if not tries_left:
                        raise
                    log.info("%s is read again: %s", self.uri(key), error)
        raise AssertionError("the last try returns or raises")

    @patient
    def beginning(self, key: str, size: int) -> bytes:
        """The first `size` bytes of an object that exists, or all bytes of a smaller one."""
        with self._translated(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._absolute(key), Range=f"bytes=0-{size - 1}")
            return answer["Body"].read()

    @patient
    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Store bytes. With `if_absent` an object that exists stays as it is, and the result is False.

        That object may be the caller's own, if the answer to its first try was lost on the way.
        """
        with self._translated(key):
            if not if_absent:
                self._client.put_object(Bucket=self._bucket, Key=self._absolute(key), Body=data)
                return True
            for tries_left in reversed(range(CONFLICTS)):
                try:
                    self._client.put_object(Bucket=self._bucket, Key=self._absolute(key), Body=data, IfNoneMatch="*")
                except ClientError as error:
                    if _code(error) in {"PreconditionFailed", "412"}:
                        return False
                    # AWS: two writers store the same key at this moment, and which one wins is not decided yet.
                    if _code(error) != "ConditionalRequestConflict" or not tries_left:
                        raise
                    time.sleep(random.uniform(0.1, 0.5))  # noqa: S311
                else:
                    return True
        raise AssertionError("the last try returns or raises")

    @patient
    def list(self, prefix: str = "") -> Iterator[Stored]:
        """Every object whose key starts with `prefix`, once, in the order of the keys' characters.

        The order is made here: stores that are not AWS's list in orders of their own (SeaweedFS 4.48 lists a folder's
        objects where the folder's name stands), and may list an object on two pages.
        """
        objects: dict[str, Stored] = {}
        with self._translated(prefix):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._absolute(prefix)):
                for item in page.get("Contents", []):
                    key = item["Key"].removeprefix(self._absolute(""))
                    objects[key] = Stored(key=key, size=item["Size"], etag=item["ETag"].strip('"'))
        return iter(sorted(objects.values(), key=lambda stored: stored.key))

    @patient
    def upload(self, path: Path, key: str) -> None:
        """Store a file, in parts when it is large."""
        # upload_file would wrap the store's answer into a string; upload_fileobj keeps the error's code.
        with self._translated(key), path.open("rb") as source:
            self._client.upload_fileobj(source, self._bucket, self._absolute(key))

    @patient
    def download(self, key: str, path: Path) -> None:
        """Fetch an object into a file that appears only when it is complete. Raises UserError if it does not exist."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with self._translated(key), partial.open("wb") as target:
                self._client.download_fileobj(self._bucket, self._absolute(key), target)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @patient
    def delete(self, key: str) -> None:
        """Remove an object; that it does not exist is no error."""
        with self._translated(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._absolute(key))

    def probe(self) -> str:
        """Put, read, list and delete small objects; say who the caller is.

        Raises as every method does, and UserError for a store whose conditional writes do not hold: parts, markers and
        promises rest on them.
        """
        key = f".probe/{uuid.uuid4().hex}"
        longer, contended = f"{key}.longer", [f"{key}.{number}" for number in range(PROBE_ROUNDS)]
        self.put(longer, b"longer")
        try:
            if not self.put(key, b"probe", if_absent=True) and self.get(key) is None:
                raise self._unfit(
                    "refuses a new object while one with a longer name exists", "parts could not be stored"
                )
            if self.get(key) != b"probe" or [stored.key for stored in self.list(key)] != [key, longer]:
                hint = "The store is late, or changes names: then write a plain prefix in spec.storage.uri."
                raise TransientError(f"{self.uri(key)} was written but cannot be read back", hint=hint)
            if self.put(key, b"again", if_absent=True):
                raise self._unfit("ignores If-None-Match", "parts could be overwritten")
            if not all(self._has_one_winner(name) for name in contended):
                raise self._unfit("does not let exactly one of two writers win", "parts could be overwritten")
        finally:
            for name in (key, longer, *contended):
                self.delete(name)
        if self.storage.endpoint is None:
            with self._translated(""):
                return str(boto3.Session().client("sts", region_name=self.storage.region).get_caller_identity()["Arn"])
        # Key ids are names, not secrets; the last characters of an id are enough to recognise it.
        credentials = boto3.Session().get_credentials()
        return f"access key ...{credentials.access_key[-4:]} ({credentials.method})" if credentials else "anonymous"

    def _has_one_winner(self, key: str) -> bool:
        """Whether exactly one of two writers wins when both store the same new object at the same moment, and the other
        gets False. The winner may get False too: the answer to its first try may be lost."""
        begin = threading.Barrier(PROBE_WRITERS)
        texts = [bytes([number]) * PROBE_BYTES for number in range(PROBE_WRITERS)]

        def write(text: bytes) -> bool:
            begin.wait()
            return self.put(key, text, if_absent=True)

        with ThreadPoolExecutor(PROBE_WRITERS, thread_name_prefix="probe") as pool:
            won = [text for text, stored in zip(texts, pool.map(write, texts), strict=True) if stored]
        stored = self.get(key)
        return stored in texts and won in ([], [stored])

    def _unfit(self, does: str, so_that: str) -> UserError:
        return UserError(
            f"the store behind {self.storage.uri} {does}, so that {so_that}",
            hint="Use another store for spec.storage, or a newer version of this one: conditional writes must hold.",
        )

    def _absolute(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise self._refusal(error, key) from error
        except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError) as error:
            raise UserError(f"no usable S3 credentials: {error}", hint=CREDENTIALS_HINT) from error
        except SSLError as error:
            # A connection that breaks off during its handshake is an SSLError too, and the next one may succeed.
            if "CERTIFICATE_VERIFY_FAILED" not in str(error):
                raise self._away(error) from error
            message = f"the certificate of {self._where} cannot be verified: {error}"
            raise UserError(message, hint="Give the CA in spec.storage.caBundleConfigMapRef.") from error
        except (*_CONFIGURATION, ValueError) as error:
            message = f"S3 settings do not work: {error}"
            raise UserError(message, hint="Correct uri, endpoint and region in spec.storage.") from error
        except (BotoCoreError, ResponseParserError) as error:
            raise self._away(error) from error

    def _away(self, error: Exception) -> TransientError:
        message = f"S3 at {self._where} cannot be reached: {error}"
        return TransientError(message, hint="Check spec.storage.endpoint and that the store is running.")

    def _refusal(self, error: ClientError, key: str) -> StageError:
        """The error of a request that the store has refused: who must act, and what to change."""
        what = f"{self.uri(key)}: {error}"
        match _code(error):
            case "InvalidAccessKeyId" | "InvalidSecurity" | "UnrecognizedClientException":
                return UserError(f"S3 does not know the access key: {what}", hint=CREDENTIALS_HINT)
            case "SignatureDoesNotMatch":
                message = f"S3 knows the access key, but the secret key does not belong to it: {what}"
                return UserError(message, hint=CREDENTIALS_HINT)
            case "AccessDenied" | "403" | "AllAccessDisabled" | "AccountProblem":
                return UserError(f"S3 denies access: {what}", hint=CREDENTIALS_HINT)
            case "NoSuchBucket" | "InvalidBucketName":
                hint = "Create the bucket or correct spec.storage.uri."
                return UserError(f"there is no bucket {self._bucket} at {self._where}", hint=hint)
            case "NoSuchKey" | "404":
                return UserError(f"there is no object {self.uri(key)}", hint="Correct the URI in the spec.")
            case "KeyTooLongError" | "InvalidURI" | "XMinioInvalidObjectName":
                message = f"the store does not take the key, or its length: {what}"
                return UserError(message, hint="Write a shorter and plainer prefix in spec.storage.uri.")
            case "PermanentRedirect" | "301" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException":
                return UserError(f"the bucket is in another region: {what}", hint="Correct spec.storage.region.")
            case "NotImplemented" | "501":
                return UserError(
                    f"the store does not implement this request: {what}",
                    hint="Use another store for spec.storage, or a newer version of this one: it must have conditional "
                    "writes (PutObject with If-None-Match) and multipart uploads.",
                )
        return TransientError(f"S3 failed: {what}", hint="The store may be overloaded; the program retries.")


def place(folder: Path, key: str) -> Path:
    """The file below a folder of this machine for an object's key, as a listing, a marker or an index names it.

    Every such key comes through here. Raises UserError for a key that would lead out of the folder, or is no path.
    """
    parts = key.split("/")
    if any(part in {"", ".", ".."} or _NO_NAME.search(part) or len(part.encode()) > LONGEST_NAME for part in parts):
        raise UserError(
            f"the object {key[:200]!r} has no place below a folder: each part of its key must be the name of a file",
            hint="Delete the object or give it another name: no '..', '.', backslash, control character or empty part, "
            f"and at most {LONGEST_NAME} bytes between two slashes.",
        )
    return folder.joinpath(*parts)


def places(folder: Path, keys: Iterable[str]) -> dict[str, Path]:
    """`place` of each key. Raises UserError as well for two keys of which a folder of files can hold only one: a store
    can hold `a` beside `a/b`."""
    found = {key: place(folder, key) for key in keys}
    for key in found:
        for end in (index for index, character in enumerate(key) if character == "/"):
            if key[:end] in found:
                raise UserError(
                    f"the objects {key[:end]!r} and {key[:200]!r} cannot lie below one folder: "
                    "the first would be a file and a folder",
                    hint="Delete one of the two objects, or give it another name.",
                )
    return found


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of an `s3://` URI, the key without slashes at its ends."""
    scheme, separator, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not separator or not bucket:
        raise UserError(f"{uri!r} is not an S3 URI", hint="Write it as s3://bucket/key.")
    return bucket, key.strip("/")


# Sessions of boto3 are not safe to build from several threads at once; clients are safe to use.
_connecting = threading.Lock()


def _connect(storage: Storage, attempts: int = ATTEMPTS, read_seconds: float = READ_SECONDS) -> "S3Client":
    # Since 2025 the SDK adds checksums that older S3-compatible stores refuse: only AWS itself gets them.
    is_aws = storage.endpoint is None
    config = Config(
        s3={"addressing_style": "path" if storage.path_style else "auto"},
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=read_seconds,
        max_pool_connections=32,
        request_checksum_calculation="when_supported" if is_aws else "when_required",
        response_checksum_validation="when_supported" if is_aws else "when_required",
    )
    region = storage.region or (None if is_aws else "us-east-1")
    try:
        with _connecting:
            # A new session: boto3's default one would keep the credentials of the first caller.
            return boto3.Session().client(
                "s3", endpoint_url=storage.endpoint, region_name=region, verify=storage.ca_bundle, config=config
            )
    except (BotoCoreError, ValueError) as error:
        message = f"S3 settings do not work: {error}"
        raise UserError(message, hint="Correct endpoint and region in spec.storage.") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
