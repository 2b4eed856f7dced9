"""``MinkowskiEngine.MinkowskiFunctional``: functions of torch on the features of a tensor.

The first group returns a sparse tensor or field with the coordinates of its input. Losses take a
sparse tensor or field and a torch target, and return a torch tensor. All further arguments are the
same as in the function of this name in :mod:`torch.nn.functional`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from compat.minkowski._features import AnyTensor, features_of, with_features
from compat.minkowski._names import module_getattr


def _on_features(function: Callable[..., Tensor]) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_features(input: AnyTensor, *args: Any, **kwargs: Any) -> AnyTensor:
        return with_features(input, function(features_of(input), *args, **kwargs))

    return on_features


def _loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def loss(input: Any, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(features_of(input), target, *args, **kwargs)

    return loss


threshold = _on_features(F.threshold)
relu = _on_features(F.relu)
hardtanh = _on_features(F.hardtanh)
hardswish = _on_features(F.hardswish)
relu6 = _on_features(F.relu6)
elu = _on_features(F.elu)
selu = _on_features(F.selu)
celu = _on_features(F.celu)
leaky_relu = _on_features(F.leaky_relu)
prelu = _on_features(F.prelu)
rrelu = _on_features(F.rrelu)
glu = _on_features(F.glu)
gelu = _on_features(F.gelu)
logsigmoid = _on_features(F.logsigmoid)
hardshrink = _on_features(F.hardshrink)
tanhshrink = _on_features(F.tanhshrink)
softsign = _on_features(F.softsign)
softplus = _on_features(F.softplus)
softmin = _on_features(F.softmin)
softmax = _on_features(F.softmax)
softshrink = _on_features(F.softshrink)
gumbel_softmax = _on_features(F.gumbel_softmax)
log_softmax = _on_features(F.log_softmax)
tanh = _on_features(F.tanh)
sigmoid = _on_features(F.sigmoid)
hardsigmoid = _on_features(F.hardsigmoid)
silu = _on_features(F.silu)
batch_norm = _on_features(F.batch_norm)
normalize = _on_features(F.normalize)
linear = _on_features(F.linear)
dropout = _on_features(F.dropout)
alpha_dropout = _on_features(F.alpha_dropout)

binary_cross_entropy = _loss(F.binary_cross_entropy)
binary_cross_entropy_with_logits = _loss(F.binary_cross_entropy_with_logits)
poisson_nll_loss = _loss(F.poisson_nll_loss)
cross_entropy = _loss(F.cross_entropy)
hinge_embedding_loss = _loss(F.hinge_embedding_loss)
kl_div = _loss(F.kl_div)
l1_loss = _loss(F.l1_loss)
mse_loss = _loss(F.mse_loss)
multilabel_margin_loss = _loss(F.multilabel_margin_loss)
multilabel_soft_margin_loss = _loss(F.multilabel_soft_margin_loss)
multi_margin_loss = _loss(F.multi_margin_loss)
nll_loss = _loss(F.nll_loss)
smooth_l1_loss = _loss(F.smooth_l1_loss)
soft_margin_loss = _loss(F.soft_margin_loss)

__getattr__ = module_getattr(__name__)
