"""`vidcompress run | report | list | show | flops | bench | eval | table | demo`. Needs the extra [cli]."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script. A mistake ends in one line on stderr and exit code 2.

    `--traceback`, anywhere on the line, shows where an error came from instead.
    """
    full = "--traceback" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--traceback"]
    try:
        from vidcompress.compat import require

        require("cli", "typer", "rich")
        from vidcompress.commands import app

        app(prog_name="vidcompress")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if full:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
