"""The Hugging Face Hub: `hf://org/name@revision/folder`, read by ranges, with nothing stored on
disk.

A revision (a branch, a tag, `refs/pr/1` or a commit; `main` where none is given) is resolved to its
commit once for a plan, and all is read from that commit: a branch that moves changes nothing. One
request gives sizes and hashes of all files of a revision, one more per file the link that its
ranges are read from; links expire and are renewed. Files that lie in the local cache of
huggingface_hub are read from there, and with HF_HUB_OFFLINE=1 nothing else is.

HF_ENDPOINT, HF_TOKEN, HF_HOME and `hf auth login` work as they do for huggingface_hub. Its
HfFileSystem is not used: it makes two requests a range, and takes bytes of another range, or of
another commit, for those asked for.
"""

from __future__ import annotations

import fnmatch
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urljoin, urlsplit

from merge_cli.errors import ChangedError, InputError, StoreError, first_ten
from merge_cli.stores.http import Answer, HttpClient
from merge_cli.stores.local import LocalSource
from merge_cli.stores.store import Entry, Stat, is_glob, match_names

SCHEME = "hf://"
DEFAULT_ENDPOINT = "https://huggingface.co"
_OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")


class Place(NamedTuple):
    """A path taken apart: `hf://org/name@revision/inside`; `inside` is "" for the repository's
    root.
    """

    repo: str
    revision: str
    inside: str

    @property
    def root(self) -> str:
        return f"{SCHEME}{self.repo}@{quote(self.revision, safe='*?[]!')}"


class File(NamedTuple):
    """A file of a commit. `version` is the hash of its content, as git (sha1 of the blob) or LFS
    (sha256) has it.
    """

    num_bytes: int
    version: str


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository: its files by path."""

    commit: str
    files: Mapping[str, File]


class HubSource:
    """A file of a commit."""

    def __init__(self, store: HubStore, path: str, place: Place, commit: str, file: File) -> None:
        self.path = path
        self.num_bytes, self.version = file
        self._store = store
        self._url = f"{store.endpoint}/{place.repo}/resolve/{commit}/{quote(place.inside)}"
        self._lock = threading.Lock()
        self._link = ""
        cached = store.find_in_cache(place.repo, commit, place.inside)
        self._cached = LocalSource(cached) if cached else None
        if self._cached is not None and self._cached.num_bytes != self.num_bytes:
            self._cached.close()
            self._cached = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset`. Raises ChangedError or StoreError."""
        if offset + len(buffer) > self.num_bytes:
            raise ChangedError(f"{self.path} ends at byte {self.num_bytes}, before what was to be read", offset=self.num_bytes)
        if self._cached is not None:
            self._cached.read_into(offset, buffer)
        elif len(buffer):
            self._store.client.read_range(self._locate, offset, buffer, self.num_bytes, self.path)

    def close(self) -> None:
        if self._cached is not None:
            self._cached.close()

    def _locate(self, stale: str) -> str:
        """The link to the bytes; a new one where `stale` has expired. All threads share it."""
        with self._lock:
            if not self._link or self._link == stale:
                self._link = self._resolve()
            return self._link

    def _resolve(self) -> str:
        if self._store.is_offline:
            raise StoreError(f"{self.path} is damaged in the local cache, and HF_HUB_OFFLINE=1 allows nothing else")
        answer = self._store.client.head(self._url)
        location = answer.headers.get("Location")
        if answer.status not in (200, 302, 303, 307, 308) or (answer.status != 200 and not location):
            raise StoreError(f"cannot read {self.path}: {_reason(answer)}")
        size = answer.headers.get("X-Linked-Size") or (answer.headers.get("Content-Length") if answer.status == 200 else None)
        if size is not None and size != str(self.num_bytes):
            raise ChangedError(f"{self.path} has {size} bytes by its link, and {self.num_bytes} by its listing", offset=0)
        link = urljoin(answer.url, location or "")
        if self._url.startswith("https://") and not link.startswith("https://"):
            raise StoreError(f"{self.path} would be read without encryption, from {urlsplit(link).hostname}")
        return link


class HubStore:
    """Repositories of models. Revisions stay pinned to the commit that was found first, until
    `expand` begins another plan.
    """

    requests_at_once = 16

    def __init__(self) -> None:
        self.endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
        self.is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
        self._lock = threading.Lock()
        self._commits: dict[tuple[str, str], str] = {}  # as the list of branches and tags has them
        self._snapshots: dict[tuple[str, str], Snapshot] = {}

    @cached_property
    def client(self) -> HttpClient:
        from huggingface_hub import get_token

        return HttpClient(self.endpoint, get_token())

    def list(self, path: str) -> Sequence[Entry]:
        place = parse_place(path)
        inside = place.inside + "/" if place.inside else ""
        below = [name[len(inside) :] for name in self._snapshot(place).files if name.startswith(inside)]
        if not below:
            raise InputError(f"cannot list {path}: no such folder in the repository")
        files = {name for name in below if "/" not in name}
        return [Entry(name, "file" if name in files else "folder") for name in sorted({name.split("/")[0] for name in below})]

    def stat(self, path: str) -> Stat | None:
        place = parse_place(path)
        if not place.inside and (place.repo, place.revision) in self._commits:
            return Stat("folder", 0, 0)
        files = self._snapshot(place).files
        if place.inside in files:
            return Stat("file", files[place.inside].num_bytes, 0)
        inside = place.inside + "/"
        return Stat("folder", 0, 0) if not place.inside or any(name.startswith(inside) for name in files) else None

    def open(self, path: str) -> HubSource:
        place = parse_place(path)
        snapshot = self._snapshot(place)
        if place.inside not in snapshot.files:
            raise InputError(f"cannot open {path}: no such file in the repository")
        return HubSource(self, path, place, snapshot.commit, snapshot.files[place.inside])

    def resolve(self, path: str) -> str:
        place = parse_place(path)
        commit = self._commits.get((place.repo, place.revision)) or self._snapshot(place).commit
        return f"{SCHEME}{place.repo}@{commit}" + (f"/{place.inside}" if place.inside else "")

    def check_inside(self, root: str, path: str) -> None: ...

    def expand(self, path: str) -> Sequence[str]:
        """The revisions, and the folders in them, that a pattern means:
        `hf://org/name@stage1-step*`. Pins are made anew.
        """
        place = parse_place(path)
        with self._lock:
            self._commits = {key: commit for key, commit in self._commits.items() if key[0] != place.repo}
            self._snapshots = {key: each for key, each in self._snapshots.items() if key[0] != place.repo}
        if not is_glob(path):
            return [path]
        roots = [place.root]
        if is_glob(place.revision):
            names = self._revisions(place.repo)
            roots = [Place(place.repo, name, "").root for name in names if fnmatch.fnmatchcase(name, place.revision)]
            if not roots:
                raise InputError(
                    f"no branch or tag of {place.repo} matches {place.revision}",
                    details=[f"found  {', '.join(first_ten(names, 'more'))}"],
                    hint=f"see  {self.endpoint}/{place.repo}/tree/main",
                )
        if not place.inside:
            return roots
        found = [each for root in roots for each in match_names(self, root, place.inside)]
        if not found:
            raise InputError(f"nothing matches {path}")
        return found

    def find_in_cache(self, repo: str, commit: str, name: str) -> str | None:
        """The path of a file of a commit in the local cache of huggingface_hub, None where it is
        not there.
        """
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repo, name, revision=commit)
        return found if isinstance(found, str) else None

    def _revisions(self, repo: str) -> Sequence[str]:
        if self.is_offline:
            raise InputError(f"branches of {repo} cannot be listed with HF_HUB_OFFLINE=1", hint=f"name them: {SCHEME}{repo}@NAME")
        answer, refs = self.client.get_json(f"{self.endpoint}/api/models/{repo}/refs")
        if answer.status != 200:
            raise self._refused(answer, repo, "")
        found = {ref["name"]: ref["targetCommit"] for kind in ("tags", "branches") for ref in refs.get(kind, ())}
        with self._lock:
            self._commits |= {(repo, name): commit for name, commit in found.items()}
        return sorted(found)

    def _snapshot(self, place: Place) -> Snapshot:
        key = place.repo, place.revision
        with self._lock:
            found = self._snapshots.get(key)
        if found is None:
            found = self._cached_snapshot(place) if self.is_offline else self._request_snapshot(place)
            with self._lock:
                found = self._snapshots.setdefault(key, found)
                self._snapshots.setdefault((place.repo, found.commit), found)
        return found

    def _request_snapshot(self, place: Place) -> Snapshot:
        revision = self._commits.get((place.repo, place.revision), place.revision)
        url = f"{self.endpoint}/api/models/{place.repo}/revision/{quote(revision, safe='')}?blobs=true"
        answer, content = self.client.get_json(url)
        if answer.status != 200:
            raise self._refused(answer, place.repo, place.revision)
        try:
            return Snapshot(content["sha"], {each["rfilename"]: _file_of(each) for each in content["siblings"]})
        except (KeyError, TypeError) as error:
            raise StoreError(f"the listing of {place.root} is not as expected: {error!r:.200}") from error

    def _cached_snapshot(self, place: Place) -> Snapshot:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(place.repo, revision=place.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise InputError(
                f"{place.root} is not in the local cache, and HF_HUB_OFFLINE=1 allows nothing else",
                hint=f"on a machine with network:  hf download {place.repo} --revision {place.revision}",
            ) from None
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return Snapshot(folder.name, {path.relative_to(folder).as_posix(): _file_in_cache(path) for path in paths})

    def _refused(self, answer: Answer, repo: str, revision: str) -> InputError:
        code = answer.headers.get("X-Error-Code", "")
        page = f"{self.endpoint}/{repo}"
        if code == "GatedRepo" or answer.status == 403:
            return InputError(f"access to {repo} is refused: {_reason(answer)}", hint=f"ask for it at {page}, then  hf auth login")
        if code == "RevisionNotFound":
            return InputError(f"{repo} has no branch, tag or commit {revision}", hint=f"see  {page}/tree/main")
        if answer.status in (401, 404):
            return InputError(
                f"there is no model {repo} on {urlsplit(self.endpoint).hostname}, or no access to it: {_reason(answer)}",
                hint="hf auth login, or HF_TOKEN=..., for private and gated repositories",
            )
        return InputError(f"cannot list {repo}: {_reason(answer)}")


STORE = HubStore()


def parse_place(path: str) -> Place:
    """Raises InputError unless `path` is hf://org/name, with or without a revision and a folder."""
    first, _, rest = path.removeprefix(SCHEME).partition("/")
    name, _, inside = rest.partition("/")
    name, _, revision = name.partition("@")
    if revision == "refs":  # refs/pr/1, the one kind of revision with slashes that is typed as it is
        kind, _, inside = inside.partition("/")
        number, _, inside = inside.partition("/")
        revision = f"refs/{kind}/{number}"
    if not first or not name or "@" in first or first in _OTHER_KINDS:
        raise InputError(f"{path} names no model on the Hub", details=["expected  hf://org/name, hf://org/name@revision/folder"])
    return Place(f"{first}/{name}", unquote(revision) or "main", inside.strip("/"))


def _file_of(sibling: Mapping[str, Any]) -> File:
    lfs = sibling.get("lfs")
    return File(sibling["size"], f"sha256 {lfs['sha256']}" if lfs else f"git {sibling['blobId']}")


def _file_in_cache(path: Path) -> File:
    """The name of a blob in the cache is its hash."""
    name = path.resolve().name
    return File(path.stat().st_size, f"{'sha256' if len(name) == 64 else 'git'} {name}")


def _reason(answer: Answer) -> str:
    return answer.headers.get("X-Error-Message") or f"the server answered {answer.status}"
