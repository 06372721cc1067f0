"""Calibration files: made, used, and refused when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steno.calibration import load_calibration, read_about, save_calibration
from steno.cli.main import run
from steno.errors import CalibrationError

TEXT = "the hen is here. " * 5


@pytest.fixture
def statistics(tiny_folder: Path, tmp_path: Path) -> Path:
    data, out = tmp_path / "data.txt", tmp_path / "stats.safetensors"
    data.write_text(TEXT)
    assert (
        run(["calibrate", "expected_attention", "--model", str(tiny_folder), "--data", str(data), "--out", str(out)])
        == 0
    )
    return out


def test_the_same_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    tensors, about = {name: torch.ones(2) for name in "dacb"}, {name: name for name in "qwertyuiop"}
    for i, order in enumerate(("dacb", "abcd")):
        save_calibration(tmp_path / str(i), {name: tensors[name] for name in order}, about)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    assert read_about(tmp_path / "0") == about
    save_file({"x": torch.ones(1)}, tmp_path / "2", metadata={"x": "y"})
    with pytest.raises(CalibrationError, match="does not say what it was made from"):
        read_about(tmp_path / "2")


@pytest.fixture
def ask(tiny_folder: Path, tmp_path: Path):
    document = tmp_path / "text.txt"
    document.write_text(TEXT)

    def run_ask(recipe: str) -> int:
        return run(
            ["ask", "he?", "--model", str(tiny_folder), "--document", str(document), "--recipe", recipe,
             "--max-new-tokens", "3", "--json"]
        )  # fmt: skip

    return run_ask


def test_statistics_of_the_same_text_change_nothing(statistics: Path, ask, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(f"expected_attention(statistics={str(statistics)!r}) @ 50%") == 0
    assert '"answer"' in capsys.readouterr().out
    tensors = load_file(statistics)
    assert tensors["query_mean"].shape == (2, 4, 16)
    assert tensors["query_cov"].shape == (2, 4, 16, 16)
    assert torch.allclose(tensors["query_cov"], tensors["query_cov"].mT, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_in_one_line(statistics: Path, ask, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(statistics)
    tensors["query_mean"][0, 0, 0] = value
    save_file(tensors, statistics)
    capsys.readouterr()
    assert ask(f"expected_attention(statistics={str(statistics)!r}) @ 50%") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "NaN or infinity in 1 of" in err
    assert err.count("\n") == 1


def test_statistics_of_another_model_are_refused(statistics: Path, ask, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {name: tensor[:, :2].contiguous() for name, tensor in load_file(statistics).items()}
    save_file(tensors, statistics)
    assert ask(f"expected_attention(statistics={str(statistics)!r}) @ 50%") == 2
    assert "calibrate on this model" in capsys.readouterr().err


def test_damaged_missing_and_incomplete_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CalibrationError, match="no such calibration file"):
        load_calibration(path, ("a",))
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(CalibrationError, match="not a readable safetensors file"):
        load_calibration(path, ("a",))
    save_calibration(path, {"b": torch.ones(3)}, {"model": "m"})
    with pytest.raises(CalibrationError, match="lacks a"):
        load_calibration(path, ("a", "b"))
    assert torch.equal(load_calibration(path, ("b",))["b"], torch.ones(3))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_calibration(path, {"b": torch.ones(3)}, {})
    with pytest.raises(CalibrationError, match="cannot write"):
        save_calibration(tmp_path / "no" / "x.safetensors", {"b": torch.ones(3)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
