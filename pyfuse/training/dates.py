"""Dates as people write them -> ISO 8601: a translation whose examples are made on the spot, as many as are wanted.

    the twenty-third of March, 1987        1987-03-23              a day, in eleven ways
    Sept. 1203                             1203-09                 a month
    from 28 March to 3 April 1987          1987-03-28/1987-04-03   an interval

An answer has the parts in another order than the question, names become numbers, and an interval needs the year, often
the month, twice: each token of it depends on some few of the question, now here, now there. That is what attention over
an encoder's result is for (Bahdanau et al., arXiv:1409.0473).

What is held out is years: no example that is learnt from has one of them, and every example has its year in it. So no
question that is asked in an evaluation can have been seen before, whatever the generator draws.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import date, timedelta

FIRST_YEAR, LAST_YEAR, HELD_OUT_YEARS = 1000, 2999, 100
LONGEST = 64  # characters (in ASCII) that no question and no answer exceeds

_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_SHORT = (
    "Jan.", "Feb.", "Mar.", "Apr.", "May", "June", "July", "Aug.", "Sept.", "Oct.", "Nov.", "Dec."
)  # fmt: skip
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth",
)  # fmt: skip


def years(seed: int) -> tuple[list[int], list[int]]:
    """All years, in two parts: those to learn from, and those held out."""
    shuffled = list(range(FIRST_YEAR, LAST_YEAR + 1))
    random.Random(seed).shuffle(shuffled)
    return sorted(shuffled[HELD_OUT_YEARS:]), sorted(shuffled[:HELD_OUT_YEARS])


def example(generator: random.Random, of_years: Sequence[int]) -> tuple[str, str]:
    """(question, answer), both in ASCII, all of it in one of these years."""
    year = generator.choice(of_years)
    day = date(year, 1, 1) + timedelta(generator.randrange(365))
    kind = generator.random()
    if kind < 0.1:
        return generator.choice(month_forms(day)), f"{day:%Y-%m}"
    if kind < 0.3:
        end = min(day + timedelta(generator.randrange(1, 60)), date(year, 12, 31))
        if end > day:
            return generator.choice(interval_forms(day, end)), f"{day}/{end}"
    return generator.choice(day_forms(day)), f"{day}"


def day_forms(t: date) -> list[str]:
    """With dots the day comes first, with slashes the month: the German and the American custom."""
    d, y, month, short = t.day, t.year, _MONTHS[t.month - 1], _SHORT[t.month - 1]
    return [
        f"{d} {month} {y}",
        f"{month} {d}, {y}",
        f"{d} {short} {y}",
        f"{short} {d}, {y}",
        f"{_WEEKDAYS[t.weekday()]}, {d} {month} {y}",
        f"{d}{_suffix(d)} of {month} {y}",
        f"{month} {d}{_suffix(d)}, {y}",
        f"the {_ordinal(d)} of {month}, {y}",
        f"{y}, {month} {d}",
        f"{d}.{t.month}.{y}",
        f"{t.month}/{d}/{y}",
    ]


def month_forms(t: date) -> list[str]:
    """Of the month of a day."""
    month, short = _MONTHS[t.month - 1], _SHORT[t.month - 1]
    return [f"{month} {t.year}", f"{short} {t.year}", f"{t.month}/{t.year}", f"{t.year}, {month}"]


def interval_forms(t: date, end: date) -> list[str]:
    """From t to a later day of the same year: the year is said once, and so is the month if it is the same."""
    month, last = _MONTHS[t.month - 1], _MONTHS[end.month - 1]
    if t.month == end.month:
        return [
            f"from {t.day} to {end.day} {month} {t.year}",
            f"{month} {t.day}-{end.day}, {t.year}",
            f"{t.day}.-{end.day}.{t.month}.{t.year}",
        ]
    return [
        f"from {t.day} {month} to {end.day} {last} {t.year}",
        f"{month} {t.day} - {last} {end.day}, {t.year}",
        f"{t.day}.{t.month}.-{end.day}.{end.month}.{t.year}",
    ]


def _suffix(day: int) -> str:
    if day in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def _ordinal(day: int) -> str:
    """1 … 31 in words."""
    tens, ones = divmod(day, 10)
    if day <= 20:
        return _ORDINALS[day - 1]
    ten = {2: "twenty", 3: "thirty"}[tens]
    return f"{ten}-{_ORDINALS[ones - 1]}" if ones else "thirtieth"
