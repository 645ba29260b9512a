"""A folder of one engine inside the user's, locked as long as the engine lives; those of dead engines are removed.

Knows folders and locks. Refuses to know pages beyond the names of their files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re

from jaxpaged.config import ConfigError
from jaxpaged.offload import page_file
from jaxpaged.offload.files import Files

_OURS = re.compile(r"jaxpaged-offload-[0-9]+-[0-9]+")
_LOCK = "lock"


class Folder:
    """A private folder, mode 0700. The system drops its lock when the process ends, however that comes about.

    A folder may be removed by whoever holds its lock, and is removed only with nothing but our files in it.
    """

    def __init__(self, offload_dir: str, files: Files):
        """Make a folder in the user's, after those of dead engines were removed.

        Raises:
          ConfigError: no folder can be made and locked there.
        """
        self._files = files
        self._close = contextlib.ExitStack()
        try:
            with contextlib.ExitStack() as undo:
                self._parent = files.open_parent(offload_dir)
                undo.callback(files.close, self._parent, offload_dir)
                self._remove_left_overs()
                self.name, self.descriptor = self._make(undo)
                self._close = undo.pop_all()
        except OSError as error:
            raise ConfigError(f"offload_dir: no folder can be made and locked in {offload_dir}: {error.strerror}") from None

    def close(self) -> None:
        """Remove the folder, as far as that can be done, and unlock it."""
        with contextlib.suppress(OSError):
            self._close.close()

    def _make(self, undo: contextlib.ExitStack) -> tuple[str, int]:
        files = self._files
        for number in itertools.count():
            name = f"jaxpaged-offload-{os.getpid()}-{number}"
            with contextlib.ExitStack() as undo_this:
                try:
                    files.make_folder(name, self._parent)
                except FileExistsError:  # of this process, or of one of the same number on another machine
                    continue
                undo_this.callback(_quietly, files.remove_folder, name, self._parent)
                folder = files.open_folder(name, self._parent)
                undo_this.callback(files.close, folder, name)
                lock = files.create(_LOCK, folder)
                undo_this.callback(files.close, lock, _LOCK)
                undo_this.callback(self._empty, folder)
                # Between these calls another engine may have taken it for a left-over, and then this name is not ours any more.
                if files.lock(lock, _LOCK) and files.is_at(lock, _LOCK, folder):
                    undo.push(undo_this.pop_all())
                    return name, folder
        raise OSError("unreachable")

    def _remove_left_overs(self) -> None:
        """Remove the folders that nobody has locked, as far as that can be done."""
        with contextlib.suppress(OSError):
            for name in filter(_OURS.fullmatch, self._files.names(self._parent)):
                with contextlib.suppress(OSError):
                    self._remove_left_over(name)

    def _remove_left_over(self, name: str) -> None:
        files = self._files
        with contextlib.ExitStack() as undo:
            folder = files.open_folder(name, self._parent)
            undo.callback(files.close, folder, name)
            if files.stat(folder, name).st_uid != os.geteuid():
                return
            lock = files.open_lock(_LOCK, folder)
            undo.callback(files.close, lock, _LOCK)
            if files.lock(lock, _LOCK) and files.is_at(lock, _LOCK, folder):
                self._empty(folder)
                files.remove_folder(name, self._parent)

    def _empty(self, folder: int) -> None:
        """Remove our files; the lock's last, and only when nothing else is left: without it the folder is nobody's to remove."""
        files = self._files
        with contextlib.suppress(OSError):
            for name in filter(page_file.is_file_name, files.names(folder)):
                with contextlib.suppress(OSError):
                    files.remove_file(name, folder)
            if files.names(folder) == [_LOCK]:
                files.remove_file(_LOCK, folder)


def _quietly(function, *args) -> None:
    with contextlib.suppress(OSError):
        function(*args)
