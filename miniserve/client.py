"""A client of a running server's HTTP API. What goes wrong is a `ConfigError` with a way out."""

import contextlib
import json
import re
import ssl
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, Self

import httpx
import msgspec

from miniserve.config import ConfigError, problem

CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 10.0
"""How long an answer may take that is no text of a model."""


class ModelCard(msgspec.Struct):
    """What a server says of a model: lengths in tokens, None where it says nothing."""

    id: str
    owned_by: str = "unknown"
    max_model_len: int | None = None
    vocab_size: int | None = None
    meta: dict[str, Any] | None = None


class ApiClient:
    """The API at `url`, which ends in /v1. A server may take its time for an answer, or `patience` seconds if given.
    Each request has a connection of its own, unseen by proxies of the environment. Raises `ConfigError` for no URL."""

    def __init__(self, url: str, api_key: str | None, patience: float | None = None) -> None:
        self.url = url
        self._patience = patience
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError
            base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
            self._base = str(httpx.URL(base))
        except (ValueError, httpx.InvalidURL) as error:
            raise ConfigError(f"--url {url!r} is no address: write it like http://127.0.0.1:8000/v1.") from error
        self._http = httpx.Client(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=httpx.Timeout(patience, connect=patience or CONNECT_SECONDS),
            limits=httpx.Limits(max_keepalive_connections=0),
            verify=ssl.create_default_context(),  # the system's certificates
            trust_env=False,
        )

    @classmethod
    def around(cls, url: str, api_key: str | None) -> Self:
        """The API of the server at `url`, with or without its /v1, for answers that are no text of a model."""
        return cls(f"{url.rstrip('/').removesuffix('/v1')}/v1", api_key, PATIENCE_SECONDS)

    @contextlib.contextmanager
    def open(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        """Send a request; the response, whose body is still to be read. Leaving it ends the request on the server too.
        Raises `ConfigError` if no server answers, with the server's words, or where the answer breaks off."""
        content, answered = None if body is None else json.dumps(body), False
        try:
            with self._http.stream(method, self._base + path, content=content, headers=headers) as response:
                if answered := response.status_code == 200:
                    yield response
                    return
                said = message(response.read()) or response.reason_phrase
        except httpx.ReadTimeout as error:
            raise ConfigError(f"The server at {self.url} has not answered for {self._patience:g} s.") from error
        except httpx.HTTPError as error:
            if answered:
                raise ConfigError(f"The answer of {self.url} broke off: is the server still running?") from error
            cause = re.sub(r"^\[[^]]*\] ", "", str(error))  # without the number, of errors of the operating system
            raise ConfigError(problem("cli.no_server", url=self.url, cause=cause)) from error
        if response.status_code == 404 and not self._base.endswith("/v1"):
            said = f"{said.rstrip('.')}. Does --url end in /v1?"
        raise ConfigError(f"The server says: {said}")

    def read(self, path: str) -> bytes:
        """What a GET gives. Raises `ConfigError` for an error, and for an answer that comes too late."""
        ends = time.monotonic() + (self._patience or float("inf"))
        body = b""
        with self.open("GET", path) as response:
            for piece in response.iter_bytes():
                body += piece
                if time.monotonic() > ends:
                    raise httpx.ReadTimeout("It comes too slowly.")
        return body

    def get(self, path: str) -> Any:
        """The JSON object with `data` that a GET gives. Raises `ConfigError` for any other answer."""
        body = self.read(path)
        with contextlib.suppress(ValueError):
            if isinstance(answer := json.loads(body), dict) and "data" in answer:
                return answer
        raise ConfigError(problem("cli.other_server", url=self.url, path=path.removeprefix("/..")))

    def models(self) -> list[ModelCard]:
        """The server's models, of which there is at least one. Raises `ConfigError`."""
        with contextlib.suppress(msgspec.ValidationError):
            if cards := msgspec.convert(self.get("/models")["data"], list[ModelCard]):
                return cards
        raise ConfigError(f"{self.url} names no model. Does --url end in /v1?")


def message(data: bytes) -> str:
    """The message of an error's body, else the beginning of the body."""
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return data.decode("utf-8", "replace")[:300]
