"""Moving digits: the pieces of the example, and the whole of it."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from effformer.context import Ledger
from effformer.train import Batch

MNIST = "EFFFORMER_MNIST"
"""Environment variable with a folder of MNIST's IDX files."""


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_digits_move_straight_on_and_bounce(example: ModuleType) -> None:
    room, fastest = example.SIDE - example.DIGIT, example.SPEED
    corners = example.paths(200, 40, rng())
    assert corners.shape == (200, 40, 2)
    assert int(corners.min()) == 0
    assert int(corners.max()) == room
    steps = corners.diff(dim=1)
    for digit in range(200):
        for axis in range(2):
            place = corners[digit, 0, axis].item()
            speed = steps[digit, :, axis].abs().max().item()
            assert 1 <= speed <= fastest
            # the obvious version: pixel after pixel, turning where it is stuck
            found = []
            for turn in (1, -1):
                x, way, seen = place, turn, [place]
                for _ in range(39):
                    for _ in range(speed):
                        way = way if 0 <= x + way <= room else -way
                        x += way
                    seen.append(x)
                found.append(seen)
            assert corners[digit, :, axis].tolist() in found


def test_digits_start_anywhere_and_go_everywhere(example: ModuleType) -> None:
    corners = example.paths(2000, 2, rng())
    room = example.SIDE - example.DIGIT
    assert corners[:, 0].unique(dim=0).shape[0] == (room + 1) ** 2
    inner = corners[((corners[:, 0] >= 2) & (corners[:, 0] <= room - 2)).all(dim=1)]
    velocities = {tuple(v) for v in (inner[:, 1] - inner[:, 0]).tolist()}
    allowed = [s * way for s in range(1, example.SPEED + 1) for way in (1, -1)]
    assert velocities == {(down, right) for down in allowed for right in allowed}


def test_clips_show_the_digits_where_they_are(example: ModuleType) -> None:
    digits = torch.rand(3, 1, 8, 8) + 0.1
    corners = example.paths(3, 6, rng())
    clips = example.draw(digits, corners)
    assert clips.shape == (3, 6, 1, example.SIDE, example.SIDE)
    for b in range(3):
        for t in range(6):
            row, column = corners[b, t].tolist()
            frame = clips[b, t, 0]
            assert torch.equal(frame[row : row + 8, column : column + 8], digits[b, 0])
            assert int((frame > 0).sum()) == 64
    for b in range(3):
        assert torch.equal(example.draw(digits[b : b + 1], corners[b : b + 1])[0], clips[b])


def test_clips_depend_on_the_seed_only_and_repeating_a_frame_is_wrong(example: ModuleType) -> None:
    images = example.read("digits")[1]["x"][:50]
    clips = example.make_clips(images, 10, rng())
    assert float(clips.min()) == 0
    assert float(clips.max()) == 1
    assert torch.equal(clips, example.make_clips(images, 10, rng()))
    assert not torch.equal(clips, example.make_clips(images, 10, rng(1)))
    assert (clips.diff(dim=1).square().mean(dim=(0, 2, 3, 4)) > 0.01).all()


def test_no_digit_is_both_learned_and_tested(example: ModuleType) -> None:
    learned, tested = example.read("digits")
    assert (len(learned), len(tested)) == (1438, 359)
    known = {image.numpy().tobytes() for image in learned["x"]}
    assert not any(image.numpy().tobytes() in known for image in tested["x"])


def test_an_objective_that_a_perfect_model_satisfies(example: ModuleType) -> None:
    batch = Batch(x=torch.rand(4, 1, 8, 8))
    clips = example.make_clips(batch["x"], 10, rng(5))

    class Perfect(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert torch.equal(x, clips[:, :5])
            return clips[:, 5:]

    assert float(example.NextFrames()(Perfect(), batch, rng(5), Ledger())) == 0


def test_the_model_sees_standardized_frames(example: ModuleType) -> None:
    learned, _ = example.read("digits")
    model = example.build(learned)
    clips = example.make_clips(learned["x"][:300], 10, rng())
    seen: list[torch.Tensor] = []
    hook = model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        ten = model.predict(clips[:, :5], 10)
        hook.remove()
        torch.testing.assert_close(seen[0].mean(), torch.tensor(0.0), rtol=0, atol=0.05)
        torch.testing.assert_close(seen[0].std(), torch.tensor(1.0), rtol=0, atol=0.05)
        first = model(clips[:, :5])
        torch.testing.assert_close(ten, torch.cat([first, model(first)], dim=1))


def test_training_lowers_the_error(example: ModuleType, tmp_path: Path) -> None:
    learned, tested = example.read("digits")
    model = example.build(learned)
    clips = example.make_clips(tested["x"][:20], 15, rng())

    def error() -> float:
        predicted = example.predict(model, clips[:, :5], 10, batch=8)
        return float((predicted - clips[:, 5:]).square().mean())

    before = error()
    example.fit(model, learned, 10)
    assert error() < 0.8 * before
    assert not model.training
    example.picture(tmp_path / "clips.png", clips[:2], example.predict(model, clips[:2, :5], 10))
    assert (tmp_path / "clips.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_did_not_learn_fails(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="of the error of the last frame, more than a third"):
        example.main(["--steps", "1", "--out", str(tmp_path / "clips.png")])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        example.main(["--data", str(tmp_path / "nowhere")])


@pytest.mark.slow
def test_packaged_digits_are_predicted(example: ModuleType, tmp_path: Path) -> None:
    result = example.main(["--out", str(tmp_path / "clips.png")])
    assert result["share"] <= 0.2
    assert (tmp_path / "clips.png").exists()


@pytest.mark.slow
def test_mnist_is_predicted(example: ModuleType, tmp_path: Path) -> None:
    folder = os.environ.get(MNIST)
    if folder is None:
        pytest.skip(f"needs MNIST's IDX files: set {MNIST} to their folder")
    result = example.main(["--data", folder, "--out", str(tmp_path / "clips.png")])
    assert result["share"] <= 0.2
