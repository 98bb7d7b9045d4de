"""Files that are whole or absent."""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from safetensors import SafetensorError

from sparsekv.errors import UserError, require

logger = logging.getLogger(__name__)

FINAL = "final"  # the folder of a finished training, in that of the run
RUN_CONFIG = "eit_config.json"  # the record of a training, in its folder and beside its adapter
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")  # files that training text is read from


def cache_folder() -> Path:
    """The user's cache folder of this package, or `$SPARSEKV_CACHE`."""
    return Path(os.environ.get("SPARSEKV_CACHE") or user_cache_path("sparsekv", appauthor=False))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader, or a crash at any moment, sees the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        readable(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def keep_in_cache(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a cache that cannot be written costs time, not the run."""
    try:
        write_bytes(path, content)
    except OSError as error:
        logger.debug("not cached in %s: %s", path, error)


def readable(path: Path) -> None:
    """Give a file that was made private the mode that the user's umask gives to new files."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def fill_block(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a Markdown file.

    Raises
    ------
    UserError
        Unless there is one such block.
    """
    block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    filled, count = block.subn(lambda match: f"{match[1]}{text.strip()}\n{match[2]}", path.read_text("utf-8"))
    require(count == 1, f"{path}: expected one block between <!-- {name} --> and <!-- /{name} -->, found {count}")
    write_text(path, filled)


@contextlib.contextmanager
def new_folder(folder: Path, flag: str = "--output_dir") -> Iterator[Path]:
    """Inside, a folder to write to; it becomes `folder` at the end, whole, or nothing is left of it.

    Raises
    ------
    UserError
        Names the flag: `folder` holds something, or cannot be written.
    """
    check_new(folder, flag)
    folder = folder.absolute()
    with writing(folder, flag):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.partial-"))  # of nobody else
    try:
        with writing(folder, flag):
            partial.chmod(0o777 & ~_umask())
            yield partial
            for file in filter(Path.is_file, partial.rglob("*")):
                readable(file)  # some writers of weights make theirs private
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def held(lock: Path, busy: str) -> Iterator[None]:
    """Inside, no other process holds this lock; the system takes it from one that is killed.

    Raises
    ------
    UserError
        `busy`, where another process holds it; or the file cannot be locked.
    """
    file_lock = FileLock(lock)
    try:
        file_lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(busy) from error
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{lock}: cannot be locked ({getattr(error, 'strerror', None) or error})") from error
    try:
        yield
    finally:
        file_lock.release()


def check_new(folder: Path, flag: str = "--output_dir") -> None:
    """Raise UserError, naming the flag, when there is more than an empty folder already."""
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(free, f"{flag} {folder}: exists already; name a new folder")
    require(folder.resolve() != Path.cwd(), f"{flag} {folder}: is the working directory; name a new folder")
    check_writable(folder, flag)


def check_writable(folder: Path, flag: str) -> None:
    """Raise UserError, naming the flag, when a folder (there or not yet) could not be written to. Writes nothing."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    require(existing.is_dir(), f"{flag} {folder}: {existing} is a file; name a folder")
    writable = os.access(existing, os.W_OK | os.X_OK)
    require(writable, f"{flag} {folder}: {existing} is not writable; name a folder that is")
    enough = shutil.disk_usage(existing).free >= 64 * 2**20
    require(enough, f"{flag} {folder}: less than 64 MiB are free there; name a folder on another disk")


@contextlib.contextmanager
def writing(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Inside, whatever cannot be written becomes one line: torch and safetensors have their own errors for a full disk.

    Raises
    ------
    UserError
        Names the flag and what the system said.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} {folder}: cannot be written ({reason})") from error
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch's writer of files
            raise
        raise UserError(f"{flag} {folder}: torch.save failed there; is the disk full?") from error
