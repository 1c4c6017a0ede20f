"""What the tests know of an exercise beside the worked answer in its lesson."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answers:
    """``second`` is right and written differently; ``wrong`` has answers for each mistake, by its key."""

    second: Any
    wrong: dict[str, list]
