"""How much of prompts a step may take in, from how long such steps were."""

from math import ceil

from miniserve.cluster.messages import StepTime

LEAST_SHARE = 16
"""Prompts get at least one part in so many of the full budget in each step, however slow steps are."""
ALONE = 4
"""How many times longer a step may take with no stream in it. No token waits for it, but a later turn may come. What a
step costs beside its tokens is a twenty-fourth of that at most, with the default stretch."""
FORGET = 0.001
"""By which share the shortest step that is remembered grows with each decode step: machines change."""


class Pace:
    """Keeps steps with prompts in them within `stretch` times the shortest step of a stream, beside streams, or `ALONE`
    times that.

    One number is adapted, the tokens of prompts in a step beside streams: by the ratio of the time that a step may take
    to the time that it took. That comes to rest where both are equal, whatever a token costs on this device, with these
    streams, so far into a prompt. Where the streams alone take longer, prompts get the least share.
    """

    def __init__(self, budget: int, stretch: float) -> None:
        """`budget` is the most tokens of a step."""
        self.tokens = budget
        self._least = max(1, budget // LEAST_SHARE)
        self._most = budget
        self._stretch = stretch
        self._shortest = 0.0

    def allowed(self, streams: bool) -> int:
        """The tokens of prompts in the next step, beside streams or without."""
        return self.tokens if streams else min(self.tokens * ALONE, self._most)

    def observe(self, step: StepTime) -> None:
        if not step.prefill:
            longest = self._shortest * (1 + FORGET) or step.seconds
            self._shortest = min(step.seconds, longest)
        elif self._shortest and step.seconds > 0:
            times = 1 if step.decodes else ALONE
            ratio = times * self._stretch * self._shortest / step.seconds
            if ratio < 1 or step.prefill >= self.tokens * times:  # short rests of prompts say nothing
                wanted = self.allowed(step.decodes > 0) / times * min(max(ratio, 0.5), 2.0)
                # Rounded in the direction it goes: else one token would stay one for ever.
                wanted = ceil(wanted) if ratio > 1 else int(wanted)
                self.tokens = min(max(wanted, self._least), self._most)
