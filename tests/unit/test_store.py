"""Blobs on disk and in S3: the same contract on both, and every failure with its name and remedy."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.disk import PARTIAL_SUFFIX
from actors.errors import DiskFull, StoreError, UserError
from actors.store import BlobMissing, BlobStore, LocalStore, S3Store, check_store, open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "local":
        return open_store(str(tmp_path / "blobs"))
    return open_store(request.getfixturevalue("s3_url"))


def test_a_blob_comes_back_as_it_was_put(store: BlobStore):
    store.put("a/b.bin", b"one")
    store.put("a/b.bin", memoryview(b"two"))
    store.put("empty", b"")
    assert store.get("a/b.bin") == b"two"
    assert store.get("empty") == b""
    assert store.size("a/b.bin") == 3


def test_files_go_in_and_out(store: BlobStore, tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(b"x" * 100_000)
    store.put_file("shards/0", source)
    store.get_file("shards/0", target)
    assert target.read_bytes() == source.read_bytes()
    assert os.listdir(target.parent) == ["target"]


def test_a_blob_larger_than_a_part_comes_back(store: BlobStore):
    data = bytes(range(256)) * (17 * 2**12)
    store.put("large", data)
    assert store.get("large") == data


def test_keys_are_listed_by_prefix_in_order(store: BlobStore):
    for key in ("step-2/head", "step-1/head", "step-10/head", "other"):
        store.put(key, b"12345")
    assert store.list() == ["other", "step-1/head", "step-10/head", "step-2/head"]
    assert store.list("step-1") == ["step-1/head", "step-10/head"]
    assert store.sizes("step-1/") == {"step-1/head": 5}
    assert store.list("absent/") == []


def test_what_is_missing_is_said_to_be_missing(store: BlobStore, tmp_path: Path):
    assert store.size("nothing") is None
    store.delete("nothing")
    with pytest.raises(BlobMissing, match="nothing"):
        store.get("nothing")
    with pytest.raises(BlobMissing, match="nothing"):
        store.get_file("nothing", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_deleted_blob_is_gone(store: BlobStore):
    store.put("folder/blob", b"x")
    store.delete("folder/blob")
    assert store.list() == []


def test_a_sound_store_passes_its_check_and_stays_empty(store: BlobStore):
    check_store(store)
    assert store.list() == []


@pytest.mark.parametrize("key", ["", ".", "..", "../x", "a/../../x", "/etc/x", "a//b", "a/", "a\\b", "a\0b", "k" * 600])
def test_a_key_cannot_leave_the_store(store: BlobStore, key: str, tmp_path: Path):
    for action in (store.get, store.size, store.delete, lambda key: store.put(key, b"x")):
        with pytest.raises(StoreError, match="is not a key"):
            action(key)


@settings(deadline=None)
@given(key=st.text(max_size=20))
def test_no_key_names_a_path_outside_the_root(key: str):
    root = Path("/root-of-blobs")
    try:
        path = LocalStore(root)._path(key)
    except StoreError:
        return
    assert Path(os.path.normpath(path)).is_relative_to(root)
    assert os.path.normpath(path) != str(root)


@pytest.mark.parametrize("url", ["gs://bucket/x", "file://host/x", "s3://", "s3://Not_A_Bucket/x", "http://x/y"])
def test_an_unknown_url_is_the_users_error(url: str):
    with pytest.raises(UserError, match=r"use .*s3://bucket/prefix"):
        open_store(url)


def test_local_urls_are_absolute_so_that_every_node_reads_them_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store("runs/x").url == str(tmp_path / "runs/x")
    assert open_store(f"file://{tmp_path}/runs/x").url == str(tmp_path / "runs/x")


def test_a_local_store_never_loads_boto3(tmp_path):
    code = (
        "import sys; from actors.store import check_store, open_store; check_store(open_store(sys.argv[1]));"
        "sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=30)


def test_emptied_folders_go_but_the_root_stays(tmp_path):
    store = LocalStore(tmp_path / "root")
    store.put("a/b/c", b"x")
    store.put("a/d", b"x")
    store.delete("a/b/c")
    assert sorted(os.listdir(tmp_path / "root" / "a")) == ["d"]
    store.delete("a/d")
    assert os.listdir(tmp_path / "root") == []


@contextmanager
def _full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


def test_a_full_disk_names_the_file_and_leaves_the_old_blob(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    store.put("blob", b"old")
    with _full_disk(monkeypatch), pytest.raises(DiskFull, match=r"blob: the disk is full: free space"):
        store.put("blob", b"new")
    assert store.get("blob") == b"old"
    assert store.list() == ["blob"]


def test_a_download_onto_a_full_disk_says_so(store: BlobStore, tmp_path, monkeypatch):
    store.put("blob", b"x")
    with _full_disk(monkeypatch), pytest.raises(DiskFull, match="target"):
        store.get_file("blob", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_file_where_a_folder_should_be_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file/blob"):
        LocalStore(tmp_path / "file").put("blob", b"x")


def test_a_write_that_was_cut_off_can_be_seen_and_deleted(tmp_path):
    # A process killed within a write cannot tidy up; another one can.
    store = LocalStore(tmp_path)
    code = (
        "import os, sys; from pathlib import Path; from actors.disk import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as file: file.write(b'torn'); file.flush(); os._exit(9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "step-1" / "head")], timeout=30)
    assert killed.returncode == 9
    assert store.size("step-1/head") is None
    (left,) = store.list()
    assert left.startswith("step-1/head.")
    assert left.endswith(PARTIAL_SUFFIX)
    store.delete(left)
    assert os.listdir(tmp_path) == []


def test_readers_see_one_version_or_the_other(tmp_path):
    store = LocalStore(tmp_path)
    versions = (b"a" * 200_000, b"b" * 200_000)
    store.put("blob", versions[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for data in versions:
                store.put("blob", data)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert {store.get("blob") for _ in range(200)} <= set(versions)
    finally:
        stop.set()
        writer.join(timeout=10)


class _OtherBytes(LocalStore):
    def get(self, key: str) -> bytes:
        return b"not what was put"


def test_the_check_notices_a_store_that_returns_other_bytes(tmp_path):
    store = _OtherBytes(tmp_path)
    with pytest.raises(StoreError, match="other bytes"):
        check_store(store)
    assert store.list() == []


def test_blob_missing_survives_the_way_between_actors():
    error = pickle.loads(pickle.dumps(BlobMissing("gone", "look elsewhere")))
    assert str(error) == "gone: look elsewhere"


# S3's failures.


def test_a_bucket_that_does_not_exist_is_named(s3_url: str):
    store = open_store("s3://no-such-bucket-here/x")
    for action in (store.get, store.size, store.list, lambda key: store.put(key, b"x")):
        with pytest.raises(StoreError, match=r"s3://no-such-bucket-here/x: .*no such bucket: create") as raised:
            action("blob")
        assert not isinstance(raised.value, BlobMissing)


def test_missing_credentials_are_said_to_be_missing(s3_url: str, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="credentials: set AWS_ACCESS_KEY_ID"):
        open_store(s3_url).put("blob", b"x")


def test_a_profile_that_does_not_exist_is_named(s3_url: str, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match="nobody"):
        open_store(s3_url)


@contextmanager
def _answering(status: int, code: str) -> Iterator[str]:
    """A server that answers every request with one of S3's errors; yields its address."""
    body = f"<Error><Code>{code}</Code><Message>said the service</Message></Error>".encode()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("x-amz-bucket-region", "eu-west-1")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = answer

        def log_message(self, *_args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(timeout=10)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "access denied: allow"),
        (403, "SignatureDoesNotMatch", "credentials were refused: renew"),
        (301, "PermanentRedirect", "another region: set AWS_DEFAULT_REGION"),
        (501, "NotImplemented", "AWS_REQUEST_CHECKSUM_CALCULATION"),
        (503, "SlowDown", "overloaded: try again later"),
        (400, "Strange", "said the service"),
    ],
)
def test_what_s3_refuses_comes_with_a_remedy(s3_environment, monkeypatch, status: int, code: str, words: str):
    with _answering(status, code) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        with pytest.raises(StoreError, match=rf"s3://bucket/x: could not write blob: .*{words}"):
            S3Store("bucket", "x", max_attempts=1).put("blob", b"data")


def test_a_denied_read_is_not_a_missing_blob(s3_environment, monkeypatch):
    with _answering(403, "AccessDenied") as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        store = S3Store("bucket", "x", max_attempts=1)
        for action in (store.get, store.size):
            with pytest.raises(StoreError, match="access denied") as raised:
                action("blob")
            assert not isinstance(raised.value, BlobMissing)


def test_an_endpoint_nobody_listens_at_is_named(s3_environment, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
    with pytest.raises(StoreError, match=rf"{address} cannot be reached: check AWS_ENDPOINT_URL_S3"):
        S3Store("bucket", "x", max_attempts=1).put("blob", b"data")


def test_an_endpoint_that_never_answers_is_given_up_on(s3_environment, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        store = S3Store("bucket", "x", read_timeout_s=0.2, max_attempts=1)
        for action in (store.get, lambda key: store.put(key, b"data")):
            with pytest.raises(StoreError, match=f"{address} timed out: check the link"):
                action("blob")
