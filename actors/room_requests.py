"""Room asked of Ray for actors that have none, which is what an autoscaler acts upon.

The requests are placement groups without anything in them. Unlike an actor that waits in Ray, one
that is granted can be given back, when the room turns out to be somebody else's: that of a learner
which has just died.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)


class RoomRequests:
    """Requests for room for one actor each, of ``resources``."""

    def __init__(self, resources: Mapping[str, float]) -> None:
        self._bundle = {name: amount for name, amount in resources.items() if amount}
        self._groups: list[PlacementGroup] = []

    def __len__(self) -> int:
        return len(self._groups)

    def keep(self, count: int) -> None:
        """Have so many stand."""
        for group in self._groups[count:]:
            remove_placement_group(group)
        del self._groups[count:]
        while len(self._groups) < count:
            self._groups.append(placement_group([self._bundle]))

    def give_back(self) -> bool:
        """Give back those that were granted; whether there were any."""
        granted = [g for g in self._groups if placement_group_table(g)["state"] == "CREATED"]
        for group in granted:
            remove_placement_group(group)
            self._groups.remove(group)
        return bool(granted)
