"""How many tokens to draft: so many that they are likely to save more time than their verification takes.

The unit of time is what a row takes of a call without drafts. A drafted token costs c more of it, accepted or not. If
each is accepted with probability a, given that those before it were, then a draft of k tokens brings on average

    tokens(k) = 1 + a + a² + … + a^k       for the time       time(k) = 1 + c·k

and k is chosen for the largest tokens(k) / time(k) (Leviathan et al., arXiv:2211.17192, theorem 3.8). a is an
exponential average of what became of drafts of that kind, c the median of what recent calls have taken (`Costs`). The
longer drafts have been right the longer the next ones are, up to the most that is allowed; where they are wrong they
become shorter. Where even one token promises nothing there are none for some steps, then one for a trial, after more
steps each time that fails. What the drafts of a row have lost is never more than ALLOWANCE steps and a SHARE of all.
"""

from __future__ import annotations

from collections import deque
from statistics import median

MOST = 15  # tokens of a draft: with the last of the text they are a call of 16, which stays exact (`rows.FEW`)
LEAST_GAIN = 0.03  # beyond 1, of tokens / time
ALLOWANCE, SHARE = 1.5, 0.02
LONGEST_PAUSE = 64  # steps between trials
_MEMORY = 1 / 12  # weight of the latest token in the average
# Of each kind (drafts.Lookup: matches of 2, 4, 8, 16 and more tokens; kind 0: a draft model), before anything is known.
_FIRST = (0.7, 0.45, 0.7, 0.85, 0.92)
_CREDIT = 8.0  # steps that earlier gains can stand for

FIRST_COST = 0.15  # of one row: of its 16-bit weights a CPU reads most of the time
_SEEN = 15


class Pace:
    """Of one row."""

    def __init__(self) -> None:
        self._rates = list(_FIRST)
        self._credit = ALLOWANCE
        self._pause = self._paused = 0

    def length(self, kind: int, cost: float, most: int) -> int:
        """Of the next draft; 0: none. cost: c. most: that it can have."""
        most = min(most, int(self._credit / cost)) if cost > 0 else most
        best = best_length(self._rates[kind], cost, most)
        if best or most < 1:
            return max(best, 0)
        self._paused += 1
        if self._paused <= self._pause:
            return 0
        self._paused = 0
        return 1

    def learn(self, kind: int, proposed: int, accepted: int, cost: float) -> None:
        """What became of a draft. A call without one has proposed nothing."""
        self._credit = min(_CREDIT, self._credit + SHARE + accepted - cost * proposed)
        outcomes = [1.0] * accepted + [0.0] * (accepted < proposed)
        for outcome in outcomes:
            self._rates[kind] += (outcome - self._rates[kind]) * _MEMORY
        if accepted:
            self._pause = 0
        elif proposed:
            self._pause = min(2 * self._pause + 1, LONGEST_PAUSE)


def best_length(rate: float, cost: float, most: int) -> int:
    """The k ≤ most with the largest tokens(k) / time(k); 0 where that is not worth it."""
    best, gain = 0, 1 + LEAST_GAIN
    tokens = power = 1.0
    for k in range(1, most + 1):
        power *= rate
        tokens += power
        if tokens / (1 + cost * k) > gain:
            best, gain = k, tokens / (1 + cost * k)
    return best


class Costs:
    """c of calls with so many rows, from the times that calls have taken.

    first: c of one row, before it has been measured. Of R rows c is more, since each has a smaller share of the call:
    if a token more costs u and a call of one row 1, a row's share is (1 + u·(R - 1)) / R.
    """

    def __init__(self, first: float = FIRST_COST) -> None:
        self._first = first
        self._plain: dict[int, deque[float]] = {}
        self._more: dict[int, deque[float]] = {}

    def of(self, rows: int) -> float:
        """c, if all rows of a call are so many."""
        return median(self._of(rows))

    def learn(self, rows: int, drafted: int, seconds: float) -> None:
        """A call has taken that time, with so many drafted tokens of all rows."""
        plain = self._plain.setdefault(rows, deque(maxlen=_SEEN))
        if not drafted:
            plain.append(seconds)
        elif plain:
            usual = median(plain)
            self._of(rows).append(max(0.0, seconds / usual - 1) * rows / drafted)

    def _of(self, rows: int) -> deque[float]:
        if rows not in self._more:
            first = self._first * rows / (1 + self._first * (rows - 1))
            self._more[rows] = deque([first] * (_SEEN // 3), maxlen=_SEEN)
        return self._more[rows]
