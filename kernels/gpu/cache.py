"""Where compiled kernels are kept when Triton's own cache directory cannot be written."""

import contextlib
import errno
import os
import tempfile
import warnings

import triton
from triton.runtime.cache import FileCacheManager

# Not to be written: permissions, a read-only or full file system, a quota, a file where a folder should be.
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}


class Fallback(FileCacheManager):
    """Triton's cache, with a folder of this process for what cannot be written there; what is there already is read."""

    folder: tempfile.TemporaryDirectory | None = None

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        try:
            super().__init__(key, override=override, dump=dump)
        except OSError as problem:
            if problem.errno not in UNWRITABLE:
                raise
            self.key = key
            self._move()

    def put(self, data: object, filename: str, binary: bool = True) -> str:
        try:
            return super().put(data, filename, binary)
        except OSError as problem:
            if problem.errno not in UNWRITABLE:
                raise
            self._move()
            return super().put(data, filename, binary)

    def _move(self) -> None:
        if Fallback.folder is None:
            Fallback.folder = tempfile.TemporaryDirectory(prefix="fastconv-triton-")
        self.cache_dir = os.path.join(Fallback.folder.name, self.key)
        self.lock_path = os.path.join(self.cache_dir, "lock")
        os.makedirs(self.cache_dir, exist_ok=True)


def degraded(problem: OSError) -> bool:
    """Whether to try again after `problem`: makes Triton use `Fallback` if its directory was the reason, with a warning."""
    manager = triton.knobs.cache.manager_class
    if problem.errno not in UNWRITABLE or manager not in (None, FileCacheManager):
        return False
    triton.knobs.cache.manager_class = Fallback
    where = f" ({problem.filename})" if problem.filename else ""
    with contextlib.suppress(Exception):  # a warning made an error is no reason to fail here
        text = f"fastconv: Triton's cache directory {triton.knobs.cache.dir} cannot be written: {problem.strerror}{where}"
        warnings.warn(f"{text}; kernels are compiled anew in each process. TRITON_CACHE_DIR names another", RuntimeWarning, stacklevel=2)
    return True
