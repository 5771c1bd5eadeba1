"""Talk to a model: `stepladder chat url=http://HOST:PORT [option=value]`, with any server of the OpenAI protocol.

Ctrl-C stops an answer, what was said stays; Ctrl-D ends. /reset begins anew, /system TEXT sets the system prompt and
begins anew, /help lists these. Without a terminal, every line of the input is a turn.

Exit codes: 0 done; 1 the server cannot be reached or refuses; 2 wrong usage; 141 whoever read our output has
stopped.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

import aiohttp

from stepladder.launch.ctl import cut_off, pairs
from stepladder.launch.streaming import Show, session, stream
from stepladder.launch.typed_config import build

OK, FAILED, USAGE = 0, 1, 2
COMMANDS = (
    "/reset begins anew; /system TEXT sets the system prompt and begins anew; Ctrl-C stops an answer; Ctrl-D ends"
)


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Options of a conversation.

    Attributes:
        url: of the server, without /v1.
        model: None takes the only one it serves.
        system: what the conversation begins with, if anything.
        temperature, max_tokens, seed: as the server takes them; None leaves them to it.
        api_key_env: the environment variable that holds the API key, so that it is in no command line.
        seconds: how long the server may be silent.
    """

    url: str
    model: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    api_key_env: str = "STEPLADDER_API_KEY"
    seconds: float = 60.0

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def headers(self) -> dict[str, str]:
        key = os.environ.get(self.api_key_env)
        return {"Authorization": f"Bearer {key}"} if key else {}


@dataclass
class Conversation:
    """What has been said so far, and how the server is asked to go on."""

    config: ChatConfig
    model: str
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin(self.config.system)

    def begin(self, system: str | None) -> None:
        """Forget everything but the system prompt."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, show: Show) -> None:
        """One turn, shown as it comes. A turn that fails is not part of the conversation; one that was stopped is.

        Raises:
            ConnectionError: the server refused, or was lost.
            KeyboardInterrupt: the person stopped it.
        """
        said: list[str] = []

        def hear(piece: str) -> None:
            said.append(piece)
            show(piece)

        asked = {"role": "user", "content": text}
        try:
            error = asyncio.run(self._turn([*self.messages, asked], hear))
        except KeyboardInterrupt:
            self.messages += [asked, {"role": "assistant", "content": "".join(said)}]
            raise
        if error:
            raise ConnectionError(error)
        self.messages += [asked, {"role": "assistant", "content": "".join(said)}]

    async def _turn(self, messages: list[dict[str, str]], show: Show) -> str:
        config = self.config
        wanted = {"temperature": config.temperature, "max_tokens": config.max_tokens, "seed": config.seed}
        body = {"model": self.model, "messages": messages} | {k: v for k, v in wanted.items() if v is not None}
        async with session(timeout=patience(config), headers=config.headers) as opened:
            timing = await stream(opened, f"{config.base}/v1/chat/completions", body, show)
        return timing.error


def main(words: Sequence[str] | None = None) -> int:
    """Talk until the input ends; returns the exit code."""
    options = ", ".join(f"{option.name}=" for option in fields(ChatConfig))
    parser = argparse.ArgumentParser("stepladder chat", description=__doc__, epilog=f"options: {options}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("options", nargs="*", metavar="option=value")
    try:
        config = build(ChatConfig, pairs(parser.parse_args(words).options), strict=False)
    except ValueError as error:
        print(f"stepladder: chat: {error}", file=sys.stderr)
        return USAGE
    try:
        model = config.model or asyncio.run(only_model(config))
        code = talk(Conversation(config, model), prompter(model, config.base))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return cut_off()
    except (ConnectionError, TimeoutError, aiohttp.ClientError, ValueError) as error:
        print(f"stepladder: chat: {config.base} {_why(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130


def talk(conversation: Conversation, read: Callable[[], str]) -> int:
    """Turn after turn, until `read` raises EOFError."""
    code = OK
    while True:
        try:
            line = read().strip()
        except KeyboardInterrupt:  # of a line that was begun
            print()
            continue
        except EOFError:
            return code
        command, _, rest = line.partition(" ")
        if command == "/reset":
            conversation.begin(conversation.system)
        elif command == "/system":
            conversation.begin(rest.strip() or None)
        elif command.startswith("/") and "/" not in command[1:]:
            print(COMMANDS)
        elif line:
            code = _answer(conversation, line)


def _answer(conversation: Conversation, line: str) -> int:
    """Print an answer; whatever goes wrong with it, the conversation goes on."""
    code = OK
    try:
        conversation.ask(line, lambda piece: print(piece, end="", flush=True))
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except BrokenPipeError:  # of our own output: nobody reads it any longer
        raise
    except ConnectionError as error:
        print(f"\nstepladder: chat: {error}", file=sys.stderr)
        code = FAILED
    print()
    return code


def prompter(model: str, url: str) -> Callable[[], str]:
    """Reads a line; on a terminal, with a prompt and a history that the arrow keys walk through."""
    if not sys.stdin.isatty():
        return input
    with suppress(ImportError):
        import readline  # noqa: F401  # it changes what input() does
    print(f"{model} at {url}; {COMMANDS}")
    return lambda: input("> ")


async def only_model(config: ChatConfig) -> str:
    """The name of the model that is served.

    Raises:
        ConnectionError, TimeoutError, aiohttp.ClientError: nobody answers. ValueError: the answer is no list of models.
    """
    async with (
        session(timeout=patience(config), headers=config.headers) as opened,
        opened.get(f"{config.base}/v1/models") as response,
    ):
        if response.status != 200:
            raise ConnectionError(f"/v1/models answers {response.status}; {_hint(response.status, config)}")
        listed = await response.json()
    try:
        return listed["data"][0]["id"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("does not list models at /v1/models; is it a server of the OpenAI protocol?") from None


def patience(config: ChatConfig) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(sock_connect=config.seconds, sock_read=config.seconds)


def _hint(status: int, config: ChatConfig) -> str:
    return f"set {config.api_key_env} to the API key" if status == 401 else "is url= right?"


def _why(error: Any) -> str:
    if isinstance(error, aiohttp.InvalidURL):
        return "is no URL; give url=http://HOST:PORT"
    if isinstance(error, aiohttp.ClientConnectionError):
        return f"cannot be reached: {error}"
    return str(error) or f"did not answer ({type(error).__name__})"


if __name__ == "__main__":
    sys.exit(main())
