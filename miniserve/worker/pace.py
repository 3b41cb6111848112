"""How much of a prompt a step may take in beside streams, from how long such steps were."""

from math import ceil

from miniserve.cluster.messages import StepTime

LEAST_SHARE = 16
"""A prompt gets at least one part in so many of the full budget in each step, however slow steps are."""
FORGET = 0.001
"""By which share the shortest step that is remembered grows with each decode step: machines change."""


class Pace:
    """Keeps steps that mix prompts with streams within `stretch` times the shortest step of a stream.

    One number is adapted, the tokens of a prompt in a mixed step: by the ratio of the time that such a step may take to
    the time that it took. That comes to rest where both are equal, whatever a token costs on this device, with these
    streams, so far into a prompt. Where the streams alone take longer, prompts get the least share.
    """

    def __init__(self, budget: int, stretch: float) -> None:
        """`budget` is the tokens of a step with nothing to protect in it."""
        self.tokens = budget
        self._least = max(1, budget // LEAST_SHARE)
        self._most = budget
        self._stretch = stretch
        self._shortest = 0.0

    def observe(self, step: StepTime) -> None:
        if not step.prefill:
            longest = self._shortest * (1 + FORGET) or step.seconds
            self._shortest = min(step.seconds, longest)
        elif step.decodes and self._shortest and step.seconds > 0:
            ratio = self._stretch * self._shortest / step.seconds
            if ratio < 1 or step.prefill >= self.tokens:  # a short rest of a prompt says nothing about longer ones
                wanted = self.tokens * min(max(ratio, 0.5), 2.0)
                # Rounded in the direction it goes: else one token would stay one for ever.
                wanted = ceil(wanted) if ratio > 1 else int(wanted)
                self.tokens = min(max(wanted, self._least), self._most)
