"""Guesses at what a text goes on with: cheap to make, right or wrong; `speculative` has them checked by the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from pyfuse.generation.loop import Chooser
from pyfuse.generation.options import Options
from pyfuse.generation.runner import Runner, Slot
from pyfuse.generation.sequence import Row

LEAST_MATCH = 2  # tokens at the end of a text that stand in it before: of one nothing follows
_NOWHERE = -1  # a token that is none


class Drafter(Protocol):
    """Where drafts come from. It keeps what it needs of a row until `forget`."""

    def kind(self, row: Row) -> int | None:
        """Which kind of draft the row can have, drafts of a kind being about as good (see `Pace`); None: none now."""
        ...

    def draft(self, lengths: Mapping[Row, int]) -> dict[Row, list[int]]:
        """At most so many tokens for each row, which `kind` has just been asked of."""
        ...

    def forget(self, row: Row) -> None:
        """The row has ended; one that was never seen is nothing to forget."""
        ...


class Suffixes:
    """A sequence of tokens that grows, and how much of its end it has had before.

    length, end: the longest suffix that ends at `end` too, before the last token: tokens[end - length : end].

    A suffix automaton (Blumer et al., "The smallest automaton recognizing the subwords of a text", 1985): a state for
    each set of substrings that end at the same places, its link to the state of the longest suffix that ends at others
    too. Its cost is O(1) for a token on average, whatever the length, and two states at most.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.length = self.end = 0
        # Of each state: its longest substring, one of the ends of that, its link, and where a token leads.
        self._longest, self._ends, self._links, self._next = [0], [0], [-1], [dict[int, int]()]
        self._last = 0
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        new, state = self._state(self._longest[self._last] + 1, 0, {}), self._last
        state = self._lead(state, token, None, new)
        if state >= 0:
            self._links[new] = self._split(state, token)
        self._last, suffix = new, self._links[new]
        self.length, self.end = self._longest[suffix], self._ends[suffix]
        self._ends[suffix] = len(self.tokens)  # next time the latest is found

    def follow(self, count: int) -> list[int]:
        """What came after the match, `count` tokens; what is beyond the end is as if the text went on like that."""
        after = self.tokens[self.end : self.end + count]
        for i in range(count - len(after)):
            after.append(after[i])
        return after

    def _split(self, state: int, token: int) -> int:
        """Where the token leads from the state, with no longer substrings than that."""
        target, length = self._next[state][token], self._longest[state] + 1
        if self._longest[target] == length:
            return target
        twin = self._state(length, self._links[target], dict(self._next[target]))
        self._ends[twin] = self._ends[target]
        self._lead(state, token, target, twin)
        self._links[target] = twin
        return twin

    def _lead(self, state: int, token: int, old: int | None, new: int) -> int:
        """Lead the token from the state and its links to `new`, as long as it leads to `old`. The state after those."""
        while state >= 0 and self._next[state].get(token) == old:
            self._next[state][token] = new
            state = self._links[state]
        return state

    def _state(self, longest: int, link: int, following: dict[int, int]) -> int:
        self._longest.append(longest)
        self._links.append(link)
        self._next.append(following)
        self._ends.append(len(self.tokens))
        return len(self._longest) - 1


class Lookup:
    """Prompt look-up: what came after the text's last tokens where they stood before.

    Saxena, "Prompt lookup decoding", 2023; but the longest match is followed, not one of a fixed length. It is
    looked for in the prompt, in the new text, and in what an encoder was given. Texts that repeat their prompt gain by
    it: changes to a text or program, summaries, answers with quotations.

    kind: by the number of matching tokens, 2 … 3, 4 … 7, 8 … 15, 16 and more.
    """

    def __init__(self, sources: Sequence[Sequence[int]] | None = None) -> None:
        """sources: for the encoder, of each prompt."""
        self._sources, self._known = sources, dict[Row, tuple[Suffixes, int]]()

    def kind(self, row: Row) -> int | None:
        """See Drafter."""
        known, before = self._known.get(row) or self._begun(row)
        for token in row.tokens[len(known.tokens) - before :]:
            known.append(token)
        return None if known.length < LEAST_MATCH else min(known.length.bit_length() - 1, 4)

    def draft(self, lengths: Mapping[Row, int]) -> dict[Row, list[int]]:
        """See Drafter."""
        found = {}
        for row, count in lengths.items():
            after = self._known[row][0].follow(count)
            found[row] = after[: after.index(_NOWHERE)] if _NOWHERE in after else after
        return found

    def forget(self, row: Row) -> None:
        """See Drafter."""
        self._known.pop(row, None)

    def _begun(self, row: Row) -> tuple[Suffixes, int]:
        source = [] if self._sources is None else [*self._sources[row.prompt], _NOWHERE]
        self._known[row] = Suffixes(source), len(source)
        return self._known[row]


class DraftModel:
    """A smaller model with the same vocabulary, which takes tokens as the row would: by its options, seed and steps.

    Drawn from the same random number, both models' tokens are equal where their distributions are near each other.
    runner: its own. Rows that it has no room for have no drafts.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner, self._slots = runner, dict[Row, Slot]()
        self._sure: dict[Row, int] = {}  # so many of a slot's tokens were the row's
        self._plain: dict[int, tuple[Options, Options]] = {}

    def kind(self, row: Row) -> int | None:
        """See Drafter."""
        if len(row.tokens) >= self._runner.max_tokens:
            return None
        if row not in self._slots:
            if len(self._slots) >= self._runner.sequences:
                return None
            self._slots[row], self._sure[row] = self._runner.begin(row.tokens), 0
        return 0

    def draft(self, lengths: Mapping[Row, int]) -> dict[Row, list[int]]:
        """See Drafter. A draft ends before a stop token."""
        left = self._runner.max_tokens
        ahead = {row: self._copy(row) for row in lengths}
        most = {row: min(n, left - len(row.tokens)) for row, n in lengths.items()}
        found: dict[Row, list[int]] = {row: [] for row in lengths}
        slots = {row: self._caught_up(row) for row in lengths}
        going = [row for row in lengths if most[row] > 0]
        while going:
            work = [(slots[row], ahead[row].tokens[slots[row].length :]) for row in going]
            logits = self._runner.forward(work).float()
            tokens, _ = Chooser([ahead[row] for row in going])(logits)
            still = []
            for row, token in zip(going, tokens, strict=True):
                ended = ahead[row].accept(token)
                if token not in row.stop_tokens:
                    found[row].append(token)
                if not ended and len(found[row]) < most[row]:
                    still.append(row)
            going = still
        return found

    def forget(self, row: Row) -> None:
        """See Drafter."""
        if row in self._slots:
            self._runner.end(self._slots.pop(row))
            del self._sure[row]

    def _caught_up(self, row: Row) -> Slot:
        """What it has of the row's tokens, without the last one, and without drafts that were wrong."""
        slot = self._slots[row]
        right, known = self._sure[row], min(slot.length, len(row.tokens) - 1)
        while right < known and slot.tokens[right] == row.tokens[right]:
            right += 1
        self._runner.rewind(slot, right)
        self._sure[row] = right
        return slot

    def _copy(self, row: Row) -> Row:
        """To go on with, by its tokens alone."""
        known = self._plain.get(id(row.options))
        if known is None:
            known = self._plain[id(row.options)] = row.options, replace(row.options, logprobs=None)
        other = Row(
            row.prompt, row.index, row.tokens, options=known[1], stop_tokens=row.stop_tokens, limit=row.limit,
            seed=row.seed,
        )  # fmt: skip
        other.start = row.start
        return other
