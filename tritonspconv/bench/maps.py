"""Cases of kernel maps alone, through the function of each library that builds them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritonspconv.bench.cases import Case, Trial
from tritonspconv.bench.peers import OURS, Peer
from tritonspconv.bench.reference import Window, count_pairs, keys_of, reached_keys
from tritonspconv.bench.scenes import Scene, SceneStore
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map

HEADER = ("scene", "voxels", "map", "forms", "time")
WINDOWS = {
    "SubM 3^3": Window(3, 1, 1),
    "conv 3^3 /2": Window(3, 2, 1),
    "conv 2^3 /2": Window(2, 2, 0),
}
# Output indices, and the number of pairs if the library tells it.
Built = tuple[Tensor, Callable[[], int | None]]


def map_cases(scenes: SceneStore, passed: str) -> list[Case]:
    """Return the cases of the section ``maps``; ``passed`` names the measured pass."""
    return [
        _case(scenes[name], kind, training, passed)
        for name in ("waymo_b4", "sphere", "kitti")
        for kind in WINDOWS
        for training in (False, True)
    ]


def _case(scene: Scene, kind: str, training: bool, passed: str) -> Case:
    forms = "training" if training else "inference"
    labels = (scene.name, f"{len(scene.indices):,}", kind, forms)

    def prepare(peer: Peer) -> Trial:
        build = _builder(peer)

        def check() -> dict[str, float]:
            return _errors(scene, kind, *build(peer, scene, kind, training))

        return Trial({passed: lambda: build(peer, scene, kind, training)}, check)

    return Case(labels, (passed,), prepare, {"sites": 0.0, "pairs": 0.0})


def _builder(peer: Peer) -> Callable[[Peer, Scene, str, bool], Built]:
    if peer.name == OURS:
        return _build_ours
    return _build_native if peer.algo is not None else _build_implicit


def _build_ours(peer: Peer, scene: Scene, kind: str, training: bool) -> Built:
    """Build the table of the forward pass and, for training, the data of the gradients."""
    grid = Grid((0, 0, 0), scene.spatial_shape, scene.batch_size)
    found = kernel_map(ActiveSites(scene.indices, grid), _our_geometry(kind))
    if training:
        # These forms are made on first use.
        _ = found.in_table, found.pair_list
    return found.out_sites.coords, found.num_pairs


@functools.lru_cache
def _our_geometry(kind: str) -> ConvGeometry:
    """Return the objects that a layer makes once and keeps."""
    window = WINDOWS[kind]
    size, stride, padding, dilation = ((n,) * 3 for n in _geometry(window))
    if window.stride == 1:
        return ConvGeometry.submanifold(size, dilation)
    return ConvGeometry(size, stride, padding, dilation)


def _build_implicit(peer: Peer, scene: Scene, kind: str, training: bool) -> Built:
    """Build as the layers of spconv do: without the training forms for inference only if SubM."""
    window = WINDOWS[kind]
    subm = window.stride == 1
    size, stride, padding, dilation = ([n] * 3 for n in _geometry(window))
    result = peer.module.ops.get_indice_pairs_implicit_gemm(
        scene.indices,
        scene.batch_size,
        list(scene.spatial_shape),
        peer.module.ConvAlgo.MaskImplicitGemm,
        ksize=size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        out_padding=[0, 0, 0],
        subm=subm,
        is_train=training or not subm,
    )
    return result[0], lambda: int((result[2] >= 0).sum())


def _build_native(peer: Peer, scene: Scene, kind: str, training: bool) -> Built:
    """Build the pair lists of spconv's CPU layers, whose centre tap is implied, not counted."""
    window = WINDOWS[kind]
    size, stride, padding, dilation = ([n] * 3 for n in _geometry(window))
    result = peer.module.ops.get_indice_pairs(
        scene.indices,
        scene.batch_size,
        list(scene.spatial_shape),
        peer.algo,
        size,
        stride,
        padding,
        dilation,
        [0, 0, 0],
        window.stride == 1,
    )
    return result[0], lambda: None


def _geometry(window: Window) -> tuple[int, int, int, int]:
    return window.size, window.stride, window.padding, 1


def _errors(
    scene: Scene, kind: str, indices: Any, pairs: Callable[[], int | None]
) -> dict[str, float]:
    """Compare output voxels and the number of pairs; nothing may differ."""
    window = WINDOWS[kind]
    if window.stride == 1:
        agree = torch.equal(indices, scene.indices)
    else:
        axes = scene.spatial_shape
        shape = [(n + 2 * window.padding - window.size) // window.stride + 1 for n in axes]
        expected = reached_keys(scene.indices, window, shape)
        agree = torch.equal(keys_of(indices, shape).sort().values, expected)
    errors = {"sites": 0.0 if agree else float("inf")}
    found = pairs()
    if found is not None:
        right = count_pairs(scene.indices, scene.spatial_shape, indices, window)
        errors["pairs"] = float(abs(found - right))
    return errors
