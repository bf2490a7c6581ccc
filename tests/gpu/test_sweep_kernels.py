"""Kernels of the sweep beside the five ops, against float64: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from devices import on_each_device
from pycircuit.kernels.norm_back import norm_back
from pycircuit.kernels.split import split
from pycircuit.kernels.spread import spread
from torch import Tensor

pytestmark = on_each_device
TOLERANCE = 1e-6


def normal(device: str, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def positive(device: str, *shape: int) -> Tensor:
    return normal(device, *shape, seed=9).abs() + 0.5


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("width", [7, 64, 1500])
def test_parts_of_divided_rows(device: str, width: int) -> None:
    numbers, sigma, position = (
        normal(device, 5, 2 * width)[:, :width],
        positive(device, 4),
        torch.tensor([3, 0, 1, 2, 3])[1:],
    )
    position = position.to(device)
    parts = split(numbers[1:], 3, sigma, position).view(4, 6, width)
    assert distance(parts[:, :3].double().sum(1), numbers[1:].double() / sigma.double()[position][:, None]) < TOLERANCE
    assert torch.equal(parts[:, [0, 1, 0]], parts[:, [3, 4, 5]])
    assert torch.equal(split(numbers[1:], 2, torch.ones(4, device=device), position), split(numbers[1:], 2))


@pytest.mark.parametrize("with_gain", [True, False])
def test_norm_back(device: str, with_gain: bool) -> None:
    gradient, sigma, position = (
        normal(device, 6, 1500),
        positive(device, 9),
        torch.tensor([8, 1, 1, 0, 5, 7]).to(device),
    )
    gain = normal(device, 1500, seed=1) if with_gain else None
    expected = gradient.double() / sigma.double()[position][:, None]
    expected = expected * gain.double() if with_gain else expected
    assert distance(norm_back(gradient, gain, sigma, position), expected) < TOLERANCE


def test_norm_back_of_several_layers(device: str) -> None:
    gradient, sigma, gain = normal(device, 6, 40), positive(device, 3, 5), normal(device, 3, 40, seed=1)
    layer, position = torch.tensor([2, 2, 1, 0, 0, 0]).to(device), torch.tensor([4, 1, 1, 0, 2, 4]).to(device)
    expected = gradient.double() * gain.double()[layer] / sigma.double()[layer, position][:, None]
    assert distance(norm_back(gradient, gain, sigma, layer * 5 + position, layer), expected) < TOLERANCE


@pytest.mark.parametrize(("heads", "width"), [(1, 5), (3, 130)])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_spread(device: str, heads: int, width: int, in_place: bool, normed: bool) -> None:
    """Targets at these positions; their pattern's rows are read in place, or there is one a target."""
    read_at, positions, first = torch.tensor([0, 69, 3, 3, 64]), 70, 11
    vectors, stored = (
        normal(device, heads + 1, len(read_at), width),
        normal(device, heads, positions, positions, seed=1),
    )
    pattern = stored if in_place else stored[:, read_at.to(device)].contiguous()
    column_sigma, row_sigma = (positive(device, positions), positive(device, positions) + 1) if normed else (None, None)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (read_at + 1).cumsum(0)])
    out = torch.full((first + int(offsets[-1]), width), torch.nan, device=device)
    prefix_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), offsets + first])[1:].to(device)
    query = read_at.to(device) if in_place else None
    spread(vectors, pattern, query, column_sigma, row_sigma, prefix_ptr, positions, out[first:])
    expected = []
    for t, position in enumerate(read_at.tolist()):
        share = stored[:, position, : position + 1].double()
        rows = (share / column_sigma[: position + 1] if column_sigma is not None else share).T @ vectors[
            :-1, t
        ].double()
        rows[-1] += vectors[-1, t].double()
        expected.append(rows / row_sigma[: position + 1, None] if row_sigma is not None else rows)
    assert out[:first].isnan().all()
    assert distance(out[first:], torch.cat(expected)) < TOLERANCE
