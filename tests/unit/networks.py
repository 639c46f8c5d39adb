"""A network of a few weights for the tests of what serves it."""

import torch
from torch import nn


class Small(nn.Module):
    """A residual block with all that is fused: batch norm, ReLU, an addition, hardtanh."""

    def __init__(self, classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6())
        self.first = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(self.second(self.first(x)) + x).mean((2, 3)))


def small(classes: int, size: int) -> Small:
    """In evaluation mode, with statistics for batch norm, for images of `size` x `size`."""
    torch.manual_seed(0)
    network = Small(classes)
    network(torch.rand(64, 3, size, size))
    return network.eval()
