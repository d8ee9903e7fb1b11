"""Where a JSON object ends in a text that is still coming."""


class JsonEnd:
    """Counts what opens and closes in JSON; whether it is JSON at all is for a decoder to say.

    Args:
        depth: objects and arrays that are open already.
    """

    def __init__(self, *, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def find(self, text: str, start: int, stop: int, *, depth: int = 0) -> int | None:
        """Go on from `start`; return the place after the end that leaves `depth` open.

        None if it does not come before `stop`. Every character is given once.
        """
        for place in range(start, stop):
            char = text[place]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= depth:
                    return place + 1
        return None
