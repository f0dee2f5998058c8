"""Training in this process draws no curves unless a test asks for them (`drawn_curves`)."""

from collections.abc import Iterator

import pytest

from tests.helpers.training import draw_one_pixel


@pytest.fixture(autouse=True, scope="module")
def _one_pixel() -> Iterator[None]:
    """For a whole module, because its fixtures train too."""
    from cogvideo.training import trainer  # takes seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_curves", draw_one_pixel)
        yield


@pytest.fixture
def drawn_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogvideo.training import metrics, trainer

    monkeypatch.setattr(trainer, "draw_curves", metrics.draw_curves)
