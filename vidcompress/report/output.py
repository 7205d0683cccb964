"""Where a report goes; what cannot be written is refused before any work."""

from __future__ import annotations

from pathlib import Path

from vidcompress.report.picture import FORMATS


def check_outputs(page: Path, picture: Path | None) -> None:
    """Tries both paths, leaving what is there as it is.

    Raises:
        ValueError: a folder is missing, a path is a folder, both are the same, or the picture's name does not say a
            known format.
        OSError: a path cannot be written.
    """
    try_output("--out", page)
    if picture is None:
        return
    if picture.suffix.lower() not in FORMATS:
        raise ValueError(f"--png {picture}: its ending says the format; accepted: {', '.join(FORMATS)}")
    if picture.resolve() == page.resolve():
        raise ValueError(f"--out and --png are both {page}; give two names")
    try_output("--png", picture)


def try_output(option: str, path: Path, make_folder: bool = False) -> None:
    """Tries whether a file can be written, leaving what is there as it is.

    Args:
        option: what asked for it, for the message.
        make_folder: a missing folder is made, instead of being refused.

    Raises:
        ValueError: the path is a folder, or its folder is missing.
        OSError: it cannot be written.
    """
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder; accepted: the name of a file")
        if not path.parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {path.parent}")
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise type(error)(f"{option} {path} cannot be written: {error.strerror}") from error
