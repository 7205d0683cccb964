"""Where a report goes; what cannot be written is refused before any work."""

from __future__ import annotations

from pathlib import Path

from vidcompress.report.picture import FORMATS


def check_outputs(page: Path, picture: Path | None) -> None:
    """Tries both paths, leaving what is there as it is.

    Raises:
        ValueError: the picture's name does not say a known format, or both paths are the same.
        OSError: a folder is missing, a path is a folder, or it cannot be written.
    """
    _try("--out", page)
    if picture is None:
        return
    if picture.suffix.lower() not in FORMATS:
        raise ValueError(f"--png {picture}: its ending says the format; accepted: {', '.join(FORMATS)}")
    if picture.resolve() == page.resolve():
        raise ValueError(f"--out and --png are both {page}; give two names")
    _try("--png", picture)


def _try(option: str, path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder; accepted: the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}")
    new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise type(error)(f"{option} {path} cannot be written: {error.strerror}") from error
    if new:
        path.unlink()
