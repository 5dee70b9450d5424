"""What a part consists of: items with a name, a function and a time limit, and what becomes of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, FAILED, CRASHED, HUNG, SKIPPED = "passed", "failed", "crashed", "hung", "skipped"
GIVEN_UP = "given up"  # begins the reason of an item that was not tried because of others
BAD = (FAILED, CRASHED, HUNG)
UNAVAILABLE = "unavailable"  # of a contender: its package is missing, or does not do this


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know.

    Attributes:
        device: "cuda" or "cpu"; on the CPU everything is tiny and serves to try the script itself.
        rounds: samples of each contender at most.
        compile: include contenders that are compiled by torch.compile.
        peers: folder with unpacked packages of peers, and where extensions are built.
        faults: add items that abort, hang, raise and fail.
        without: names of contenders that are left out.
        sanitizer: path of compute-sanitizer; default: searched for.
        full: all samples and sizes of the checks on the CPU too.
    """

    device: str = "cuda"
    rounds: int = 31
    compile: bool = True
    peers: str = ""
    faults: bool = False
    without: Sequence[str] = ()
    sanitizer: str = ""
    full: bool = False

    @property
    def tiny(self) -> bool:
        """Whether sizes are those of a trial run."""
        return self.device == "cpu"

    @property
    def few(self) -> bool:
        """Whether checks take a few samples of each operator."""
        return self.tiny and not self.full

    def as_dict(self) -> dict[str, Any]:
        """For the command line of a worker."""
        return asdict(self)


class SkipError(Exception):
    """The item does not apply here; the text says why."""


class WrongError(Exception):
    """A result is not what it must be; the text says which."""


@dataclass
class Context:
    """What an item gets.

    Attributes:
        settings: of the run.
        stage: call it with a few words before every step that might crash; they appear in the record if it does.
        started: call it with the id of a process group that must end with this process, and with 0 when it has ended.
        ours_only: leave out contenders that are not fastlm's.
    """

    settings: Settings
    stage: Callable[[str], None] = lambda words: None
    started: Callable[[int], None] = lambda group: None
    ours_only: bool = False

    @property
    def device(self) -> str:
        """Where the operators run."""
        return self.settings.device


Run = Callable[[Context], "dict[str, Any] | None"]


@dataclass(frozen=True)
class Item:
    """One thing to do.

    Attributes:
        name: unique in its part, words separated by slashes.
        run: does it; what it returns is kept as the item's data.
        limit: seconds after which it counts as hung.
    """

    name: str
    run: Run
    limit: float = 120.0


@dataclass
class Outcome:
    """What became of an item."""

    status: str
    reason: str = ""
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the file."""
        return asdict(self)
