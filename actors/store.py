"""Blobs on a local disk or in S3: each is written whole or not at all, and hashed by its callers.

The one importer of boto3 and botocore, which load (half a second) only when an s3:// store is opened. The endpoint and
the credentials of S3 come from the environment, as boto3 reads them: AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID and so on.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from actors.disk import whole_file
from actors.errors import DiskFull, StoreError, UserError

# S3 allows keys of 1,024 bytes; the store's own prefix needs room too.
_MAX_KEY_CHARS = 512
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# Parts small enough that a thin link sends each in seconds, and few enough at once that memory stays at 64 MiB.
_PART_BYTES = 16 * 2**20
_NUM_PARTS_AT_ONCE = 4


class BlobMissing(StoreError):
    """The store has no blob of this key."""


class BucketMissing(UserError, StoreError):
    """The store's URL names a bucket that is not there: the user's error, where other refusals are the store's."""


class BlobStore(Protocol):
    """A flat map of keys ("step-00000100/head.safetensors") to bytes; a reader sees a blob whole or not at all.

    Every method raises StoreError, naming store and key, where the medium refuses or does not answer in time, and
    DiskFull where a local disk has no room.
    """

    url: str

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write a blob, durably, in place of any of the same key."""

    def put_file(self, key: str, path: Path) -> None:
        """Write a local file's bytes as a blob."""

    def get(self, key: str) -> bytes:
        """Return a blob's bytes; BlobMissing where there is none."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Write a blob's bytes to a local file, which appears whole; BlobMissing where there is none."""

    def size(self, key: str) -> int | None:
        """Return a blob's bytes in number, or None where there is none."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the size in bytes of every blob whose key starts with `prefix`, in the keys' order."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that start with `prefix`, sorted."""
        return list(self.sizes(prefix))

    def delete(self, key: str) -> None:
        """Delete a blob; no error where there is none."""


def open_store(url: str) -> BlobStore:
    """Return the store at a local path, file:///path or s3://bucket/prefix; UserError for anything else."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalStore(Path(url).expanduser())
    if scheme == "file" and rest.startswith("/"):
        return LocalStore(Path(rest))
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        return S3Store(bucket, prefix.strip("/"))
    raise UserError(f"no store is known at {url!r}", "use a local path, file:///path or s3://bucket/prefix")


def check_store(store: BlobStore) -> None:
    """Write, read and delete a small blob, so that a wrong bucket fails now and not after hours of training."""
    key = f"probe-{secrets.token_hex(8)}"
    data = secrets.token_bytes(32)
    store.put(key, data)
    try:
        returned = store.get(key)
    finally:
        store.delete(key)
    if returned != data:
        raise StoreError(f"{store.url} returned other bytes than were written", "check its disk, or use another store")


def _checked(key: str) -> str:
    """Return the key if it is a plain relative path, which cannot leave the store; else StoreError."""
    plain = key.isprintable() and "\\" not in key and len(key) <= _MAX_KEY_CHARS
    if not plain or any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(
            f"{key[:_MAX_KEY_CHARS]!r} is not a key", "a key is a relative path of plain names, such as a/b.json"
        )
    return key


@contextmanager
def _on_disk(path: Path, doing: str) -> Iterator[None]:
    """Turn what the operating system says of `path` into the error that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"could not {doing} {path}: the disk is full",
                f"free space on the disk of {path.parent}, or use another folder or an s3:// URL",
            ) from error
        raise StoreError(
            f"could not {doing} {path}: {error.strerror or error}",
            f"give this user access to {path.parent} on a sound disk, or use another folder",
        ) from error


class LocalStore(BlobStore):
    """Blobs as files under one folder, which the first write creates."""

    def __init__(self, root: Path) -> None:
        # Absolute, because nodes that get this URL run in folders of their own.
        self.root = root.absolute()
        self.url = str(self.root)

    def put(self, key: str, data: bytes | memoryview) -> None:
        path = self._path(key)
        with _on_disk(path, "write"), whole_file(path) as file:
            file.write(data)

    def put_file(self, key: str, path: Path) -> None:
        with _on_disk(path, "read"):
            source = path.open("rb")
        target = self._path(key)
        with source, _on_disk(target, "write"), whole_file(target) as file:
            shutil.copyfileobj(source, file)

    def get(self, key: str) -> bytes:
        with self._open(key) as file, _on_disk(self._path(key), "read"):
            return file.read()

    def get_file(self, key: str, path: Path) -> None:
        with self._open(key) as source, _on_disk(path, "write"), whole_file(path) as file:
            shutil.copyfileobj(source, file)

    def size(self, key: str) -> int | None:
        path = self._path(key)
        with _on_disk(path, "look at"):
            return _size_of(path)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        folder, _, _ = prefix.rpartition("/")
        base = self._path(folder) if folder else self.root
        found = {}
        with _on_disk(base, "list"):
            for path in _files_under(base):
                key = path.relative_to(self.root).as_posix()
                # A file may vanish between being listed and being looked at.
                if key.startswith(prefix) and (size := _size_of(path)) is not None:
                    found[key] = size
        return dict(sorted(found.items()))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _on_disk(path, "delete"):
            path.unlink(missing_ok=True)
        # Folders are litter once empty; the first that still holds something ends the sweep.
        with suppress(OSError):
            for folder in path.relative_to(self.root).parents[:-1]:
                (self.root / folder).rmdir()

    def _path(self, key: str) -> Path:
        return self.root / _checked(key)

    def _open(self, key: str) -> IO[bytes]:
        path = self._path(key)
        with _on_disk(path, "read"):
            try:
                return path.open("rb")
            except FileNotFoundError as error:
                raise _missing(self.url, key) from error


def _missing(url: str, key: str) -> BlobMissing:
    return BlobMissing(f"{url} has no {key}", "check the URL, and that what should have written it ended well")


def _size_of(path: Path) -> int | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _files_under(base: Path) -> Iterator[Path]:
    """Yield every file below a folder, which may be missing or vanish on the way."""

    def fail(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    for folder, _, names in os.walk(base, onerror=fail):
        yield from (Path(folder, name) for name in names)


class S3Store(BlobStore):
    """Blobs as objects under one prefix of a bucket, moved in parts where they are large."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 60.0,
        max_attempts: int = 4,
    ) -> None:
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        if not _BUCKET.fullmatch(bucket):
            raise UserError(f"{self.url!r} names no bucket", "use s3://bucket/prefix")
        self._bucket = bucket
        self._prefix = f"{_checked(prefix)}/" if prefix else ""
        from boto3.exceptions import Boto3Error
        from boto3.s3.transfer import TransferConfig
        from boto3.session import Session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
        from s3transfer.exceptions import RetriesExceededError

        self._refusal = ClientError
        self._failures = (BotoCoreError, ClientError, Boto3Error, RetriesExceededError)
        try:
            # A session of its own: boto3's default one is not safe to make clients from in several threads.
            self._client: Any = Session().client(
                "s3",
                config=Config(
                    connect_timeout=connect_timeout_s,
                    read_timeout=read_timeout_s,
                    retries={"mode": "standard", "total_max_attempts": max_attempts},
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise StoreError(f"{self.url} cannot be opened: {error}", "correct the AWS_ settings it names") from error
        self._transfer = TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_concurrency=_NUM_PARTS_AT_ONCE,
            num_download_attempts=max_attempts,
            preferred_transfer_client="classic",
        )

    def put(self, key: str, data: bytes | memoryview) -> None:
        with self._request("write", key):
            self._client.upload_fileobj(io.BytesIO(data), self._bucket, self._object(key), Config=self._transfer)

    def put_file(self, key: str, path: Path) -> None:
        with _on_disk(path, "read"), path.open("rb") as file, self._request("write", key):
            self._client.upload_fileobj(file, self._bucket, self._object(key), Config=self._transfer)

    def get(self, key: str) -> bytes:
        buffer = io.BytesIO()
        self._download(key, buffer)
        return buffer.getvalue()

    def get_file(self, key: str, path: Path) -> None:
        with _on_disk(path, "write"), whole_file(path) as file:
            self._download(key, file)

    def size(self, key: str) -> int | None:
        with self._request("look at", key):
            try:
                return self._client.head_object(Bucket=self._bucket, Key=self._object(key))["ContentLength"]
            except self._refusal as error:
                if _code(error) not in _NO_OBJECT:
                    raise
                self._require_bucket()
                return None

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        with self._request("list", f"{prefix}*"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for item in page.get("Contents", ()):
                    # Consoles mark a folder with an empty object of its name.
                    if not item["Key"].endswith("/"):
                        found[item["Key"].removeprefix(self._prefix)] = item["Size"]
        return dict(sorted(found.items()))

    def delete(self, key: str) -> None:
        with self._request("delete", key):
            self._client.delete_object(Bucket=self._bucket, Key=self._object(key))

    def _object(self, key: str) -> str:
        return self._prefix + _checked(key)

    def _download(self, key: str, file: IO[bytes]) -> None:
        with self._request("read", key):
            try:
                self._client.download_fileobj(self._bucket, self._object(key), file, Config=self._transfer)
            except self._refusal as error:
                if _code(error) not in _NO_OBJECT:
                    raise
                self._require_bucket()
                raise _missing(self.url, key) from error

    def _require_bucket(self) -> None:
        """Have S3 raise NoSuchBucket if so it is: a HEAD of an object answers 404 both for bucket and object."""
        self._client.list_objects_v2(Bucket=self._bucket, MaxKeys=1)

    @contextmanager
    def _request(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except self._failures as error:
            cause, remedy = _s3_cause(error, self._client.meta.endpoint_url)
            kind = BucketMissing if isinstance(error, self._refusal) and _code(error) == "NoSuchBucket" else StoreError
            raise kind(f"{self.url}: could not {doing} {key}: {cause}", remedy) from error


_NO_OBJECT = ("404", "NoSuchKey")
# S3's codes, what they mean, and the remedy.
_S3_CAUSES = (
    (("NoSuchBucket",), "no such bucket", "create the bucket, or correct its name in the URL"),
    (
        ("AccessDenied", "AllAccessDisabled", "403"),
        "access denied",
        "allow these credentials to list the bucket and to get, put and delete its objects",
    ),
    (
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
        "the credentials were refused",
        "renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN",
    ),
    (("RequestTimeTooSkewed",), "this machine's clock is off", "set the clock, for instance with NTP"),
    (
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "301"),
        "the bucket is in another region",
        "set AWS_DEFAULT_REGION to its region",
    ),
    # Some S3-compatible services do not know the checksums that boto3 adds by default.
    (("NotImplemented",), "the service lacks what was asked", "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
    (("SlowDown", "ServiceUnavailable", "503"), "the service is overloaded", "try again later"),
)


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _s3_cause(error: Any, endpoint: str) -> tuple[str, str]:
    """Return in words why S3 failed, and the remedy."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        known = (cause for cause in _S3_CAUSES if _code(error) in cause[0])
        _, cause, remedy = next(known, ((), str(error), "correct what the service names, then try again"))
        return cause, remedy
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)):
        return str(error), "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, (boto.ConnectTimeoutError, boto.ReadTimeoutError)):
        return f"{endpoint} timed out", "check the link to it, then try again"
    if isinstance(error, (boto.ConnectionError, boto.HTTPClientError)):
        return f"{endpoint} cannot be reached", "check AWS_ENDPOINT_URL_S3, the link and the proxy, then try again"
    last = getattr(error, "last_exception", None)
    return _s3_cause(last, endpoint) if last is not None else (str(error), "check the S3 settings, then try again")
