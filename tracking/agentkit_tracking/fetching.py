"""Releases as local folders, every file checked against its hash."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from agentkit.errors import ReleaseError
from agentkit_tracking.home import connect, home
from agentkit_tracking.manifest import Manifest, read_release

if TYPE_CHECKING:
    from agentkit_tracking.lookup import Version

_log = logging.getLogger(__name__)


def fetch_folder(folder: Path) -> tuple[Path, Manifest]:
    """A release folder, every file checked against its hash; a folder named by a release id must have that id.

    Raises:
        ReleaseError: it is none, or not intact.
    """
    return folder, read_release(folder, folder.name if _is_release_id(folder.name) else None)


def fetch_version(version: Version) -> tuple[Path, Manifest]:
    """A version's release as a local folder, every file checked against its hash.

    Raises:
        ReleaseError: it cannot be fetched, or is not intact.
    """
    _require_release_id(version)  # before a path is made of it
    folder = home() / "releases" / version.release_id
    if folder.exists():
        try:
            return folder, _checked(version, folder)
        except ReleaseError as e:
            aside = folder.with_name(f"damaged-{uuid.uuid4().hex[:8]}-{folder.name[:12]}")
            _log.warning("the local copy of %s is damaged (%s); it is kept as %s and fetched anew", version, e, aside)
            with suppress(FileNotFoundError):  # another process was faster
                os.replace(folder, aside)
    if not folder.exists():
        with _downloaded(version) as got:
            try:
                os.replace(got, folder)  # whole or not at all
            except OSError:
                if not folder.exists():  # unless another process was faster
                    raise
    return folder, _checked(version, folder)


def check_stored(version: Version) -> None:
    """Check the release as the store holds it, which others will fetch; one fetched earlier proves nothing of it.

    Raises:
        ReleaseError: it cannot be fetched, or is not intact.
    """
    with _downloaded(version):
        pass


def _is_release_id(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _require_release_id(version: Version) -> None:
    if not _is_release_id(version.release_id):
        raise ReleaseError(f"{version} carries no release id; it was not registered by agentkit")


def _checked(version: Version, folder: Path, called: str | None = None) -> Manifest:
    _require_release_id(version)
    manifest = read_release(folder, version.release_id, called=called)
    if manifest.system != version.name:
        raise ReleaseError(f"{version} holds a release of {manifest.system!r}")
    return manifest


@contextmanager
def _downloaded(version: Version) -> Iterator[Path]:
    """The store's copy of a release, checked, in a scratch folder beside the fetched ones."""
    connect()
    import mlflow

    releases = home() / "releases"
    releases.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=releases, ignore_cleanup_errors=True) as scratch:
        try:
            got = mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.number}", dst_path=scratch)
        except Exception as e:
            raise ReleaseError(f"the artifacts of {version} cannot be fetched: {e}") from e
        _checked(version, Path(got), f"the store's copy of {version}")
        yield Path(got)
