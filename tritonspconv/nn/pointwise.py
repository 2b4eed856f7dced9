"""Layers that treat every row alike: torch modules that also take sparse tensors."""

from __future__ import annotations

from torch import nn

from tritonspconv.nn._module import FeatureModule


class Linear(FeatureModule, nn.Linear):
    """:class:`torch.nn.Linear` on the channels of every row."""


class Identity(FeatureModule, nn.Identity):
    """:class:`torch.nn.Identity`."""


class Dropout(FeatureModule, nn.Dropout):
    """:class:`torch.nn.Dropout` of single entries."""


class ReLU(FeatureModule, nn.ReLU):
    """:class:`torch.nn.ReLU`."""


class LeakyReLU(FeatureModule, nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU`."""


class GELU(FeatureModule, nn.GELU):
    """:class:`torch.nn.GELU`."""


class SiLU(FeatureModule, nn.SiLU):
    """:class:`torch.nn.SiLU`."""


class Sigmoid(FeatureModule, nn.Sigmoid):
    """:class:`torch.nn.Sigmoid`."""


class Tanh(FeatureModule, nn.Tanh):
    """:class:`torch.nn.Tanh`."""
