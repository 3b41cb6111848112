"""Outputs of a turn as a worker reports them."""

from __future__ import annotations

from typing import Any

from miniserve.cluster.messages import Ended, Failed, FirstToken, TokenLogprob, Tokens, TurnOutput


def outputs(
    turn: str,
    index: int,
    tokens: list[int],
    *,
    finish: Any = None,
    stop_token: int | None = None,
    cached_tokens: int | None = None,
    prefill: float = 0.0,
    logprobs: list[TokenLogprob] | None = None,
    prompt_logprobs: list[TokenLogprob] | None = None,
    error: str = "",
    invalid: bool = False,
) -> list[TurnOutput]:
    """Output `index` and those after it. With `cached_tokens` they are the first ones of a run; with `finish` they end
    the turn; where that is "error" it fails before them."""
    if finish == "error":
        return [Failed(turn, index, error, invalid)]
    ended: list[TurnOutput] = [Ended(turn, index, tokens, finish, stop_token, logprobs)] if finish else []
    if cached_tokens is None:
        return ended or [Tokens(turn, index, tokens, logprobs)]
    if ended:
        return [FirstToken(turn, index, [], cached_tokens, prefill, None, prompt_logprobs), *ended]
    return [FirstToken(turn, index, tokens, cached_tokens, prefill, logprobs, prompt_logprobs)]
