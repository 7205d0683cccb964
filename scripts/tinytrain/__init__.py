"""How the tiny models of vidcompress.eval are built and trained; `scripts/train_tiny.py` is the command."""
