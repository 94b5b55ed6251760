"""Analysis of a run: attention distances and amplitudes by hand, and the command's folder."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import csv_rows, succeed, write_data
from PIL import Image
from run_configs import run_config
from scipy.spatial.distance import cdist
from segment_anything.modeling.image_encoder import Attention

from naslora.errors import UserError
from naslora.study.encoder_statistics import (
    AttentionWeights,
    attention_distances,
    block_statistics,
    relative_log_amplitude,
)
from naslora.study.operation_losses import moved_to_skip
from naslora.training.run_model import build_adapted_model
from naslora_kernels.operations import SKIP

SMALL = ("--model", "vit_t", "--image-size", 32, "--workers", 0, "--epochs", 2, "--batch-size", 2)


def test_a_weight_that_moves_to_skip_keeps_the_sum():
    alpha = torch.randn(8)
    weights, moved = alpha.softmax(0).double(), moved_to_skip(alpha, 2).softmax(0)
    assert moved[2] == 0 and moved[SKIP] == pytest.approx(float(weights[SKIP] + weights[2]))
    others = [i for i in range(8) if i not in (2, SKIP)]
    torch.testing.assert_close(moved[others], weights[others], rtol=1e-6, atol=0)  # of float32


def mean_distances(side: int) -> np.ndarray:
    """(side, side): the mean distance of each cell of a grid to all, itself included."""
    cells = list(itertools.product(range(side), range(side)))
    return cdist(cells, cells).mean(1).reshape(side, side)


@pytest.mark.parametrize("side", [1, 4, 7])
def test_attention_without_preference_has_the_mean_distance_of_the_grid(side):
    attention = Attention(8, num_heads=2, use_rel_pos=True, input_size=(side, side))
    torch.nn.init.zeros_(attention.qkv.weight)
    torch.nn.init.zeros_(attention.qkv.bias)
    with AttentionWeights() as weights:
        attention(torch.rand(3, side, side, 8))
    found = attention_distances(weights.kept, 3)
    assert found.shape == (3, side, side)
    # float32 softmax and sums of up to 49 terms
    np.testing.assert_allclose(found[0].detach().numpy(), mean_distances(side), rtol=1e-5)


def test_a_checkerboard_on_a_grey_has_the_amplitudes_it_was_made_of():
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    board = (-1.0) ** (rows + columns)
    maps = (5 + 0.25 * board)[None, ..., None].expand(1, 6, 6, 3)
    # The amplitude of frequency 0 is 36 * 5, that of the highest 36 * 0.25
    found = relative_log_amplitude(maps)
    assert found.tolist() == [pytest.approx(math.log(0.25 / 5), abs=1e-5)]
    assert float(relative_log_amplitude(torch.ones(1, 8, 8, 2))) < -15  # no high frequency


def test_every_block_of_a_vit_in_pixels(tiny_sam):
    # A grid of 16 tokens in windows of 14: four windows, padded to 28 x 28. Queries without
    # preference are as far from all cells of a window as the grid is; those of the padding are out.
    encoder = build_adapted_model(run_config(name="vit_t", image_size=256)).image_encoder.eval()
    for block in encoder.blocks:
        torch.nn.init.zeros_(block.attn.qkv.base.weight)
        torch.nn.init.zeros_(block.attn.qkv.base.bias)
    windowed, everywhere = block_statistics(encoder, torch.rand(2, 1, 3, 256, 256), 256)
    window, grid = mean_distances(14), mean_distances(16)
    parts = [window, window[:, :2], window[:2], window[:2, :2]]
    expected = 16 * np.concatenate([part.flatten() for part in parts]).mean()
    assert windowed.attention_distance == pytest.approx(expected, rel=1e-4)
    assert everywhere.attention_distance == pytest.approx(16 * grid.mean(), rel=1e-4)
    assert (windowed.block, windowed.window) == (1, 14)
    assert (everywhere.block, everywhere.window) == (2, None)
    assert math.isfinite(windowed.log_amplitude)
    vpt = build_adapted_model(run_config(name="vit_t", image_size=256, method="vpt")).image_encoder
    with pytest.raises(UserError, match="attends to more tokens than"):
        block_statistics(vpt, torch.rand(1, 1, 3, 256, 256), 256)


def test_every_block_of_mobile_sam():
    config = run_config(name="mobile_sam", image_size=128, checkpoint="none")
    encoder = build_adapted_model(config).image_encoder
    found = block_statistics(encoder.eval(), [torch.rand(1, 3, 128, 128)], 128)
    assert [block.window for block in found] == [7] * 2 + [14] * 6 + [7] * 2
    # The first stage with attention has tokens of 8 pixels, the others of 16; no token can look
    # farther than across its window.
    sides = [8 * 7] * 2 + [16 * 14] * 6 + [16 * 7] * 2
    for block, side in zip(found, sides, strict=True):
        assert 0 < block.attention_distance < side


@pytest.fixture(scope="module")
def runs(tiny_sam, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    data = write_data(root / "data", train=4, val=1, test=3)
    folders = [root / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        arguments = ("--data", data, "--output", folder, "--seed", seed, "--search-start", 1)
        succeed("train", *arguments, *SMALL)
    return folders


def test_the_folder(runs, tmp_path):
    succeed("analyse", *runs, "--output", tmp_path / "analysis", "--images", 2)
    output = tmp_path / "analysis"
    rows = csv_rows(output / "encoder.csv")
    models = [row["model"] for row in rows]
    assert models == ["random"] * 2 + ["frozen"] * 2 + ["trained"] * 2  # two blocks each
    names = ("attention_distance", "log_amplitude", "gradcam", "convergence")
    for name in (*names, "operations"):
        assert np.asarray(Image.open(output / f"{name}.png")).std() > 0
    report = (output / "report.html").read_text()
    shown = ("Table 4", "Fig. 4", "Fig. C1", "Fig. C2", "Means over 2 test images")
    assert all(text in report for text in (*shown, "Operations moved to skip"))
    # lora_B is zero at the start and hardly more after two epochs: the trained encoder looks where
    # the frozen one does, and the random one, drawn from another seed, elsewhere.
    distances = np.array([float(row["attention_distance"]) for row in rows]).reshape(3, 2)
    random, frozen, trained = distances
    assert np.abs(trained - frozen).max() < np.abs(random - frozen).max()

    # Convergence: mean and standard deviation over the two seeds, from their histories
    histories = [[float(row["val_dice"]) for row in csv_rows(run / "history.csv")] for run in runs]
    for row, a, b in zip(csv_rows(output / "convergence.csv"), *histories, strict=True):
        assert float(row["mean_val_dice"]) == pytest.approx((a + b) / 2)
        spread = abs(a - b) / math.sqrt(2)
        assert float(row["standard_deviation"]) == pytest.approx(spread, abs=1e-12)
    operations = csv_rows(output / "operations.csv")
    assert sum(float(row["mean_weight"]) for row in operations) == pytest.approx(1)
    shares = [float(row["share_of_layers_where_largest"]) for row in operations]
    assert sum(shares) == pytest.approx(1)
    losses = csv_rows(output / "operation_losses.csv")
    linears = ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
    adapted = [f"image_encoder.blocks.{block}.{linear}" for block in (0, 1) for linear in linears]
    random = [f"random operations, draw {draw}" for draw in range(1, 6)]
    assert [row["layer"] for row in losses] == [*adapted, "all layers", *random]
    mean = sum(float(row["weight"]) for row in losses[:8]) / 8
    assert float(losses[8]["weight"]) == pytest.approx(mean)
