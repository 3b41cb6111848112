"""Reports from the trackers of vLLM, SGLang and llama.cpp, tried against a running miniserve.

    python scripts/try_reports.py http://127.0.0.1:8000

Prints a line for each: whether it is right here, and what came. Exits with 1 if one is not.
"""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
COUNT = [{"role": "user", "content": "Count from 1 to 5."}]
WEATHER = {"type": "object", "properties": {"place": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}}}
ENDS = {"stop", "length", "tool_calls"}


class Server:
    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def post(self, path: str, **body: Any) -> tuple[int, str, str]:
        """The status, the text, and what the header names as ignored."""
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read().decode(), answer.headers.get("X-Ignored-Parameters", "")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), ""

    def json(self, path: str, **body: Any) -> Any:
        return json.loads(self.post(path, **body)[1])

    def chunks(self, **body: Any) -> list[Any]:
        lines = self.post(CHAT, stream=True, **body)[1].split("\n\n")
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    def text(self, prompt: str, **body: Any) -> str:
        return self.json(COMPLETIONS, prompt=prompt, temperature=0, **body)["choices"][0]["text"]

    def said(self, number: int) -> str:
        ask = [{"role": "user", "content": f"Say {number}."}]
        return self.json(CHAT, messages=ask, temperature=0, max_tokens=8)["choices"][0]["message"]["content"]


def reports(server: Server) -> Iterator[tuple[str, bool, str]]:
    """What was reported, whether it is right here, and what came."""
    chunks = server.chunks(messages=COUNT, max_tokens=10)
    ended = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    right = len(ended) == 1 and ended[0]["delta"] == {}
    yield "vllm#35705: text in the chunk that has the finish_reason", right, f"its delta is {ended[0]['delta']}"
    right = all("finish_reason" in choice for chunk in chunks for choice in chunk["choices"])
    yield "vllm#19650: chunks without finish_reason", right, f"all of {len(chunks)} have one"
    first = chunks[0]["choices"][0]["delta"]
    yield "sglang#18335: no role in the first delta", first == {"role": "assistant", "content": ""}, json.dumps(first)

    tools = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]
    ask = [{"role": "user", "content": "What is the weather like in Warsaw?"}]
    lasts = []
    for seed in range(12):
        chunks = server.chunks(messages=ask, tools=tools, max_tokens=24, seed=seed, temperature=1)
        lasts.append(chunks[-1]["choices"][0]["finish_reason"])
    yield "vllm#27572: streams with tools that end without a reason", set(lasts) <= ENDS, f"12 ended with {set(lasts)}"

    start = "Once upon a time"
    plain = server.text(start, max_tokens=8)
    biased = server.text(start, max_tokens=8, logit_bias={"500": 100})
    again = server.text(start, max_tokens=8)
    yield (
        "llama.cpp#9477: logit_bias stays for the next request",
        plain == again != biased,
        f"{again!r}, not {biased!r}",
    )
    for report, bias in (("vllm#16529: logit_bias beyond the vocabulary", "191222"), ("vllm#5963: of a word", "AI")):
        status, text, _ = server.post(CHAT, messages=COUNT, logit_bias={bias: -100})
        lives = server.post(CHAT, messages=COUNT, max_tokens=1)[0]
        message = json.loads(text)["error"]["message"]
        yield f"{report} ends the engine", (status, lives) == (400, 200), f"400: {message}; the next one: {lives}"

    found = server.json(COMPLETIONS, prompt="something", logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    yield "llama.cpp#11346: no log-probabilities in completions", bool(found), json.dumps(found["token_logprobs"])
    body: dict[str, Any] = {"prompt": "Your answer: Yes", "echo": True, "logprobs": 1, "max_tokens": 0}
    choice = server.json(COMPLETIONS, **body)["choices"][0]
    scores = choice["logprobs"]["token_logprobs"]
    right = choice["text"] == body["prompt"] and scores[0] is None and all(score <= 0 for score in scores[1:])
    yield "vllm#6521: echo with max_tokens 0 ends the server", right, f"log-probabilities of {len(scores)} tokens"

    status, _, named = server.post(CHAT, messages=COUNT, max_tokens=10**6)
    yield "vllm#1543: a large max_tokens ends the engine", (status, named) == (200, "max_tokens"), f"named: {named}"
    status, text, _ = server.post(COMPLETIONS, prompt="", max_tokens=2)
    yield "vllm#10648: an empty prompt ends the engine", status == 400, json.loads(text)["error"]["message"]
    usage = server.chunks(messages=COUNT, max_tokens=4, stream_options={"include_usage": True})[-1]["usage"]
    yield "sglang#954: no usage in streams", usage["completion_tokens"] == 4, f"{usage['total_tokens']} tokens in all"
    text = server.post(RESPONSES, input="What is the capital of Japan?", stream=True, max_output_tokens=8)[1]
    names = [line[7:] for line in text.split("\n") if line.startswith("event: ")]
    right = names[0] == "response.created" and names[-1] in ("response.completed", "response.incomplete")
    yield "sglang#9963: /v1/responses does not stream", right, f"{len(names)} events, {names[0]} to {names[-1]}"

    body = {"prompt": "hello how are you? " * 8, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    answers = [server.json(COMPLETIONS, **body) for _ in range(2)]
    one, two = (answer["choices"][0] for answer in answers)
    pairs = zip(one["logprobs"]["token_logprobs"], two["logprobs"]["token_logprobs"], strict=True)
    largest = max(abs(left - right) for left, right in pairs)
    cached = answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    right = one["text"] == two["text"] and largest < 0.02 and cached > 0
    yield "llama.cpp#7745: a cached prompt changes log-probabilities", right, f"by {largest:g}, {cached} tokens cached"

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(server.said, range(32)))
    alone = [server.said(number) for number in range(32)]
    yield "vllm#27194: many at once end the engine", together == alone, "32 at once: each the text that it has alone"


if __name__ == "__main__":
    wrong = 0
    for report, right, came in reports(Server(sys.argv[1])):
        print(f"{'right' if right else 'WRONG'} | {report} | {came}")
        wrong += not right
    sys.exit(wrong > 0)
