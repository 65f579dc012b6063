"""Object stores: `s3://bucket/prefix`, `gs://bucket/prefix` and `az://container/prefix`, by obstore
(`pip install 'pmerge[s3]'`).

Every read asks for the object with the ETag that its listing had, so the store itself notices an
object that is replaced. A folder is listed once for a plan. Settings are those of the environment,
as obstore reads them; for S3 the profiles in ~/.aws too.

S3: AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE, AWS_REQUEST_PAYER=true, AWS_SKIP_SIGNATURE=true
(public buckets).
"""

from __future__ import annotations

import configparser
import os
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from merge_cli.errors import ChangedError, InputError, StoreError, UsageError
from merge_cli.stores.store import Entry, Stat, is_glob, match_names

_PIECE_BYTES = 1 << 20  # of an answer, before it is in the caller's buffer
_TRIES = 3  # beside those of obstore, which do not cover every way for an answer to end early
_SETTINGS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}


class Place(NamedTuple):
    """A path taken apart: `bucket` with its scheme, and the key in it."""

    bucket: str
    key: str


class Object(NamedTuple):
    """What a listing says of an object."""

    num_bytes: int
    etag: str | None
    mtime_ns: int

    @property
    def version(self) -> str:
        return f"etag {self.etag}" if self.etag else f"mtime_ns {self.mtime_ns}"


Listing = Mapping[str, Object | None]
"""The names in a folder; None for a folder."""


class ObjectSource:
    """An object, as long as it has the ETag that it had."""

    def __init__(self, bucket: Any, path: str, key: str, found: Object) -> None:
        self.path = path
        self.num_bytes = found.num_bytes
        self.version = found.version
        self._bucket = bucket
        self._key = key
        self._etag = found.etag

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset`. Raises ChangedError or StoreError."""
        if offset + len(buffer) > self.num_bytes:
            raise ChangedError(f"{self.path} ends at byte {self.num_bytes}, before what was to be read", offset=self.num_bytes)
        done = failed = 0
        while done < len(buffer):
            try:
                for piece in self._pieces(offset + done, offset + len(buffer)):
                    buffer[done : done + len(piece)] = piece
                    done += len(piece)
                    failed = 0
                if done < len(buffer):
                    raise StoreError(f"the answer ended {len(buffer) - done} bytes early")
            except (ChangedError, InputError):
                raise
            except Exception as error:  # what obstore raises has no common type that is public
                failed += 1
                if failed == _TRIES or not _may_pass(error):
                    raise translated(error, self.path, offset + done) from error

    def _pieces(self, begin: int, end: int) -> Any:
        options = {"range": (begin, end), **({"if_match": self._etag} if self._etag else {})}
        answer = import_module("obstore").get(self._bucket, self._key, options=options)
        if answer.meta["size"] != self.num_bytes:
            raise ChangedError(f"{self.path} has {answer.meta['size']} bytes now, and had {self.num_bytes}", offset=begin)
        if tuple(answer.range) != (begin, end):
            raise StoreError(f"the server sent bytes {answer.range}, not {(begin, end)}")
        return answer.stream(min_chunk_size=_PIECE_BYTES)

    def close(self) -> None: ...


class ObjectStore:
    """The buckets of all clouds. What a listing said holds until `expand` begins another plan."""

    requests_at_once = 16

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[str, Any] = {}
        self._listings: dict[Place, Listing] = {}

    def expand(self, path: str) -> Sequence[str]:
        place = parse_place(path)
        with self._lock:
            self._listings = {key: each for key, each in self._listings.items() if key.bucket != place.bucket}
        if not is_glob(path):
            return [path]
        found = match_names(self, place.bucket, place.key)
        if not found:
            raise InputError(f"nothing matches {path}")
        return found

    def list(self, path: str) -> Sequence[Entry]:
        listing = self._listing(parse_place(path))
        if not listing:
            raise InputError(f"cannot list {path}: there is nothing below it")
        return [Entry(name, "folder" if found is None else "file") for name, found in sorted(listing.items())]

    def stat(self, path: str) -> Stat | None:
        place = parse_place(path)
        above = self._listing_above(place)
        if above is not None:
            name = place.key.rpartition("/")[2]
            return _stat_of(above[name]) if name in above else None
        if self._listing(place):
            return Stat("folder", 0, 0)
        found = self._head(path, place)
        return None if found is None else _stat_of(found)

    def open(self, path: str) -> ObjectSource:
        place = parse_place(path)
        above = self._listing_above(place)
        found = self._head(path, place) if above is None else above.get(place.key.rpartition("/")[2])
        if found is None:
            raise InputError(f"cannot open {path}: no such object")
        return ObjectSource(self._bucket(place.bucket), path, place.key, found)

    def resolve(self, path: str) -> str:
        return path

    def check_inside(self, root: str, path: str) -> None: ...

    def _listing_above(self, place: Place) -> Listing | None:
        """What lies beside `place`; None where that is the whole bucket, or may not be listed."""
        if "/" not in place.key:
            return self._listings.get(_above(place)) if place.key else None
        try:
            return self._listing(_above(place))
        except InputError:
            return None

    def _listing(self, place: Place) -> Listing:
        with self._lock:
            found = self._listings.get(place)
        if found is None:
            found = self._request_listing(place)
            with self._lock:
                self._listings[place] = found
        return found

    def _request_listing(self, place: Place) -> Listing:
        try:
            bucket = self._bucket(place.bucket)
            answer = import_module("obstore").list_with_delimiter(bucket, place.key or None)
        except Exception as error:
            if _is_missing(error) or "404 Not Found" in str(error):
                raise InputError(f"there is no bucket {place.bucket}", hint="is it the right region and endpoint?") from error
            raise translated(error, f"{place.bucket}/{place.key}") from error
        found: dict[str, Object | None] = {}
        for each in answer["objects"]:
            if each["path"] != place.key:  # an empty object that stands for the folder itself
                found[each["path"].rpartition("/")[2]] = _object_of(each)
        return {**found, **{prefix.rpartition("/")[2]: None for prefix in answer["common_prefixes"]}}

    def _head(self, path: str, place: Place) -> Object | None:
        if not place.key:
            return None
        try:
            bucket = self._bucket(place.bucket)
            return _object_of(import_module("obstore").head(bucket, place.key))
        except Exception as error:
            if _is_missing(error):
                return None
            raise translated(error, path) from error

    def _bucket(self, bucket: str) -> Any:
        with self._lock:
            if bucket not in self._buckets:
                self._buckets[bucket] = connect(bucket)
            return self._buckets[bucket]


STORE = ObjectStore()


def parse_place(path: str) -> Place:
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise InputError(f"{path} names no bucket", details=[f"expected  {scheme}://bucket/folder"])
    return Place(f"{scheme}://{bucket}", key.strip("/"))


def _above(place: Place) -> Place:
    return Place(place.bucket, place.key.rpartition("/")[0])


def _object_of(meta: Mapping[str, Any]) -> Object:
    return Object(meta["size"], meta.get("e_tag"), int(meta["last_modified"].timestamp()) * 10**9)


def _stat_of(found: Object | None) -> Stat:
    return Stat("folder", 0, 0) if found is None else Stat("file", found.num_bytes, found.mtime_ns)


def connect(bucket: str) -> Any:
    """The client of a bucket. Raises UsageError without obstore."""
    scheme = bucket.partition("://")[0]
    if find_spec("obstore") is None:
        raise UsageError(f"{scheme}:// needs obstore", hint="pip install 'pmerge[s3]'")
    settings: dict[str, Any] = _s3_settings() if scheme == "s3" else {}
    endpoint = str(settings.get("endpoint") or next(filter(None, map(os.environ.get, _ENDPOINTS)), ""))
    client = {"allow_http": True} if endpoint.startswith("http://") else {}
    retries = {"max_retries": 8, "retry_timeout": timedelta(minutes=5)}
    try:
        return import_module("obstore.store").from_url(bucket, client_options=client, retry_config=retries, **settings)
    except Exception as error:
        raise InputError(f"cannot use {bucket}: {error}") from error


_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def _s3_settings() -> dict[str, Any]:
    """Settings out of the profile in ~/.aws, where the environment has no keys: obstore reads the
    environment alone.
    """
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    profile, named = os.environ.get("AWS_PROFILE", "default"), "AWS_PROFILE" in os.environ
    found = _section("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile)
    config = _section("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}")
    if named and not found and not config:
        raise InputError(
            f"there is no profile {profile} in ~/.aws/config or ~/.aws/credentials", hint="aws configure list-profiles"
        )
    settings: dict[str, Any] = {ours: found[key] for key, ours in _SETTINGS.items() if key in found}
    if "access_key_id" not in settings and (named or {"sso_session", "role_arn", "credential_process"} & config.keys()):
        if find_spec("boto3") is None:
            raise InputError(
                f"the profile {profile} has no keys of its own (single sign-on, a role, a process)",
                hint=f'eval "$(aws configure export-credentials --profile {profile} --format env)", then the same command again',
            )
        session = import_module("boto3").Session(profile_name=profile)
        settings["credential_provider"] = import_module("obstore.auth.boto3").Boto3CredentialProvider(session)
    if "region" in config and not {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys():
        settings["region"] = config["region"]
    if "endpoint_url" in config and not any(name in os.environ for name in _ENDPOINTS):
        settings["endpoint"] = config["endpoint_url"]
    return settings


def _section(variable: str, name: str, section: str) -> dict[str, str]:
    """A section of a file in ~/.aws, {} where it is missing. Raises InputError for a file that
    cannot be read.
    """
    path = Path(os.environ.get(variable, "") or Path.home() / ".aws" / name)
    parser = configparser.RawConfigParser()
    try:
        parser.read(path)
    except (configparser.Error, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    return dict(parser[section]) if parser.has_section(section) else {}


def _may_pass(error: Exception) -> bool:
    return isinstance(error, StoreError) or type(error).__name__ in ("GenericError", "BaseError")


def _is_missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFoundError"


def translated(error: Exception, path: str, offset: int | None = None, verb: str = "read") -> Exception:
    """An error of obstore as one of pmerge; `verb` is what failed."""
    kind, text = type(error).__name__, str(error).partition("\n")[0][:300]
    place = "" if offset is None else f" at byte {offset}"
    if isinstance(error, UsageError | InputError):
        return error
    if kind == "PreconditionError" or (offset is not None and _is_missing(error)):
        return ChangedError(f"{path} was replaced or removed during the run", offset=offset)
    if _is_missing(error):
        return InputError(f"cannot {verb} {path}: not found", details=[text])
    if kind in ("PermissionDeniedError", "UnauthenticatedError"):
        hint = "are keys and region those of the bucket?"
        if path.startswith("s3://"):
            hint = "AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_REGION; AWS_SKIP_SIGNATURE=true (public), AWS_REQUEST_PAYER=true"
        return InputError(f"access to {path} is refused", details=[text], hint=hint)
    hint = "run the same command again once the store answers"
    if path.startswith("s3://"):
        hint += "; AWS_REGION and AWS_ENDPOINT_URL name another one"
    return StoreError(f"cannot {verb} {path}{place}: {text}", hint=hint, offset=offset)
