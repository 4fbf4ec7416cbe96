"""The self-test as a command."""

import pytest

from contrastive_kernels.compat.check import command


@pytest.mark.parametrize(
    "error", [ImportError("no torchvision"), RuntimeError("torchvision::nms does not exist"), OSError()]
)
def test_a_library_that_cannot_be_imported(error, monkeypatch, capsys):
    """Whatever its import raises; that of a torchvision for another torch is a RuntimeError."""

    def fail(self):
        raise error

    monkeypatch.setattr(command.Library, "version", "1.0")
    monkeypatch.setattr(command.Library, "modules", fail)
    assert command.main(["check", "open_clip"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("open_clip")
    assert f"cannot be imported: {error or 'OSError'}" in printed
