"""Attach to a Ray cluster, or say within seconds why that does not work: what was tried, what answered, what to set.

Ray itself retries for a minute or five, and then names neither. So its head is asked first, with one call that it
answers at once. Where the token comes from: https://docs.ray.io/en/latest/ray-security/token-auth.html.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import ray
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import AuthenticationError, RayError

T = TypeVar("T")

ASK_SECONDS = 5.0  # the head answers in milliseconds
ATTACH_SECONDS = 20.0  # a second where all is well
ASK = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # an empty message asks of no node, and is answered with Ray's version
CLIENT = "ray://"
SET = "set RAY_ADDRESS to the host:port that `ray start --head` prints"


@dataclass(frozen=True)
class Head:
    """A cluster's head. address: host:port, or ray://host:port of its Ray Client. origin: who says so."""

    address: str
    origin: str

    @classmethod
    def of_environment(cls, start: bool = False) -> "Head | None":
        """As Ray chooses it: RAY_ADDRESS, else what the last `ray start` on this machine wrote down, else (unless
        `start`) what runs here. None: nothing of these.

        Raises:
            ConnectionError: RAY_ADDRESS is no address of a head.
        """
        given = os.environ.get("RAY_ADDRESS", "")
        if given.startswith("http"):
            raise ConnectionError(
                f"RAY_ADDRESS is {given}, where jobs are submitted; this needs the head's own address, such as "
                f"head:6379"
            )
        if given.startswith(CLIENT):
            return cls(given, f"RAY_ADDRESS={given}")
        try:
            address = canonicalize_bootstrap_address(given or (None if start else "auto"))
        except ConnectionError:  # nothing runs
            address = None
        except (ValueError, OSError) as error:
            raise ConnectionError(f"RAY_ADDRESS is {given}: {error}; {SET}") from None
        origin = "the last `ray start` on this machine" if given in ("", "auto") else f"RAY_ADDRESS={given}"
        return cls(address, origin) if address else None

    def ask(self, seconds: float = ASK_SECONDS) -> None:
        """Returns if it is there and lets us in.

        Raises:
            ConnectionError: it is not, or does not.
        """
        if self.address.startswith(CLIENT):
            self._knock(seconds)
            return
        try:
            token = get_auth_headers_if_auth_enabled({})
        except AuthenticationError:  # it is on, but there is none
            token = {}
        with grpc.insecure_channel(self.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                channel.unary_unary(ASK)(b"", timeout=seconds, metadata=[(k.lower(), v) for k, v in token.items()])
            except grpc.RpcError as error:
                raise self._refusal(error, bool(token), seconds) from None

    def absent(self, said: str) -> ConnectionError:
        return ConnectionError(f"no Ray cluster at {self.address} ({self.origin}): {said}; start one there, or {SET}")

    def out_of_reach(self, seconds: float) -> ConnectionError:
        """Of a head that answers, while Ray on this machine gets no further."""
        return ConnectionError(
            f"the Ray cluster at {self.address} ({self.origin}) answers, but this machine could not attach to it "
            f"within {seconds:.0f} s; go where a node of it runs, start one here (`ray start "
            f"--address={self.address}`), or use `ray job submit`"
        )

    def _knock(self, seconds: float) -> None:
        """Ray Client's protocol is another: only whether somebody listens."""
        host, _, port = self.address.removeprefix(CLIENT).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
        except (OSError, ValueError) as error:
            raise self.absent(getattr(error, "strerror", None) or str(error)) from None

    def _refusal(self, error: Any, token: bool, seconds: float) -> ConnectionError:
        code, details = error.code(), error.details() or ""
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            why = "it refuses the one of this process" if token else "this process has none"
            return ConnectionError(
                f"the Ray cluster at {self.address} ({self.origin}) wants a token, and {why}; set RAY_AUTH_MODE=token "
                f"and RAY_AUTH_TOKEN (or ~/.ray/auth_token) to the cluster's"
            )
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return self.absent(f"no answer within {seconds:.0f} s")
        if "HTTP/2" in details or code == grpc.StatusCode.UNIMPLEMENTED:
            return self.absent("what answers there is not the head of a cluster")
        return self.absent(details.rpartition("Failed to connect to remote host: ")[2] or code.name)


def attach(namespace: str | None = None, start: bool = False, seconds: float = ATTACH_SECONDS) -> None:
    """Make this process a driver of the cluster that Ray's environment names.

    Args:
        start: one on this machine if none is named and none has been started; else that is an error.
        seconds: how long it may take.

    Raises:
        ConnectionError: there is none, or it does not let us in; the sentence says what was tried and what to set.
    """
    head = Head.of_environment(start)
    if head is None and not start:
        raise ConnectionError(f"no Ray cluster on this machine; start one with `ray start --head`, or {SET}")
    if head is None:
        ray.init(address="local", namespace=namespace, log_to_driver=False, logging_level=logging.WARNING)
        return
    head.ask(min(seconds, ASK_SECONDS))
    address, quiet = head.address, logging.CRITICAL
    try:
        within(
            seconds,
            lambda: ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=quiet),
            head.out_of_reach(seconds),
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(why if address in why else f"no Ray cluster at {address}: {why}") from None


def within(seconds: float, call: Callable[[], T], otherwise: Exception) -> T:
    """What `call` returns or raises, if that takes no longer; else `otherwise` is raised, and `call` is left alone.

    For calls of Ray's that take no deadline: they wait for a head that has died for minutes.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="within").start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():  # an error of the call itself
            raise
        raise otherwise from None
