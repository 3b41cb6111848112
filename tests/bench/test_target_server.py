"""What the events of servers of other kinds mean."""

from __future__ import annotations

import msgspec

from miniserve.bench.replay.server import Event, TargetServer


def test_events_of_vllm_and_of_servers_without_ids() -> None:
    about = TargetServer(root="", kind="vllm", model="m")
    choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": None, "prompt_token_ids": None}
    assert about.event(msgspec.json.encode({"choices": [choice | {"token_ids": [5, 6]}]})) == Event(2, [5, 6])
    assert about.event(b'{"choices": [{"text": "ab"}]}') == Event(1)
    assert about.event(b'{"choices": [{"text": ""}], "usage": null}') == Event()
    usage = b'"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": '
    assert about.event(b'{"choices": [], "usage": {%snull}}' % usage) == Event(output=2)
    assert about.event(b'{"choices": [], "usage": {%s{"cached_tokens": 4}}}' % usage) == Event(cached=4, output=2)
    assert about.event(b'{"error": {"message": "no", "code": 500}}') == Event(error="no")
    assert about.event(b"[DONE]") == Event(done=True)
