"""One bad item fails alone, also at a server that refuses the whole request for it.

A list that was refused is halved and asked again, until the items are found that are refused by
themselves: at most 2n - 1 requests for n items, about 2k·log₂(n) when k of them are bad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reward_service.score import ModelScores, RewardUnavailable, ScoreItem


class Refused(ValueError):
    """The server has understood where the request belongs, but will not score it (4xx)."""


class Unreadable(RuntimeError):
    """The answer does not say which score belongs to which item."""


class KeepsFailing(RewardUnavailable):
    """The server answered 500 each time: it is broken, or stumbles over one of the items."""


Part = ModelScores | Refused | Unreadable | KeepsFailing
"""What became of some neighbouring items: their answer, or why a single one was not scored."""


class Isolation:
    """Asks for the items of one call, in order.

    Args:
        ask: One request for a list. The flag says whether to wait and try again after a 500; once
            one was waited for in vain, the requests that look for its cause do not wait again.
        still_works: Whether the server scores what it has scored before; asked after the first
            500 that stayed. Raises ``RewardUnavailable`` when not.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[ScoreItem], bool], ModelScores],
        still_works: Callable[[], None],
    ) -> None:
        self._ask = ask
        self._still_works = still_works
        self._patient = True

    def parts(self, items: Sequence[ScoreItem]) -> list[Part]:
        """Answers and failures that together are as many as the items.

        Raises:
            What ``ask`` and ``still_works`` raise that no single item can be blamed for.
        """
        try:
            return [self._ask(items, self._patient)]
        except (Refused, Unreadable) as error:
            problem: Part = error
        except KeepsFailing as error:
            problem = error
            if self._patient:
                self._patient = False
                self._still_works()
        if len(items) == 1:
            return [problem]
        middle = len(items) // 2
        return self.parts(items[:middle]) + self.parts(items[middle:])
