"""`python -m vidcompress`: the console script by another way."""

from vidcompress.cli import main

if __name__ == "__main__":
    main()
