"""Sentences that say what bounds a network, and how to speed it up."""

from __future__ import annotations

from tritonspconv.profile.layers import NetworkProfile


def verdicts(profile: NetworkProfile) -> list[str]:
    """Return sentences, the most important first.

    Args:
        profile: Profile of a network. A network without sparse layers gives a single sentence.
    """
    sparse_ms = profile.total("ms", "sparse")
    all_ms = profile.total("ms")
    if not sparse_ms:
        return [
            "The network has no sparse convolution and no sparse pooling, so there is no advice."
        ]
    sentences = []
    if profile.busy is not None and profile.busy < 0.6:
        sentences.append(
            f"The GPU is busy {100 * profile.busy:.0f} % of the time: the host bounds this "
            "network. Batch more scans, use tritonspconv.optimize, or capture the step in a graph."
        )
    map_share = profile.total("map_ms", "sparse") / all_ms
    built = int(profile.total("maps_built", "sparse"))
    layers = sum(layer.role == "sparse" for layer in profile.layers)
    if map_share > 0.25:
        sentences.append(
            f"Kernel maps and coordinates take {100 * map_share:.0f} % of the time: "
            f"{_counted(built, 'map is', 'maps are')} built for "
            f"{_counted(layers, 'layer', 'layers')}. Layers of one geometry on the same sites "
            "share a map: pass the same tensor on, and use one window size where you can."
        )
    other_share = 1 - sparse_ms / all_ms
    if other_share > 0.25:
        sentences.append(
            f"Norms, activations and other dense modules take {100 * other_share:.0f} % of the "
            "time. tritonspconv.optimize runs them with the convolutions on a GPU; "
            "tritonspconv.fuse folds norms into the weights for inference."
        )
    product_ms = profile.total("product_ms", "sparse")
    if product_ms > 0.4 * all_ms:
        sentences.append(_about_products(profile, product_ms, all_ms))
    top = sorted(profile.layers, key=lambda layer: -layer.ms)[:3]
    share = sum(layer.ms for layer in top) / all_ms
    names = ", ".join(layer.name for layer in top)
    sentences.append(f"The slowest layers are {names}: {100 * share:.0f} % of the time.")
    return sentences


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _about_products(profile: NetworkProfile, product_ms: float, all_ms: float) -> str:
    seconds = product_ms / 1e3
    bandwidth = profile.total("moved_bytes", "sparse") / seconds / profile.bandwidth
    rate = profile.total("flops", "sparse") / seconds / profile.rate
    reached = (
        f"Products take {100 * product_ms / all_ms:.0f} % of the time. They reach "
        f"{100 * bandwidth:.0f} % of the bandwidth of a copy and {100 * rate:.0f} % of the rate of "
        "a large matrix product here"
    )
    if max(bandwidth, rate) < 0.15:
        return (
            f"{reached}: neither bounds them. Layers are small, or other programs keep the device "
            "busy. Profile a larger batch on an idle machine."
        )
    what = "moving rows" if bandwidth > rate else "multiplying"
    advice = "float16 halves the bytes" if bandwidth > rate else "half precision multiplies faster"
    return f"{reached}, so {what} bounds them: {advice} on a GPU."
