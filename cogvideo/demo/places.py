"""Decides which requests run, wait or are refused, and shares places fairly among visitors. No web server.

    request = places.enter(visitor="192.0.2.7", session="x")
    while (ahead := places.poll(request)) != 0: ...     # wait, and poll again; None: nobody reads the answers yet
    ...                                             # it has a place
    places.leave(request)

A request gets a place only while a client reads its answers. Places go first to the visitor with the fewest running
requests, then to the oldest request.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

UNREAD_SECONDS = 20.0
"""How long a request waits for a client to read its answers."""
MAX_UNREAD = 64
"""Unread requests per visitor; a further one replaces the oldest."""


@dataclass(frozen=True)
class Limits:
    """What visitors of the page may use."""

    running: int = 8
    """Requests that run at the same time."""
    waiting: int = 64
    """Further requests that may wait."""
    per_visitor: int = 4
    """Requests of one visitor that run or wait."""
    seconds_per_clip: float = 3600.0
    """Time limit per clip; a request may take this long for each of its clips, super-resolution included."""
    disk_bytes: int = 10 * 10**9
    """Disk space for results; when they take more, the oldest are removed."""


class RefusedError(RuntimeError):
    """A request gets no place; the message says why and what to do."""


@dataclass(eq=False)
class PageRequest:
    """A request, from its arrival to its end."""

    visitor: str
    session: str
    """Name under which a client reads the answers."""
    last_read: float = field(default_factory=time.monotonic)
    """When its answers were last being read; initially, when it arrived."""
    admitted: bool = False
    running: bool = False
    dropped: bool = False


class Places:
    """All current requests, and the sessions whose answers are being read. Methods may be called from any thread."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._requests: list[PageRequest] = []
        self._readers: Counter[str] = Counter()
        self._closed = False

    @property
    def total(self) -> int:
        """Maximum number of requests that run or wait."""
        return self._limits.running + self._limits.waiting

    def count(self) -> tuple[int, int]:
        """Numbers of running and of waiting requests."""
        with self._lock:
            admitted = [request.running for request in self._requests if request.admitted]
            return sum(admitted), len(admitted) - sum(admitted)

    def close(self) -> None:
        """Give no more places; requests without one are refused at their next poll."""
        with self._lock:
            self._closed = True

    def enter(self, visitor: str, session: str) -> PageRequest:
        """Add a request, which holds no place yet."""
        request = PageRequest(visitor, session)
        with self._lock:
            unread = [
                other
                for other in self._requests
                if other.visitor == visitor and not other.admitted and not self._readers[other.session]
            ]
            for other in unread[: max(0, len(unread) + 1 - MAX_UNREAD)]:
                other.dropped = True
                self._requests.remove(other)
            self._requests.append(request)
        return request

    def poll(self, request: PageRequest) -> int | None:
        """Position in the queue, from 1; 0 once the request has a place, None while nobody reads its answers.

        Raises: RefusedError; the request is then removed.
        """
        with self._lock:
            if request.running:
                return 0
            try:
                return self._poll(request)
            except RefusedError:
                self._remove(request)
                raise

    def _poll(self, request: PageRequest) -> int | None:
        limits = self._limits
        if self._closed:
            raise RefusedError("the server is shutting down; try again in a few minutes")
        now = time.monotonic()
        is_read = self._readers[request.session] > 0
        if request.dropped or (not is_read and now - request.last_read > UNREAD_SECONDS):
            raise RefusedError("nobody read the answers to this request; ask again")
        if not is_read:
            return None
        request.last_read = now
        if not request.admitted:
            admitted = [other for other in self._requests if other.admitted]
            own = sum(other.visitor == request.visitor for other in admitted)
            if own >= limits.per_visitor:
                raise RefusedError(
                    f"{own} requests from your address are already running or waiting; wait for one to finish, or "
                    "stop one"
                )
            if len(admitted) >= self.total:
                raise RefusedError(f"all {self.total} places are taken; try again in a few minutes")
            request.admitted = True
        running = Counter(other.visitor for other in self._requests if other.running)
        waiting = [o for o in self._requests if o.admitted and not o.running and self._readers[o.session]]
        ahead = sorted(waiting, key=lambda other: running[other.visitor]).index(request)
        request.running = ahead < limits.running - running.total()
        return 0 if request.running else ahead + 1

    def leave(self, request: PageRequest) -> None:
        """End a request and free its place."""
        with self._lock:
            self._remove(request)

    def _remove(self, request: PageRequest) -> None:
        if request in self._requests:
            self._requests.remove(request)

    @contextmanager
    def reading(self, session: str) -> Iterator[None]:
        """Mark the answers of a session as being read while the context lasts."""
        with self._lock:
            self._readers[session] += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers[session] -= 1
                if not self._readers[session]:
                    del self._readers[session]
