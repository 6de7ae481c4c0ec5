"""The console, mistakes that one line explains, and checks that turn them up before any long work."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console


class UserError(Exception):
    """A mistake of the user's; the command line prints it as one line and leaves with code 2."""


def stdout() -> Console:
    """Return a console for stdout; a pipe has no width of its own and would be wrapped at 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 100))


def first_line(error: BaseException) -> str:
    """Return an error's first line that says something, or its type where it has no text.

    A line that ends in a colon only announces what the next one says.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: said + 1]) or type(error).__name__


def require(extra: str, *modules: str) -> None:
    """Check that optional packages are installed.

    Parameters
    ----------
    extra : str
        The extra of csp_ext that brings them.
    *modules : str
        Import names.

    Raises
    ------
    UserError
        Naming what is missing and the line that installs it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed; try: pip install 'csp_ext[{extra}]'")


def check_target(path: Path, suffixes: tuple[str, ...]) -> None:
    """Check that a file of one of these kinds can be written to `path`, without touching it."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: the name must end in one of {', '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: the folder {path.absolute().parent} does not exist")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.absolute().parent} is not writable")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` that takes its place only when the block succeeds."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private; give it the permissions that an ordinary new file gets.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
