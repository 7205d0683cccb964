"""Which of several processes this one is, under torchrun, accelerate launch, or alone."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """One process of a run over one or several hosts.

    Attributes:
        rank: among all processes of all hosts (accelerate's `process_index`), 0 to world_size - 1.
        local_rank: among those of this host: which GPU it takes, and nothing else.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"RANK={self.rank} is not one of WORLD_SIZE={self.world_size} processes")

    @classmethod
    def current(cls) -> Process:
        """As the launcher says in the environment, which accelerate and torchrun both do.

        accelerate's own count is 1 on machines without a GPU, so that every process would answer everything.
        Raises ValueError when one of the variables is missing or no number.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        found = dict(zip(names, (os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_RANK"))))
        if found["WORLD_SIZE"] is None:
            return cls()
        for name, value in found.items():
            if value is None or not value.isdecimal():
                raise ValueError(f"{name}={value!r} beside WORLD_SIZE={found['WORLD_SIZE']}; a launcher sets {names}")
        return cls(*(int(value) for value in found.values() if value is not None))

    def device(self, asked: str | None) -> str:
        """The device of this process: its GPU among those of the host, if there are any.

        Raises ValueError where the same GPU would be given to several processes.
        """
        import torch

        if asked not in (None, "cuda"):
            if self.world_size > 1 and str(asked).startswith("cuda:"):
                raise ValueError(f"device={asked!r} for {self.world_size} processes; leave it out, or say cuda")
            return str(asked)
        if not torch.cuda.is_available():
            if asked == "cuda":
                raise ValueError(f"device='cuda': this torch ({torch.__version__}) sees no GPU; use cpu")
            return "cpu"
        if self.local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ValueError(f"local rank {self.local_rank} has no GPU of its own: there are {count}")
        return f"cuda:{self.local_rank}"
