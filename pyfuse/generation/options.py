"""How a text is generated: every knob, what it means, and which of them contradict each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pyfuse.generation import values
from pyfuse.generation.values import knob

LAST_STEP = -1  # of forced_tokens: the last token that max_new_tokens allows
_LEAST_TEMPERATURE = 1e-6  # above 0; logits are divided by it, and have to stay finite
_OF_DRAWING = ("top_k", "top_p", "min_p", "typical_p")
_OF_BEAMS = {"beam_groups": 1, "diversity_penalty": 0.0, "length_penalty": 1.0, "early_stopping": False}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `generate` does beside running the model. None: that knob is off.

    Three ways to decode: greedy (temperature None or 0, one beam), sampling (temperature above 0), beam search (beams
    above 1). ValueError: a knob of a way that is not taken, others that contradict each other, a value beyond its
    limits; TypeError: one of another type. The fields from logit_bias to typical_p change the logits, in this order:
    see `processors` and `sampling` for their formulas.

    forced_tokens counts the new tokens from 0; -1 is the last one, number max_new_tokens - 1. bad_words, stop_tokens,
    ...: any iterables of token ids. seed: of the draws, which depend on it, on which of the n sequences it is, on the
    number of its tokens, and on nothing else; with one seed for all prompts, equal prompts get equal texts.

    Sources: top-k: Fan et al., arXiv:1805.04833. Top-p: Holtzman et al., arXiv:1904.09751. Min-p: Nguyen et al.,
    arXiv:2407.01082. Typical: Meister et al., arXiv:2202.00666. Repetition penalty: Keskar et al., arXiv:1909.05858.
    N-grams: Paulus et al., arXiv:1705.04304. Diverse beam search: Vijayakumar et al., arXiv:1610.02424. Length penalty:
    Wu et al., arXiv:1609.08144, without their constant 5. Presence and frequency penalties: OpenAI's API.
    """

    # How much
    max_new_tokens: int = field(default=128, metadata=knob("most tokens to follow the prompt", least=1))  # fmt: skip
    n: int = field(default=1, metadata=knob("sequences for each prompt", least=1))

    # The logits
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata=knob("token: what is added to its logit; -inf bans it")
    )
    repetition_penalty: float = field(
        default=1.0, metadata=knob("makes tokens that prompt or text have less likely: above 1", above=0.0)
    )  # fmt: skip
    presence_penalty: float = field(
        default=0.0, metadata=knob("taken off the logits of tokens that the text has")
    )
    frequency_penalty: float = field(
        default=0.0, metadata=knob("taken off a token's logit for each time that the text has it")
    )
    no_repeat_ngram: int = field(
        default=0, metadata=knob("no so many tokens occur twice in the same order; 0: any may", least=0)
    )  # fmt: skip
    bad_words: tuple[tuple[int, ...], ...] = field(
        default=(), metadata=knob("sequences of tokens that must not occur")
    )
    min_new_tokens: int = field(default=0, metadata=knob("least tokens before a stop token", least=0))  # fmt: skip
    forced_tokens: Mapping[int, int] = field(
        default_factory=dict, metadata=knob("step: its token; -1: the last step")
    )
    suppress_tokens: tuple[int, ...] = field(
        default=(), metadata=knob("tokens that must not occur")
    )

    # Drawing
    temperature: float | None = field(
        default=None, metadata=knob("draw tokens, from logits divided by it; 0: always the likeliest", least=0.0)
    )  # fmt: skip
    top_k: int | None = field(
        default=None, metadata=knob("draw from the k likeliest (and those as likely as the last of them)", least=1)
    )  # fmt: skip
    top_p: float | None = field(
        default=None, metadata=knob("draw from the fewest that have this probability together", above=0.0, most=1.0)
    )  # fmt: skip
    min_p: float | None = field(
        default=None, metadata=knob("draw from those with this share of the largest probability", least=0.0, most=1.0)
    )  # fmt: skip
    typical_p: float | None = field(
        default=None, metadata=knob("draw from the most typical that have it together", above=0.0, most=1.0)
    )  # fmt: skip
    seed: int | tuple[int, ...] = field(
        default=0, metadata=knob("of the draws: one for all prompts, or one for each")
    )

    # Beam search
    beams: int = field(default=1, metadata=knob("sequences that are kept at each step", least=1))
    beam_groups: int = field(default=1, metadata=knob("of beams that differ from each other", least=1))  # fmt: skip
    diversity_penalty: float = field(
        default=0.0, metadata=knob("taken off a token's score for each beam of earlier groups that has it", least=0.0)
    )  # fmt: skip
    length_penalty: float = field(
        default=1.0, metadata=knob("sequences are compared by log-probability / length**this")
    )
    early_stopping: bool | Literal["never"] = field(
        default=False, metadata=knob("end with as many sequences as beams; 'never': when no better one can come")
    )  # fmt: skip

    # Where a sequence ends, and what is told of it
    stop: tuple[str, ...] = field(default=(), metadata=knob("texts that end it"))
    stop_tokens: tuple[int, ...] | None = field(
        default=None, metadata=knob("tokens that end it (default: the model's)")
    )
    logprobs: int | None = field(
        default=None, metadata=knob("tell log-probabilities, and those of so many likeliest tokens", least=0)
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, shape in _SHAPES.items():
            object.__setattr__(self, name, shape(name, getattr(self, name)))
        for f in fields(self):
            values.check_number(f.name, getattr(self, f.name), str(f.type), f.metadata)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            self._refuse("early_stopping", "needs True, False or 'never'")
        if self.samples and self.temperature < _LEAST_TEMPERATURE:  # type: ignore[operator]
            self._refuse("temperature", f"needs 0 or at least {_LEAST_TEMPERATURE:g}")
        self._check_way()
        self._check_groups()
        self._check_steps()

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature is not None and self.temperature > 0.0

    @property
    def searches(self) -> bool:
        """Whether it is beam search."""
        return self.beams > 1

    def seeds_of(self, prompts: int) -> tuple[int, ...]:
        """A seed for each prompt. ValueError: there are more or fewer of them."""
        if isinstance(self.seed, int):
            return (self.seed,) * prompts
        if len(self.seed) != prompts:
            self._refuse("seed", f"needs one, or one for each of {prompts} prompts")
        return self.seed

    def check_vocabulary(self, size: int) -> None:
        """ValueError: the id of a token is not below size, or more log-probabilities than that are wanted."""
        ids: dict[str, Iterable[int]] = {
            "logit_bias": self.logit_bias,
            "bad_words": (token for word in self.bad_words for token in word),
            "forced_tokens": self.forced_tokens.values(),
            "suppress_tokens": self.suppress_tokens,
            "stop_tokens": self.stop_tokens or (),
        }
        for name, tokens in ids.items():
            for token in tokens:
                if token >= size:
                    raise ValueError(f"{name}: got token {token}, but the vocabulary has {size}")
        if self.logprobs is not None and self.logprobs > size:
            self._refuse("logprobs", f"but the vocabulary has {size} tokens")

    def _refuse(self, name: str, why: str) -> None:
        raise ValueError(f"{name}: got {getattr(self, name)!r}, {why}")

    def _check_way(self) -> None:
        """Greedy, sampling and beam search have knobs of their own."""
        if self.searches and self.samples:
            self._refuse("temperature", f"but beams is {self.beams}: beam search draws nothing")
        for name in _OF_DRAWING:
            if getattr(self, name) is not None and not self.samples:
                self._refuse(name, "but without a temperature above 0 nothing is drawn")
        for name, unset in _OF_BEAMS.items():
            if getattr(self, name) != unset and not self.searches:
                self._refuse(name, "but beams is 1, which is no beam search")
        if self.searches and self.n > self.beams:
            self._refuse("n", f"but beams is {self.beams}: no more are found")
        if self.n > 1 and not self.searches and not self.samples:
            self._refuse("n", "but greedy decoding finds one (needs a temperature or beams)")

    def _check_groups(self) -> None:
        if self.beams % self.beam_groups:
            self._refuse("beam_groups", f"which does not divide {self.beams} beams")
        if self.beam_groups == 1 and self.diversity_penalty > 0:
            self._refuse("diversity_penalty", "but beam_groups is 1")
        if self.beam_groups > 1 and self.diversity_penalty == 0:
            self._refuse("diversity_penalty", "with which all groups find the same")

    def _check_steps(self) -> None:
        """What has to be when."""
        most, forced = self.max_new_tokens, self.forced_tokens
        if self.min_new_tokens > most:
            self._refuse("min_new_tokens", f"but max_new_tokens is {most}")
        for step, token in forced.items():
            if not LAST_STEP <= step < most:
                raise ValueError(f"forced_tokens: got step {step}, but max_new_tokens is {most}")
            if token in self.suppress_tokens:
                raise ValueError(f"forced_tokens: got token {token}, but suppress_tokens has it")
        if LAST_STEP in forced and forced.get(most - 1, forced[LAST_STEP]) != forced[LAST_STEP]:
            raise ValueError(f"forced_tokens: got different ones for the last step, {most - 1}")


_SHAPES: dict[str, Any] = {
    "logit_bias": values.biases,
    "bad_words": values.words,
    "forced_tokens": values.steps,
    "suppress_tokens": values.tokens,
    "seed": values.seeds,
    "stop": values.strings,
    "stop_tokens": values.optional_tokens,
}
