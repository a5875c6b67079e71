"""The search: successive halving over growing subsets of the images, then small changes of the best settings.

The small changes are about how many tokens each layer removes. Everything here asks `Trials`, which remembers all
results. So a search that was stopped takes the same way again.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

from ..methods import METHODS, method_of
from ..modeling.configuration_base import ReductionConfig
from .parts import subset_sizes
from .space import Variant, even_setting, shape_of
from .trials import Quality, Trials


TOLERANCE = 0.015  # how far an adaptive method may exceed the share, because it was fitted on other images
MOST_MOVES = 50  # changes that one climb tries
CLIMBS = 2
FRONT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
STEP = 0.02  # step of the share in the search for the cheapest setting within a drop
LEAST_SHARE = 0.3  # lower shares are not tried if the target is a speed-up or a drop
FIRST_SHARE = 0.7  # methods are compared at this share before it is known which share a drop allows
TIMINGS = 4  # tries to find the share at which a variant is as fast as wanted


class Target(NamedTuple):
    """What a search is asked for.

    Attributes:
        kind: "share", the highest share of the multiply-adds; "speedup", the lowest speed-up; or "max_drop", the
            largest drop of the accuracy in points.
        value: The number.
    """

    kind: str
    value: float


class Candidate(NamedTuple):
    """A variant, and its setting at one share."""

    variant: Variant
    setting: ReductionConfig


class Clock(NamedTuple):
    """Begin and end of the search, in seconds of trials."""

    begin: float
    end: float

    def at(self, part: float) -> float:
        """Return the time when this part of the search, from 0 to 1, is over."""
        return self.begin + part * (self.end - self.begin)


def search(trials: Trials, variants: Sequence[Variant], target: Target, seed: int, end: float) -> None:
    """Try settings until the clock of `trials` is at `end` or nothing is left to try. `trials` keeps all results."""
    clock = Clock(trials.clock, end)
    variants = _in_turns(variants)
    if target.kind == "share":
        _for_share(trials, variants, target.value, seed, clock)
    elif target.kind == "speedup":
        _for_speedup(trials, variants, target.value, seed, clock)
    else:
        _for_drop(trials, variants, target.value, seed, clock)


def measured(trials: Trials) -> list[tuple[ReductionConfig, Quality]]:
    """List the settings that were measured on all images of the search, with their quality, the best first."""
    found = [(setting, trials.known_quality(setting)) for setting in trials.tried()]
    whole = [(setting, quality) for setting, quality in found if quality is not None]
    return sorted(whole, key=lambda item: trials.order(item[1]))


def meets(trials: Trials, target: Target, setting: ReductionConfig, quality: Quality) -> bool:
    """Return whether a setting meets the target on the images of the search."""
    if target.kind == "share":
        adaptive = method_of(setting).is_adaptive(setting)
        return quality.share <= target.value + (TOLERANCE if adaptive else 1e-9)
    if target.kind == "max_drop":
        return quality.drop is not None and quality.drop <= target.value
    speedup = trials.known_speedup(setting)
    return speedup is not None and speedup >= target.value


def choose(trials: Trials, target: Target) -> ReductionConfig | None:
    """Return the best setting that meets the target, or for a drop the cheapest one. None: no setting meets it."""
    able = [(setting, quality) for setting, quality in measured(trials) if meets(trials, target, setting, quality)]
    if not able:
        return None
    if target.kind == "max_drop":
        return min(able, key=lambda item: item[1].share)[0]
    return able[0][0]


def pareto_front(trials: Trials, most: int) -> list[ReductionConfig]:
    """List the settings that no other setting beats in both multiply-adds and quality, the mildest first.

    If there are more than `most`, those nearest to evenly spread shares are taken.
    """
    front: list[tuple[ReductionConfig, Quality]] = []
    # With equal shares the best is first, because `measured` is sorted.
    for setting, quality in sorted(measured(trials), key=lambda item: item[1].share):
        if not front or trials.order(quality) < trials.order(front[-1][1]):
            front.append((setting, quality))
    front.reverse()
    if len(front) > most:
        high, low = front[0][1].share, front[-1][1].share
        wanted = [high + (low - high) * place / (most - 1) for place in range(most)]
        nearest = {min(range(len(front)), key=lambda at: abs(front[at][1].share - share)) for share in wanted}
        front = [front[at] for at in sorted(nearest)]
    return [setting for setting, _ in front]


def what_is_reached(trials: Trials, variants: Sequence[Variant]) -> str:
    """Say in words which share is the lowest that a setting keeps, in steps of 0.01."""
    even = []
    for variant in variants:
        method = METHODS[variant.method]
        if method.at_share is not None and method.prepare is None:
            even.append(variant)
    for hundredths in range(1, 100):
        if any(even_setting(variant, trials.facts, hundredths / 100) is not None for variant in even):
            return f"the lowest share that a setting keeps of this model is {hundredths / 100:.2f}. Give that or more."
    return "what these methods keep depends on the images. Give a higher share, or try other methods too."


def _for_share(trials: Trials, variants: Sequence[Variant], share: float, seed: int, clock: Clock) -> None:
    """Search for the best setting that keeps at most a share."""
    candidates = _at(trials, variants, share)
    trials.plan(_images(trials, len(variants)) + CLIMBS * _climbing(trials) + _of_front(trials), clock.end)
    ranked = _halve(trials, candidates, subset_sizes(len(trials.dataset)), clock.begin, clock.at(0.5))
    if not ranked:
        raise ValueError(f"share={share} cannot be reached: {what_is_reached(trials, variants)}")
    best = _climb_from(trials, ranked, share, seed, clock)
    _fill_front(trials, best, clock.at(1.0))


def _for_speedup(trials: Trials, variants: Sequence[Variant], speedup: float, seed: int, clock: Clock) -> None:
    """Search for the best setting with a speed-up. Compare methods by share first, then time the best of them."""
    sizes = subset_sizes(len(trials.dataset))
    least = max(1 / speedup, LEAST_SHARE)
    candidates = _at(trials, variants, least)
    trials.plan(_images(trials, len(variants)) + CLIMBS * _climbing(trials) + _of_front(trials), clock.end)
    ranked = _halve(trials, candidates, sizes[:-1] or sizes, clock.begin, clock.at(0.3))
    shares: dict[str, float] = {}
    fitted: list[tuple[float, Candidate]] = []
    for expected, candidate in _by_expected_share(trials, ranked, speedup, least, clock.at(0.45)):
        if fitted and trials.clock > clock.at(0.6):
            break
        share = _share_at_speed(trials, candidate.variant, speedup, expected)
        found = None if share is None else _candidate(trials, candidate.variant, share)
        quality = None if found is None else trials.quality(found.setting, sizes[-1])
        if share is not None and found is not None and quality is not None:
            shares[trials.key(found.setting)] = share
            fitted.append((trials.order(quality), found))
    if not fitted:
        return
    fitted.sort(key=lambda item: item[0])
    able = [found for _, found in fitted]
    start = next((found for found in able if shape_of(found.setting, trials.facts) is not None), able[0])
    best = _climb_from(trials, able, shares[trials.key(start.setting)], seed, clock, climbs=1)
    for candidate in best[:1]:  # the climb changed where tokens are removed, which changes the time
        share = _share_at_speed(trials, candidate.variant, speedup, least)
        found = None if share is None else _candidate(trials, candidate.variant, share)
        if found is not None:
            trials.quality(found.setting, sizes[-1])
    _fill_front(trials, best, clock.at(1.0))


def _for_drop(trials: Trials, variants: Sequence[Variant], most: float, seed: int, clock: Clock) -> None:
    """Search for the cheapest setting whose drop is at most `most` points."""
    sizes = subset_sizes(len(trials.dataset))
    candidates = _at(trials, variants, FIRST_SHARE)
    forwards = _images(trials, len(variants)) + CLIMBS * _climbing(trials) + _of_front(trials)
    trials.plan(forwards + CLIMBS * 6 * len(trials.dataset), clock.end)
    ranked = _halve(trials, candidates, sizes, clock.begin, clock.at(0.35))
    lowest = _lowest_within(trials, _of_different_methods(ranked)[:3], most, 1.0, clock.at(0.45))
    if lowest is None:
        return
    share = lowest[1]
    if share < FIRST_SHARE - 0.1:  # another method may be the best at this share
        good = [candidate.variant for candidate in ranked[: max(6, len(ranked) // 3)]]
        ranked = _halve(trials, _at(trials, good, share), sizes[-2:], trials.clock, clock.at(0.5))
    best = _climb_from(trials, ranked, share, seed, clock)
    _lowest_within(trials, _of_different_methods(best)[:3], most, share, clock.at(0.95))
    _fill_front(trials, best, clock.at(1.0))


def _lowest_within(
    trials: Trials, candidates: Sequence[Candidate], most: float, highest: float, until: float
) -> tuple[Candidate, float] | None:
    """Find by bisection the candidate with the lowest share whose drop is at most `most`, and that share."""
    best: tuple[Candidate, float] | None = None
    for candidate in candidates:
        steps = round((highest - LEAST_SHARE) / STEP)
        low, high = 0, steps + 1  # `low` is within the drop, or is the highest share
        while high - low > 1 and (best is None or trials.clock <= until):
            middle = (low + high) // 2
            share = highest - middle * STEP
            found = _candidate(trials, candidate.variant, share)
            quality = None if found is None else trials.quality(found.setting, len(trials.dataset))
            if found is not None and quality is not None and quality.drop is not None and quality.drop <= most:
                low = middle
                if best is None or share < best[1]:
                    best = (found, share)
            else:
                high = middle
    return best


def _by_expected_share(
    trials: Trials, ranked: Sequence[Candidate], speedup: float, share: float, until: float
) -> list[tuple[float, Candidate]]:
    """Time candidates of one share. Return them at the share that each needs for the speed-up, and that share, the
    best first. The best method at equal multiply-adds may take the most time, and then it needs a far lower share."""
    few = subset_sizes(len(trials.dataset))[-2:][0]
    able: list[tuple[float, float, Candidate]] = []
    for candidate in _few_of_each_method(trials, ranked):
        if able and trials.clock > until:
            break
        measured = trials.speedup(candidate.setting)
        needed = 0.0 if measured is None else _next_share(share, speedup, measured)
        found = None if measured is None else _candidate(trials, candidate.variant, needed)
        quality = None if found is None else trials.quality(found.setting, few)
        if found is not None and quality is not None:
            able.append((trials.order(quality), needed, found))
    return [(needed, found) for _, needed, found in sorted(able, key=lambda item: item[0])]


def _next_share(share: float, speedup: float, measured: float) -> float:
    """Return the share that gives the speed-up, if `share` gives `measured` and time falls as the share does."""
    return min(0.98, max(0.05, share + 1 / (1.02 * speedup) - 1 / measured))


def _share_at_speed(trials: Trials, variant: Variant, speedup: float, share: float) -> float | None:
    """Find the share at which a variant has the wanted speed-up over dense, or slightly more, beginning with a share.
    None: it was not found."""
    best: float | None = None
    for _ in range(TIMINGS):
        found = _candidate(trials, variant, share)
        measured = None if found is None else trials.speedup(found.setting)
        if measured is None:
            break
        if measured >= speedup:
            best = share if best is None else max(best, share)
            if measured <= 1.04 * speedup:
                break
        share = _next_share(share, speedup, measured)
    return best


def _halve(
    trials: Trials, candidates: Iterable[Candidate], sizes: Sequence[int], begin: float, end: float
) -> list[Candidate]:
    """Measure all candidates on few images, the better quarter on more images, and so on. Returns the best first.

    The best candidate of each method and the default of each method stay to the end, because the report shows them.
    """
    ranked: list[Candidate] = []
    for round_, size in enumerate(sizes):
        until = begin + (end - begin) * (round_ + 1) / len(sizes)
        found: list[tuple[float, Candidate]] = []
        for candidate in candidates:
            if found and trials.clock > until:
                break
            quality = trials.quality(candidate.setting, size)
            if quality is not None:
                found.append((trials.order(quality), candidate))
        found.sort(key=lambda item: item[0])
        ranked = [candidate for _, candidate in found]
        best_of = _of_different_methods(ranked)
        quarter = math.ceil(len(ranked) / 4)
        # The best of each method go first. If time ends within a round, no method is lost.
        candidates = best_of + [
            candidate
            for place, candidate in enumerate(ranked)
            if candidate not in best_of and (place < quarter or candidate.variant.is_default)
        ]
    return ranked


def _climb_from(
    trials: Trials, ranked: Sequence[Candidate], share: float, seed: int, clock: Clock, climbs: int = CLIMBS
) -> list[Candidate]:
    """Climb from the best candidates whose shape can be changed, one of each method. Returns all, the best first."""
    starts: list[Candidate] = []
    for candidate in _of_different_methods(ranked):
        shape = shape_of(candidate.setting, trials.facts)
        if shape is not None and len(starts) < climbs:
            starts.append(Candidate(replace(candidate.variant, shape=shape), candidate.setting))
    reached = [
        _climb(trials, start, share, random.Random(seed), clock.at(0.5 + 0.3 * (place + 1) / len(starts)))
        for place, start in enumerate(starts)
    ]
    both = [*reached, *ranked]
    found = [(trials.quality(candidate.setting, len(trials.dataset)), candidate) for candidate in both[: climbs + 3]]
    able = [(trials.order(quality), candidate) for quality, candidate in found if quality is not None]
    return [candidate for _, candidate in sorted(able, key=lambda item: item[0])]


def _climb(trials: Trials, best: Candidate, share: float, chance: random.Random, until: float) -> Candidate:
    """Change how much a layer removes, or a setting, as long as this brings the model nearer to the dense one.

    A change is measured on few images first, and on more images if it looks good. The caller measures the end result
    on all images.
    """
    sizes = subset_sizes(len(trials.dataset))
    few, more = sizes[-3:][0], sizes[-2:][0]
    step, left, again = 0.6, MOST_MOVES, None
    while step > 0.1:
        moves = list(_moves(best.variant))
        chance.shuffle(moves)
        moves = [*([again] if again is not None else []), *moves]
        again = None
        for move in moves:
            if left == 0 or trials.clock > until:
                return best
            found = _candidate(trials, _moved(best.variant, move, step), share)
            if found is None or trials.key(found.setting) == trials.key(best.setting):
                continue
            left -= 1
            if _is_nearer(trials, found, best, few) and _is_nearer(trials, found, best, more):
                best, again = found, move
                break
        if again is None:
            step /= 2
    return best


def _is_nearer(trials: Trials, one: Candidate, other: Candidate, count: int) -> bool:
    """Return whether one candidate is nearer to the dense model than another, on the first `count` images."""
    first, second = (trials.quality(candidate.setting, count) for candidate in (one, other))
    return first is not None and second is not None and first.distance < second.distance


def _moves(variant: Variant) -> Iterator[tuple[Any, ...]]:
    """Generate the changes that a climb tries of a variant."""
    for layer, part in enumerate(variant.shape or ()):
        yield ("scale", layer, 1)
        if part > 0:
            yield ("scale", layer, -1)
            yield ("leave out", layer)
    yield from (("tilt", 1), ("tilt", -1))
    method = METHODS[variant.method]
    usual = method.config_class()
    for name, values in (method.tuned_settings or {}).items():
        for value in (getattr(usual, name), *values):
            if value != variant.settings.get(name, getattr(usual, name)):
                yield ("set", name, value)


def _moved(variant: Variant, move: tuple[Any, ...], step: float) -> Variant:
    """Return the variant after a change. `step` is the size of the change, from 0 to 1."""
    if move[0] == "set":
        return replace(variant, settings={**variant.settings, move[1]: move[2]})
    parts = list(variant.shape or ())
    if move[0] == "tilt":
        last = max(len(parts) - 1, 1)
        parts = [part * math.exp(move[1] * step * (2 * layer / last - 1)) for layer, part in enumerate(parts)]
    elif move[0] == "leave out":
        parts[move[1]] = 0.0
    elif parts[move[1]] > 0:
        parts[move[1]] *= (1 + step) ** move[2]
    else:
        parts[move[1]] = step / len(parts)
    total = sum(parts)
    return replace(variant, shape=tuple(part / total for part in parts) if total > 0 else variant.shape)


def _fill_front(trials: Trials, best: Sequence[Candidate], until: float) -> None:
    """Measure the best variant at other shares too."""
    for share in FRONT:
        found = _candidate(trials, best[0].variant, share) if best and trials.clock <= until else None
        if found is not None:
            trials.quality(found.setting, len(trials.dataset))


def _at(trials: Trials, variants: Sequence[Variant], share: float) -> Iterator[Candidate]:
    """Generate the variants at a share, each setting once. They are made one by one, as some are fitted on images."""
    seen = set()
    for variant in variants:
        candidate = _candidate(trials, variant, share)
        if candidate is not None and trials.key(candidate.setting) not in seen:
            seen.add(trials.key(candidate.setting))
            yield candidate


def _candidate(trials: Trials, variant: Variant, share: float) -> Candidate | None:
    setting = trials.setting_at(variant, share)
    return None if setting is None else Candidate(variant, setting)


def _of_different_methods(ranked: Sequence[Candidate]) -> list[Candidate]:
    """Return the first candidate of each method."""
    found: dict[str, Candidate] = {}
    for candidate in ranked:
        found.setdefault(candidate.variant.method, candidate)
    return list(found.values())


def _few_of_each_method(trials: Trials, ranked: Sequence[Candidate], methods: int = 4) -> list[Candidate]:
    """Return of each of the best methods the best candidate, and the best that reduces in at most half the layers."""
    found: list[Candidate] = []
    for name in list(dict.fromkeys(candidate.variant.method for candidate in ranked))[:methods]:
        own = [candidate for candidate in ranked if candidate.variant.method == name]
        few = [candidate for candidate in own if _layers(trials, candidate) <= trials.facts.num_hidden_layers / 2]
        found += [own[0], *(candidate for candidate in few[:1] if candidate is not own[0])]
    return found


def _layers(trials: Trials, candidate: Candidate) -> int:
    """Return how many layers reduce. All layers of an adaptive method may reduce."""
    shape = shape_of(candidate.setting, trials.facts)
    return trials.facts.num_hidden_layers if shape is None else sum(part > 0 for part in shape)


def _in_turns(variants: Sequence[Variant]) -> list[Variant]:
    """Order variants so that methods take turns. If time ends early, every method was tried."""
    of_method: dict[str, list[Variant]] = {}
    for variant in variants:
        of_method.setdefault(variant.method, []).append(variant)
    return [variant for row in zip_longest(*of_method.values()) for variant in row if variant is not None]


def _images(trials: Trials, variants: int) -> int:
    """Estimate how many forward passes of one image a halving takes."""
    total, before, left = 0, 0, variants
    for size in subset_sizes(len(trials.dataset)):
        total, before, left = total + left * (size - before), size, math.ceil(left / 4) + 6
    return total


def _climbing(trials: Trials) -> int:
    """Estimate how many forward passes of one image a climb takes."""
    sizes = subset_sizes(len(trials.dataset))
    return MOST_MOVES * (sizes[-3:][0] + sizes[-2:][0]) // 2


def _of_front(trials: Trials) -> int:
    return len(FRONT) * len(trials.dataset)
