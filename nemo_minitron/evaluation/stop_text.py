"""Stop strings in text that is still being generated."""

from __future__ import annotations


def split_at_stop(stop: str | None, text: str, *, last: bool) -> tuple[str, str]:
    """Split text into (text to show, text to hold back because it may begin `stop`).

    Args:
        stop: the stop string; nothing after it is shown.
        last: no more text follows, so only a complete stop string is held back.
    """
    if stop is None:
        return text, ""
    if stop in text:
        return text[: text.index(stop)], stop
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    held = 0 if last else next((size for size in sizes if stop.startswith(text[-size:])), 0)
    return text[: len(text) - held], text[len(text) - held :]
