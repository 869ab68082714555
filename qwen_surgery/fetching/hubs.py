"""The hubs' own clients, which do the transfer: they resume, retry and write. Imported when wanted."""

from __future__ import annotations

import glob
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused, SurgeryError, ToolFailed
from qwen_surgery.fetching.listing import Listing, RemoteFile
from qwen_surgery.parsing import DATA_ERRORS, reason

#: What can be done about a network, for the end of a message.
_AGAIN = "run the same command again: it goes on where it stopped"


class Hub(ABC):
    """A hub at *endpoint*; None for the one that its client takes unasked, which its own variables may name.

    The user's token only goes where the client sends it unasked: an *endpoint* given here gets none.
    """

    def __init__(self, endpoint: str | None) -> None:
        self.endpoint = endpoint

    @abstractmethod
    def listing(self, repo: str, revision: str | None) -> Listing:
        """What *repo* holds. Refused when it or the revision is not there or not ours to see, ToolFailed when
        the hub does not answer."""

    def sweep(self, folder: Path) -> None:
        """Remove what a killed run left in *folder* and no later one goes on with. Nobody else may be
        fetching into it."""
        return

    @abstractmethod
    def download(self, listing: Listing, names: Iterable[str], folder: Path) -> None:
        """Get the files *names* of *listing* into *folder*. Raises as :meth:`listing` does."""


class HuggingFace(Hub):
    """huggingface.co, or a mirror that speaks its protocol (HF_ENDPOINT)."""

    @property
    def _token(self) -> bool | None:
        return False if self.endpoint else None

    def listing(self, repo: str, revision: str | None) -> Listing:
        from huggingface_hub import HfApi

        with self._asking(repo, revision):
            api = HfApi(endpoint=self.endpoint, token=self._token)
            info = api.model_info(repo, revision=revision, files_metadata=True)
        return Listing.of(repo, str(info.sha), map(_from_sibling, info.siblings or ()))

    def sweep(self, folder: Path) -> None:
        for path in (folder / ".cache/huggingface/download").glob("*.incomplete"):
            # Newer clients give each try a name of its own, so that no other finds it.
            if re.search(r"\.[0-9a-f]{8}\.incomplete$", path.name):
                path.unlink(missing_ok=True)

    def download(self, listing: Listing, names: Iterable[str], folder: Path) -> None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        with self._asking(listing.repo, listing.revision):
            snapshot_download(
                listing.repo,
                revision=listing.revision,
                local_dir=folder,
                allow_patterns=[glob.escape(name) for name in names],
                endpoint=self.endpoint,
                token=self._token,
            )

    @contextmanager
    def _asking(self, repo: str, revision: str | None) -> Iterator[None]:
        from huggingface_hub import constants, errors

        where = self.endpoint or constants.ENDPOINT
        try:
            yield
        except errors.GatedRepoError as error:
            raise Refused(
                f"{where}: {repo} is gated", hint="accept its terms there, then log in with `hf auth login`"
            ) from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise _no_repository(where, repo, "a private one asks for `hf auth login`") from error
        except errors.RevisionNotFoundError as error:
            raise _no_revision(where, repo, revision) from error
        except Exception as error:
            raise _failed(error, where, "--endpoint or HF_ENDPOINT names a mirror") from error


def _from_sibling(sibling: Any) -> RemoteFile:
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    size = sibling.lfs.size if sibling.lfs else sibling.size
    return RemoteFile(sibling.rfilename, size or 0, sha256, None if sibling.lfs else sibling.blob_id)


class ModelScope(Hub):
    """modelscope.cn, or what MODELSCOPE_ENDPOINT names."""

    def listing(self, repo: str, revision: str | None) -> Listing:
        with self._asking(repo, revision) as api:
            found = api.list_repo_files(repo, "model", revision=revision, recursive=False)
        files = (RemoteFile(file.path, file.size or 0, file.sha256) for file in found if file.type != "tree")
        return Listing.of(repo, revision or "master", files)

    def download(self, listing: Listing, names: Iterable[str], folder: Path) -> None:
        wanted = [listing.files[name] for name in names]
        entries = [{"Path": file.name, "Size": file.size, "Sha256": file.sha256} for file in wanted]
        with self._asking(listing.repo, listing.revision) as api:
            api.download_repo(
                listing.repo, "model", revision=listing.revision, local_dir=folder, file_list=entries
            )

    @contextmanager
    def _asking(self, repo: str, revision: str | None) -> Iterator[Any]:
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm, which the client imports, is
        from modelscope_hub import HubApi, errors

        api = HubApi(endpoint=self.endpoint, token="" if self.endpoint else None)
        where = str(api.legacy.endpoint)
        try:
            yield api
        except errors.NotExistError as error:
            if revision is not None:
                raise _no_revision(where, repo, revision) from error
            raise _no_repository(where, repo, "a private one asks for `modelscope login`") from error
        except (errors.AuthenticationError, errors.PermissionDeniedError, errors.InvalidParameter) as error:
            raise _no_repository(where, repo, "a private one asks for `modelscope login`") from error
        except errors.FileDownloadError as error:
            first = next(iter(error.failed_files.values()), error)
            raise _failed(first, where, "--endpoint or MODELSCOPE_ENDPOINT names another") from error
        except Exception as error:
            raise _failed(error, where, "--endpoint or MODELSCOPE_ENDPOINT names another") from error


#: --from -> the hub.
HUBS: dict[str, type[Hub]] = {"hf": HuggingFace, "modelscope": ModelScope}


def _no_repository(where: str, repo: str, login: str) -> Refused:
    return Refused(f"{where} has no model {repo:.100} for you", hint=f"look at how it is spelled; {login}")


def _no_revision(where: str, repo: str, revision: str | None) -> Refused:
    return Refused(
        f"{where}: {repo} has no revision {revision}, or is not there",
        hint="--revision is a branch, a tag or a commit",
    )


def _failed(error: BaseException, where: str, mirror: str) -> SurgeryError:
    """What to say of an error that a client raised, whatever its kind: kinds differ between releases."""
    said = reason(error)
    if isinstance(error, DATA_ERRORS) and not isinstance(error, OSError):
        return ToolFailed(
            f"{where} does not answer as a hub does: {said}", hint=f"is the address right? {mirror}"
        )
    return ToolFailed(f"{where}: {said}", hint=f"{_AGAIN}; {mirror}")
