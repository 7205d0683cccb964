"""A run that is being asked, kept beside the results file after every clip, so that an interruption loses no answer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vidcompress.eval.asking import Reply
from vidcompress.eval.results import write_whole


@dataclass
class Progress:
    """The answers of one run so far.

    Attributes:
        path: the file that keeps them; None keeps nothing.
        run: which run it is: all that its answers hang on, such as model, method and versions.
        replies: of the first clips, in their order.
        seconds: that these took.
    """

    path: Path | None
    run: dict[str, Any]
    replies: list[Reply] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def load(cls, path: Path | None, run: dict[str, Any]) -> Progress:
        """What the file holds of this very run; no reply if it is of another, or there is none."""
        progress = cls(path, json.loads(json.dumps(run)))
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path else None
        except (FileNotFoundError, ValueError):
            found = None
        if isinstance(found, dict) and found.get("run") == progress.run:
            progress.replies = [Reply(**reply) for reply in found["replies"]]
            progress.seconds = found["seconds"]
        return progress

    def add(self, reply: Reply, seconds: float) -> None:
        """The next clip's reply, and what all took until then; the file has both when this returns."""
        self.replies.append(reply)
        self.seconds = seconds
        if self.path:
            replies = [asdict(own) for own in self.replies]
            write_whole(self.path, json.dumps({"run": self.run, "replies": replies, "seconds": seconds}))

    def forget(self) -> None:
        """Removes the file: the run is complete, and kept elsewhere."""
        if self.path:
            self.path.unlink(missing_ok=True)
