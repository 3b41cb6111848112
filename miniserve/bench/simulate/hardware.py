"""How long a step takes on other hardware: a few measured constants in the shape of a transformer's cost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from miniserve.config import ConfigError, problem


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One device with one model, as it was measured. Times in seconds, sizes in tokens and bytes.

    A step that computes chunks of prompts and one token for each of B decoding sequences takes

        overhead + max(floor, base + sum over chunks (per_token n + per_pair n (c + n/2) + per_context c)
                                   + per_sequence B + per_kv_token S)

    for chunks of n tokens after c others, and S tokens of KV of the sequences that decode. `floor` is what a step takes
    to be launched when the device has nearly nothing to do; `base` is what any step does once: it reads the weights.
    """

    name: str
    source: str
    base: float
    per_token: float
    per_pair: float
    per_context: float = 0.0
    per_sequence: float = 0.0
    per_kv_token: float = 0.0
    floor: float = 0.0
    overhead: float = 0.0
    """The worker's own time around a step: messages, batching."""
    chunk_overhead: float = 0.0
    """What a step with any prompt in it takes on top."""
    kv_bytes_per_token: int
    kv_tokens: int
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    page_tokens: int = 64
    """Of a KV page. Large pages make the simulation quicker, and lose at most a page of what a turn finds cached."""
    transfer_bytes_per_second: float
    transfer_latency: float = 0.0
    transfer_token_seconds: float = 0.0
    """For each token, whatever its bytes."""
    devices_per_host: int | None = None
    """None: all are on one host."""
    far_bytes_per_second: float | None = None
    far_latency: float = 0.0
    """Of transfers between hosts: how fast each device's are (None: as within a host), and what they take on top."""
    swap_space: int = 0
    """Bytes of host memory for evicted KV; 0: none."""
    host_bytes_per_second: float | None = None
    host_latency: float = 0.0
    """Of copies to or from host memory: how fast they are (None: as to another device), and what each takes on top."""
    disk_space: int = 0
    """Bytes that the disk of a host has for KV of all its workers; 0: none."""
    disk_bytes_per_second: float = 3e9
    disk_latency: float = 1e-4
    """Of reading and writing pages there: assumptions, not measurements."""
    message_seconds: float = 0.0
    busy_watts: float | None = None
    idle_watts: float | None = None
    layers: int = 0
    hidden_size: int = 0
    """Of the model; 0 where they are not known, and `divided` cannot be asked for."""
    hop_seconds: float = 1e-05
    """Until the first byte of one device has come to the next one. A guess, of what NCCL takes for few bytes."""

    def step_seconds(self, chunks: Iterable[tuple[int, int]], decodes: int, kv_tokens: int) -> float:
        """A step with these chunks (tokens, tokens before them) and `decodes` sequences of `kv_tokens` in all."""
        work = self.base + self.per_sequence * decodes + self.per_kv_token * kv_tokens
        some = 0.0
        for count, context in chunks:
            work += self.per_token * count + self.per_pair * count * (context + count / 2) + self.per_context * context
            some = self.chunk_overhead
        return self.overhead + max(self.floor, work + some)

    def divided(self, ranks: int) -> Hardware:
        """A worker of `ranks` such devices, each with a part of every matrix and of the KV. Raises `ConfigError`.

        What a step computes and reads is divided. It takes two sums over the devices a layer (Megatron-LM, arXiv
        1909.08053), each on a ring (Patarasu and Yuan, 2009): 2 (N - 1) hops, on which every device sends 2 (N - 1) / N
        times its numbers, `hidden_size` of 16 bits a token, at `transfer_bytes_per_second`.
        """
        if ranks > 1 and not self.layers * self.hidden_size:
            raise ConfigError(f"The profile {self.name} has no layers and hidden_size: it cannot be divided.")
        hops, sums = 2 * (ranks - 1), 2 * self.layers
        token = sums * hops / ranks * 2 * self.hidden_size / self.transfer_bytes_per_second
        changes = {name: getattr(self, name) / ranks for name in ("per_pair", "per_context", "per_kv_token")}
        ways = "transfer_bytes_per_second", "host_bytes_per_second"
        for name in ("kv_tokens", "swap_space", *ways, "busy_watts", "idle_watts"):
            changes[name] = ranks * getattr(self, name) if getattr(self, name) is not None else None
        return msgspec.structs.replace(
            self,
            base=self.base / ranks + sums * hops * self.hop_seconds,
            per_token=self.per_token / ranks + token,
            per_sequence=self.per_sequence / ranks + token,
            **changes,
        )

    def transfer_seconds(self, pages: int, near: bool = True) -> float:
        """The time of `pages` to another device, `near` if it is on the same host, with nothing else on the way."""
        rate, latency = self.transfer_bytes_per_second, self.transfer_latency
        if not near:
            rate, latency = self.far_bytes_per_second or rate, latency + self.far_latency
        return latency + pages * self.page_tokens * (self.kv_bytes_per_token / rate + self.transfer_token_seconds)

    def host_seconds(self, pages: int) -> float:
        """The time of `pages` to host memory, or back."""
        rate = self.host_bytes_per_second or self.transfer_bytes_per_second
        return self.host_latency + pages * self.page_tokens * self.kv_bytes_per_token / rate

    def disk_seconds(self, pages: int) -> float:
        """The time to read or write `pages`."""
        return self.disk_latency + pages * self.page_tokens * self.kv_bytes_per_token / self.disk_bytes_per_second


PRESETS = msgspec.toml.decode(Path(__file__).with_name("hardware.toml").read_bytes(), type=dict[str, Hardware])
"""By their names."""


def load_hardware(text: str) -> Hardware:
    """A preset by its name, or the file that `scripts/profile_hardware.py` has written. Raises `ConfigError`."""
    if preset := PRESETS.get(text):
        return preset
    path = Path(text)
    if not path.is_file():
        raise ConfigError(problem("cli.no_hardware", name=text, presets=", ".join(PRESETS)))
    try:
        return msgspec.json.decode(path.read_bytes(), type=Hardware)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is not a hardware profile: {error}.") from error


def load_roles(text: str, ranks: int = 1, swap_space: int = 0, disk_space: int = 0) -> tuple[Hardware, Hardware]:
    """The hardware of prefillers and of decoders: one for both, or `P=...,D=...`; each worker has `ranks` of it, each
    with `swap_space` bytes of host memory, each host `disk_space`, where these are not 0. Raises `ConfigError`."""
    roles = dict(part.partition("=")[::2] for part in text.split(",")) if "=" in text else {"P": text, "D": text}
    if set(roles) != {"P", "D"}:
        raise ConfigError(f"--hardware {text!r} is not understood: write one profile, or P=...,D=... for the roles.")
    prefiller, decoder = load_hardware(roles["P"]), load_hardware(roles["D"])
    if (prefiller.page_tokens, prefiller.kv_bytes_per_token) != (decoder.page_tokens, decoder.kv_bytes_per_token):
        raise ConfigError(f"--hardware {text!r}: {prefiller.name} and {decoder.name} have KV pages of different sizes.")
    sizes = {"swap_space": swap_space, "disk_space": disk_space}
    given = {name: size for name, size in sizes.items() if size}
    prefiller, decoder = (msgspec.structs.replace(one, **given).divided(ranks) for one in (prefiller, decoder))
    if any(one.disk_space and (ranks > 1 or not one.swap_space) for one in (prefiller, decoder)):
        raise ConfigError(problem("worker.disk_alone"))
    return prefiller, decoder
