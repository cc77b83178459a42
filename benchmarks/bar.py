"""A promise and what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.turns import Spread


@dataclass(frozen=True)
class Bar:
    """noisy: the target lies within the noise of the figure, so that another run may decide otherwise."""

    name: str
    figure: str
    target: str
    met: bool
    noisy: bool = False

    @property
    def verdict(self) -> str:
        return ("met" if self.met else "MISSED") + (" (in the noise)" if self.noisy else "")


def times_bar(name: str, ratio: Spread, target: float, note: str = "") -> Bar:
    """So many times as fast as a peer."""
    figure = f"{ratio.median:.2f} x ({ratio.low:.2f} to {ratio.high:.2f}){note}"
    return Bar(name, figure, f">= {target} x", ratio.median >= target, ratio.holds(target))


def share_bar(
    name: str, share: Spread, target: float, note: str = "", *, at_best: bool = True
) -> Bar:
    """So much of what the machine can do at best. Clearly more than all of it proves that this best was measured
    while something else ran: that keeps no promise. at_best=False: of a yardstick that may be surpassed."""
    figure = f"{share.median:.1%} ({share.low:.1%} to {share.high:.1%}){note}"
    possible = not at_best or share.median <= 1.05
    met = possible and share.median >= target
    return Bar(name, figure, f">= {target:.0%}", met, not possible or share.holds(target))


def unmeasured(name: str, reason: str, target: str) -> Bar:
    """A promise that this machine or build cannot keep: no figure, so not met."""
    return Bar(name, reason, target, met=False)
