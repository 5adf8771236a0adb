"""Writing a file whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

__all__ = ["write_atomically"]

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "you may not write there",
    errno.EPERM: "you may not write there",
    errno.ENAMETOOLONG: "its name is too long",
}


def write_atomically(path: str | os.PathLike[str], data: bytes | bytearray) -> None:
    """Write a file so that, whatever happens, the old or the new file is there, and never a part of one.

    An existing file keeps its mode, and a link still points to it.

    Args:
        path: The file.
        data: The whole content.

    Raises:
        OSError: It cannot be written; the message says why.

    Example:
        >>> write_atomically("notes.txt", b"zeros")
        >>> Path("notes.txt").read_bytes()
        b'zeros'
    """
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{path} is a folder; give the file itself.")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: there is no folder {target.parent}. Make it first.")
        if target.exists() and not target.is_file():  # a pipe or a device cannot be replaced
            target.write_bytes(data)
        else:
            _replace(target, data)
    except OSError as error:
        if error.errno is None:
            raise
        reason = _REASONS.get(error.errno, error.strerror)
        raise type(error)(f"{path} cannot be written: {reason}. The old file is unchanged.") from error


def _replace(target: Path, data: bytes | bytearray) -> None:
    mode = None
    if target.exists():
        mode = target.stat().st_mode & 0o7777
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    # Beside the target, since only within one file system a file takes the place of another in one step.
    beside = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            beside.chmod(mode)
        beside.replace(target)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
