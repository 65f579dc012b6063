"""Sending to the Hub by huggingface_hub: `hf://org/name@branch`.

    1  large files are uploaded; no commit has them, so nobody sees them
    2  one commit has all files, large ones by their hash, and only if the branch has not moved

A branch that does not exist begins at the first commit of the repository, which holds its
`.gitattributes` alone, and not at the model on `main`. Large files that the Hub has are not sent
again: it is asked by their hash.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from merge_cli.errors import InputError, OutputError, PmergeError, UsageError
from merge_cli.stores.hub import HubStore, parse_place
from merge_cli.stores.upload import Outgoing, There

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_AT_ONCE = 8


class HubTarget:
    """A branch of a repository, or a folder in it."""

    def __init__(self, address: str) -> None:
        self.place = parse_place(address)
        if re.fullmatch("[0-9a-f]{40}", self.place.revision):
            raise InputError(f"{address} is a commit, which never changes", hint=f"name a branch:  hf://{self.place.repo}@merged")
        self._prefix = self.place.inside + "/" if self.place.inside else ""
        self._head = ""
        self._is_new = False

    def look(self, ours: Collection[str]) -> Mapping[str, There]:
        with self._errors():
            found = self._find_head()
        self._head = found.sha
        there = {}
        for each in found.siblings or ():
            if each.rfilename.startswith(self._prefix):
                digest = f"sha256 {each.lfs['sha256']}" if each.lfs else f"git {each.blob_id}"
                there[each.rfilename[len(self._prefix) :]] = There(each.size or 0, digest)
        return there

    def send(self, files: Sequence[Outgoing], title: str, on_sent: Callable[[int], None]) -> str:
        from huggingface_hub import CommitOperationAdd

        repo, branch = self.place.repo, self.place.revision
        commit = self._head
        if files:
            with self._errors():
                if self._is_new:
                    self._api.create_branch(repo, branch=branch, revision=self._head)
                    self._is_new = False
                adds = [CommitOperationAdd(self._prefix + each.name, _content(each)) for each in files]
                for first in range(0, len(adds), _AT_ONCE):
                    some = slice(first, first + _AT_ONCE)
                    self._api.preupload_lfs_files(repo, adds[some], revision=branch, num_threads=_AT_ONCE, free_memory=False)
                    on_sent(sum(each.num_bytes for each in files[some]))
                made = self._api.create_commit(repo, adds, commit_message=title, revision=branch, parent_commit=self._head)
                commit = made.oid
        return f"hf://{repo}@{commit}" + (f"/{self.place.inside}" if self.place.inside else "")

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi, get_token

        token = get_token()
        if token is None:
            raise UsageError("pushing to the Hub needs a token that may write", hint="hf auth login, or HF_TOKEN=...")
        return HfApi(endpoint=HubStore().endpoint, token=token)

    def _find_head(self) -> Any:
        """The newest commit of the branch, or that which a new branch begins at."""
        from huggingface_hub.errors import RevisionNotFoundError

        api, repo = self._api, self.place.repo
        try:
            return api.model_info(repo, revision=self.place.revision, files_metadata=True)
        except RevisionNotFoundError:
            if self.place.revision.startswith("refs/"):
                raise
            self._is_new = True
            return api.model_info(repo, revision=api.list_repo_commits(repo)[-1].commit_id, files_metadata=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of huggingface_hub as those of pmerge, and none of its bars or warnings."""
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        had_bars = not are_progress_bars_disabled()
        try:
            with warnings.catch_warnings(action="ignore"):
                disable_progress_bars()
                yield
        except PmergeError:
            raise
        except Exception as error:  # RuntimeError, ValueError, OSError and HTTP errors of two libraries
            raise self._translated(error) from error
        finally:
            if had_bars:
                with warnings.catch_warnings(action="ignore"):
                    enable_progress_bars()

    def _translated(self, error: Exception) -> PmergeError:
        from huggingface_hub.errors import RepositoryNotFoundError

        repo, branch, endpoint = *self.place[:2], HubStore().endpoint
        cause = next((each for each in (error, error.__cause__) if getattr(each, "response", None) is not None), error)
        status = getattr(getattr(cause, "response", None), "status_code", 0)
        text = str(getattr(cause, "server_message", None) or cause).strip().partition("\n")[0][:200]
        if isinstance(cause, RepositoryNotFoundError) or status == 401:
            return InputError(
                f"there is no model {repo} on {urlsplit(endpoint).hostname}, or the token may not see it",
                hint=f"hf repos create {repo} --private  makes it;  hf auth whoami  shows whose token is used",
            )
        if status == 403:
            return InputError(
                f"the token may not write to {repo}: {text}",
                hint=f"hf auth login  with a token that may, of {endpoint}/settings/tokens",
            )
        if status == 412:
            return OutputError(
                f"{branch} of {repo} moved during the push; nothing was added to it", hint="run the same command again"
            )
        return OutputError(
            f"cannot push to {repo}: {text}", hint="run the same command again: the files that are there are not sent again"
        )


def open_target(address: str) -> HubTarget:
    return HubTarget(address)


def _content(file: Outgoing) -> str | bytes:
    return file.content if isinstance(file.content, bytes) else str(file.content)
