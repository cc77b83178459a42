"""Which pages of a cache are free, who holds the others, and which tokens they are of: numbers alone, no tensors."""

from __future__ import annotations

from collections import OrderedDict
from itertools import count
from typing import NamedTuple

Tokens = tuple[int, ...]


class Known(NamedTuple):
    """A full page of known tokens: its number in the chain of pages, and where it lies."""

    number: int
    page: int


class Pages:
    """Pages 0 … count - 1 with a count of holders for each.

    A full page is known by its tokens and by the known page before it, so that a prompt which begins as an earlier one
    finds the pages of that one: what a page holds depends on all tokens before it. A known page that nobody holds any
    more stays until its room is needed; the one that has been idle longest is given up first.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._known: dict[tuple[int, Tokens], Known] = {}
        self._key: dict[int, tuple[int, Tokens]] = {}  # of a known page
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest first
        self._numbers = count(1)

    @property
    def room(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that nobody holds, whose tokens are known."""
        return len(self._idle)

    @property
    def in_use(self) -> int:
        """Pages that somebody holds."""
        return self.total - self.room

    def holders(self, page: int) -> int:
        return self._holders[page]

    def take(self) -> int:
        """A page for one holder. IndexError: there is no room."""
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._idle), -1)
            if page < 0:
                raise IndexError("no page is free")
            del self._idle[page]
            self.forget(page)
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One holder more."""
        self._idle.pop(page, None)
        self._holders[page] += 1

    def drop(self, page: int) -> None:
        """One holder less."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._key:
                self._idle[page] = None
            else:
                self._free.append(page)

    def new_number(self) -> int:
        """For the beginning of chains that share nothing with others."""
        return next(self._numbers)

    def find(self, before: int, tokens: Tokens) -> Known | None:
        """The page of these tokens after the page with the number `before`; 0 is the beginning of a sequence."""
        return self._known.get((before, tokens))

    def learn(self, before: int, tokens: Tokens, page: int) -> int:
        """The number of the page of these tokens, which is `page` unless one is known already."""
        key = before, tokens
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Known(next(self._numbers), page)
            self._key[page] = key
        return known.number

    def forget(self, page: int) -> None:
        """Its tokens, since others will be written there."""
        key = self._key.pop(page, None)
        if key is not None:
            del self._known[key]

    def forget_idle(self) -> None:
        """Give up all pages that nobody holds."""
        for page in self._idle:
            self.forget(page)
            self._free.append(page)
        self._idle.clear()
