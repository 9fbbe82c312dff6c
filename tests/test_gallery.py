"""The gallery is what its script makes, and shows every schedule."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
from matplotlib.image import imread

from revolve import SCHEDULES

DOCS = Path(__file__).parent.parent / "docs"
SCRIPT = run_path(str(DOCS / "gallery.py"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    SCRIPT["main"](folder)
    return folder


def test_the_page_is_what_the_script_writes(made: Path) -> None:
    assert (made / "gallery.md").read_text() == (DOCS / "gallery.md").read_text()
    assert {path.name for path in (made / "gallery").iterdir()} == {path.name for path in (DOCS / "gallery").iterdir()}


def test_the_pictures_are_what_the_script_draws(made: Path) -> None:
    """All but for the letters, which another matplotlib or font may set otherwise."""
    for path in (made / "gallery").iterdir():
        new, old = (imread(picture)[..., :3] for picture in (path, DOCS / "gallery" / path.name))
        assert np.abs(np.subtract(new.shape, old.shape)).max() <= 4
        rows, columns = np.minimum(new.shape[:2], old.shape[:2])
        assert (np.abs(new[:rows, :columns] - old[:rows, :columns]).max(axis=-1) > 0.3).mean() < 0.05


def test_every_schedule_is_shown() -> None:
    assert {type(shown.schedule) for shown in SCRIPT["SHOWN"]} == set(SCHEDULES.values())
