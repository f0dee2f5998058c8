"""Places: a share per visitor, none for requests that nobody reads, and the next one to whoever has the fewest."""

from contextlib import ExitStack

import pytest

from cogvideo.demo import places as module
from cogvideo.demo.places import Limits, PageRequest, Places, RefusedError


def read(places: Places, readers: ExitStack, visitor: str, session: str = "") -> PageRequest:
    session = session or f"of {visitor}"
    readers.enter_context(places.reading(session))
    return places.enter(visitor, session)


@pytest.fixture
def places() -> Places:
    return Places(Limits(running=2, waiting=3, per_visitor=3))


def test_a_visitor_has_a_share(places: Places) -> None:
    with ExitStack() as readers:
        requests = [read(places, readers, "a") for _ in range(4)]
        assert [places.poll(request) for request in requests[:3]] == [0, 0, 1]
        with pytest.raises(RefusedError, match="3 requests from your address are already running or waiting"):
            places.poll(requests[3])
        other = read(places, readers, "b")
        assert places.poll(other) == 1, "it comes before the third of the first visitor"
        places.leave(requests[0])
        assert places.poll(requests[2]) == 2 and places.poll(other) == 0
        assert places.count() == (2, 1)


def test_all_places_are_taken(places: Places) -> None:
    with ExitStack() as readers:
        requests = [read(places, readers, str(n)) for n in range(6)]
        assert [places.poll(request) for request in requests[:5]] == [0, 0, 1, 2, 3]
        with pytest.raises(RefusedError, match="all 5 places are taken; try again"):
            places.poll(requests[5])
        places.leave(requests[4])
        assert places.poll(read(places, readers, "6")) == 3


def test_unread_requests_hold_no_place(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    unread = [places.enter("a", f"unread {n}") for n in range(100)]
    alive = [request for request in unread if not request.dropped]
    assert alive == unread[-module.MAX_UNREAD :]
    assert [places.poll(request) for request in alive] == [None] * len(alive) and places.count() == (0, 0)
    with ExitStack() as readers:
        assert places.poll(read(places, readers, "a")) == 0
        with places.reading("unread 99"):
            assert places.poll(unread[99]) == 0
        with pytest.raises(RefusedError, match="nobody read the answers"):
            places.poll(unread[0])
        with places.reading("unread 1"), pytest.raises(RefusedError, match="nobody read the answers"):
            places.poll(unread[1])  # dropped, then read
        monkeypatch.setattr(module, "UNREAD_SECONDS", 0.0)
        with pytest.raises(RefusedError, match="nobody read the answers"):
            places.poll(unread[98])


def test_a_waiting_request_whose_reader_left_is_passed_over(places: Places) -> None:
    with ExitStack() as readers:
        first = [read(places, readers, visitor) for visitor in "ab"]
        with places.reading("left"):
            left = places.enter("c", "left")
            assert [places.poll(request) for request in (*first, left)] == [0, 0, 1]
        last = read(places, readers, "d")
        assert places.poll(last) == 1 and places.poll(left) is None
        places.leave(first[0])
        assert places.poll(last) == 0


def test_closed_places_let_running_requests_go_on(places: Places) -> None:
    with ExitStack() as readers:
        requests = [read(places, readers, visitor) for visitor in "abc"]
        assert [places.poll(request) for request in requests] == [0, 0, 1]
        places.close()
        assert places.poll(requests[0]) == 0
        for request in (requests[2], read(places, readers, "d")):
            with pytest.raises(RefusedError, match="the server is shutting down"):
                places.poll(request)
        assert places.count() == (2, 0)
