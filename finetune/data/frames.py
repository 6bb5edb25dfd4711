"""What a template writes around the contents of messages, remembered from chat to chat.

To find an answer exactly takes several renderings of its chat. But a template writes only a few
different texts between two contents, and where the answer begins and ends among them is the same
each time. So the exact search is done once for each such text, and a chat of a hundred turns is
rendered once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from finetune.data.types import Messages

Places = list[tuple[int, int]]
"""Beginning and end of each message's content in a text, in characters."""

MOST_FRAMES = 10_000
"""Frames beyond these are not remembered: rows whose contents are mislocated have one each."""


@dataclass(frozen=True)
class Frame:
    """What stands around the content of an answer."""

    before: str
    """From the end of the content before it."""
    after: str
    """To the beginning of the next content, or to the end of the text."""
    role_before: str
    is_last: bool


@dataclass(frozen=True)
class Frames:
    """Where answers begin and end, by what stands around their contents."""

    _offsets: dict[Frame, tuple[int, int] | None] = field(default_factory=dict)

    def locate(
        self,
        messages: Messages,
        places: Places,
        text: str,
        turn: int,
        search: Callable[[], tuple[int, int] | None],
    ) -> tuple[int, int] | None:
        """Return where an answer begins and ends in a text.

        Args:
            messages: The messages that the text holds.
            places: Where their contents stand in it.
            text: The rendered messages.
            turn: The number of the answer's message.
            search: Finds the answer exactly; None if it is not whole in the text.
        """
        start, end = places[turn]
        is_last = turn + 1 == len(places)
        before = text[places[turn - 1][1] : start]
        after = text[end:] if is_last else text[end : places[turn + 1][0]]
        frame = Frame(
            before,
            after,
            messages[turn - 1]["role"],
            is_last,
        )
        if frame not in self._offsets:
            exact = search()
            if len(self._offsets) < MOST_FRAMES:
                self._offsets[frame] = exact and (exact[0] - start, exact[1] - end)
            return exact
        offsets = self._offsets[frame]
        return None if offsets is None else (start + offsets[0], end + offsets[1])


def content_places(messages: Messages, text: str) -> Places | None:
    """Return where the contents of plain messages stand in their rendered text.

    None if a message holds more than text, if users and assistants do not take turns, or if a
    content is not in the text as it is: then every answer is searched for exactly.
    """
    places: Places = []
    position = 0
    previous = "assistant"
    for number, message in enumerate(messages):
        content = message["content"].strip()
        is_plain = content and message.keys() <= {"role", "content", "train"}
        role = message["role"]
        if number > 0 or role != "system":
            expected = "user" if previous == "assistant" else "assistant"
            if role != expected:
                return None
            previous = role
        if not is_plain:
            return None
        start = text.find(content, position)
        if start < 0:
            return None
        position = start + len(content)
        places.append((start, position))
    return places
