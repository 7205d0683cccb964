"""`vidcompress run | list | show | demo`. Needs the extra [cli]; `run` and `demo` need [video] too."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script. A user's mistake ends in one line on stderr and exit code 2."""
    try:
        from vidcompress.compat import require

        require("cli", "typer", "rich")
        from vidcompress.commands import app

        app(prog_name="vidcompress")
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
