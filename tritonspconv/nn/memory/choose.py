"""The choice of the modules whose activations are computed again."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tritonspconv.geometry import ConvGeometry
from tritonspconv.nn.memory.measure import Call, Measured

# A map is made again only if its bytes are at least this share of the peak.
_SMALLEST_SHARE = 0.05


def choose_segments(
    measured: Measured, candidates: Collection[str], share: float
) -> tuple[list[str], int]:
    """Choose the modules that give a low peak and take little time.

    The first choice has the lowest peak. It consists of the largest modules that save at most so
    many bytes, and every bound that makes a difference is tried: a low bound keeps many arguments,
    a high bound lets the backward pass compute much at once. Then modules leave the choice, first
    those of many layers that hardly raise the peak. So the last module of a network runs once: its
    backward pass comes first, while everything else is kept anyway.

    Args:
        measured: The pass.
        candidates: Names of modules.
        share: Modules leave the choice up to this share of the bytes that the pass saves.

    Returns:
        The names in the order of their calls, and the estimated peak in bytes.
    """
    calls = [call for call in measured.calls if call.name in candidates]
    sizes: dict[str, int] = {}
    layers: dict[str, int] = {}
    for call in calls:
        own = set(measured.saved[call.start : call.end])
        size = sum(measured.num_bytes[storage] for storage in own)
        sizes[call.name] = max(size, sizes.get(call.name, 0))
        # On a GPU the time of a small layer is that of its launches, whatever its rows.
        layers[call.name] = layers.get(call.name, 0) + len(own)

    def peak_of(names: Collection[str]) -> int:
        return peak_bytes(measured, [call for call in calls if call.name in names])

    plain = peak_of(())
    choices = [_largest_below(bound, sizes) for bound in sorted(set(sizes.values()))]
    chosen = min([set[str](), *choices], key=peak_of)
    peak = peak_of(chosen)
    limit = max(peak, int(share * plain))
    # The bytes of these maps are not in the peak.
    released = maps_to_release(measured, chosen, peak)
    while True:
        without = {name: peak_of(chosen - {name}) for name in sorted(chosen) if not released[name]}
        allowed = [name for name in without if without[name] <= limit]
        if not allowed:
            break
        least = max(allowed, key=lambda name: layers[name] / (1 + max(without[name] - peak, 0)))
        chosen.remove(least)
        peak = without[least]
    return list(dict.fromkeys(call.name for call in calls if call.name in chosen)), peak


def _largest_below(bound: int, sizes: dict[str, int]) -> set[str]:
    """Return the outermost modules that save at most ``bound`` bytes."""
    small = {name for name, size in sizes.items() if size <= bound}
    return {name for name in small if small.isdisjoint(_outer(name))}


def peak_bytes(measured: Measured, segments: Iterable[Call]) -> int:
    """Return the most bytes that the backward pass finds saved, if ``segments`` run again.

    Gradients and kernel maps are not counted.
    """
    kept: set[int] = set()
    held = peak = place = 0

    def keep(storages: Iterable[int]) -> None:
        nonlocal held
        new = set(storages) - kept
        kept.update(new)
        held += sum(measured.num_bytes[storage] for storage in new)

    for call in sorted(segments, key=lambda call: call.start):
        if call.start < place:
            continue
        keep(measured.saved[place : call.start])
        keep(call.inputs)
        again = set(measured.saved[call.start : call.end]) - kept
        peak = max(peak, held + sum(measured.num_bytes[storage] for storage in again))
        place = call.end
    keep(measured.saved[place:])
    return max(peak, held)


def maps_to_release(
    measured: Measured, segments: Collection[str], peak: int
) -> dict[str, frozenset[ConvGeometry]]:
    """Return, for each segment, the geometries of large kernel maps that it alone uses."""
    spans = [call for call in measured.calls if call.name in segments]
    users: dict[tuple[object, ...], set[str]] = {}
    maps = {}
    for kernel_map, place in measured.map_uses:
        ends = frozenset((id(kernel_map.in_sites), id(kernel_map.out_sites)))
        key = kernel_map.geometry, ends
        maps[key] = kernel_map
        user = next((call.name for call in spans if call.start <= place < call.end), "")
        users.setdefault(key, set()).add(user)
    found: dict[str, set[ConvGeometry]] = {name: set() for name in segments}
    for key, names in users.items():
        if len(names) == 1 and maps[key].num_bytes >= _SMALLEST_SHARE * peak:
            (name,) = names
            if name:
                found[name].add(maps[key].geometry)
    return {name: frozenset(geometries) for name, geometries in found.items()}


def _outer(name: str) -> Iterable[str]:
    """Return the names of the modules around a module."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))
