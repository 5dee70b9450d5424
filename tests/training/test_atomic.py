"""Files and folders that are whole or absent."""

from pathlib import Path

import pytest

from fastlm.training.atomic import new_folder


@pytest.mark.parametrize("moment", ["while it is made", "in the block"])
def test_an_interrupted_folder_leaves_nothing(moment, tmp_path, monkeypatch):
    if moment == "while it is made":
        mkdir = Path.mkdir

        def interrupted(self, *arguments, **named):
            mkdir(self, *arguments, **named)
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "mkdir", interrupted)

    def write():
        with new_folder(tmp_path / "data") as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not any(tmp_path.iterdir())


def test_a_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "data") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "data").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data" / "file").read_text() == "x"
