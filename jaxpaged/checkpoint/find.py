"""Where a model is: a path, or an id on the hub.

Knows names and the hub's cache. Refuses to look into the files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from jaxpaged.checkpoint.files import CheckpointError, shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Everything that is read from a checkpoint, and nothing that could be executed.
HUB_PATTERNS = ["model*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "LICENSE*"]


def resolve(model: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The local directory of a model: a path to one, or the hub id 'organisation/name' of one, downloaded when needed.

    A directory on disk wins over the hub. HF_HUB_OFFLINE, HF_HOME and the hub's cache are honoured by huggingface_hub.

    Raises:
      CheckpointError: it is neither, or the hub does not give it.
    """
    name = os.fspath(model)
    if not name or not name.isprintable():
        raise CheckpointError(f"{shown(name)}: not a usable path")
    try:
        path = Path(name).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # longer than the system allows, a loop of links
        raise CheckpointError(f"{shown(name)}: not a usable path ({getattr(error, 'strerror', None) or error})") from None
    if is_folder and revision is not None:
        raise CheckpointError(f"{name}: is a local directory; a revision ({shown(revision)}) is for a hub id")
    if is_folder:
        return path
    if exists:
        raise CheckpointError(f"{name}: is a file, expected the directory that holds config.json")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such directory (and not a hub id like 'organisation/name')")
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # 0.3 s that a local path need not pay
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    way = "pass the path of a local directory instead"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except GatedRepoError:
        raise CheckpointError(f"{name}: access is restricted; accept its terms on the hub and log in, or {way}") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name}: no revision {revision!r} on the hub") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{name}: no such directory, and no such model on the hub; {way}") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name}: no such directory, not in the hub's cache, and the hub cannot be reached; {way}"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name}: cannot be downloaded ({reason[:200]}); {way}") from None
