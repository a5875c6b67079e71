"""The search: successive halving over growing subsets of the images, then small changes of what the best remove where.

Everything here asks `Trials`, which remembers; so it goes the same way again after it was stopped.
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


TOLERANCE = 0.015  # of the share, for methods whose cost depends on the images: others than they were fitted on
MOST_MOVES = 50  # of one climb
CLIMBS = 2
FRONT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
STEP = 0.02  # of the share, where the cheapest setting within a drop is looked for
LEAST_SHARE = 0.3  # lower ones are not tried where no share is asked for
FIRST_SHARE = 0.7  # at which methods are told apart before it is known what share a drop allows
TIMINGS = 4  # until the share is found at which a variant is as fast as wanted


class Target(NamedTuple):
    """kind: "share" of the multiply-adds at most, "speedup" at least, or "max_drop" of the accuracy at most."""

    kind: str
    value: float


class Candidate(NamedTuple):
    variant: Variant
    setting: ReductionConfig


class Clock(NamedTuple):
    """Seconds of trials: when the search began, and when it is to end."""

    begin: float
    end: float

    def at(self, part: float) -> float:
        return self.begin + part * (self.end - self.begin)


def search(trials: Trials, variants: Sequence[Variant], target: Target, seed: int, end: float) -> None:
    """Try settings until the trials' clock is at `end` or nothing is left to try; `trials` knows them all then."""
    clock = Clock(trials.clock, end)
    variants = _in_turns(variants)
    if target.kind == "share":
        _for_share(trials, variants, target.value, seed, clock)
    elif target.kind == "speedup":
        _for_speedup(trials, variants, target.value, seed, clock)
    else:
        _for_drop(trials, variants, target.value, seed, clock)


def measured(trials: Trials) -> list[tuple[ReductionConfig, Quality]]:
    """Settings that were measured on all images of the search, with what was found; the best first."""
    found = [(setting, trials.known_quality(setting)) for setting in trials.tried()]
    whole = [(setting, quality) for setting, quality in found if quality is not None]
    return sorted(whole, key=lambda item: trials.order(item[1]))


def meets(trials: Trials, target: Target, setting: ReductionConfig, quality: Quality) -> bool:
    """Whether a setting does what was asked for, on the images of the search."""
    if target.kind == "share":
        adaptive = method_of(setting).is_adaptive(setting)
        return quality.share <= target.value + (TOLERANCE if adaptive else 1e-9)
    if target.kind == "max_drop":
        return quality.drop is not None and quality.drop <= target.value
    speedup = trials.known_speedup(setting)
    return speedup is not None and speedup >= target.value


def choose(trials: Trials, target: Target) -> ReductionConfig | None:
    """The best of the settings that do what was asked for, within a drop the cheapest; None if there is none."""
    able = [(setting, quality) for setting, quality in measured(trials) if meets(trials, target, setting, quality)]
    if not able:
        return None
    if target.kind == "max_drop":
        return min(able, key=lambda item: item[1].share)[0]
    return able[0][0]


def pareto_front(trials: Trials, most: int) -> list[ReductionConfig]:
    """Settings that no other one beats in both multiply-adds and quality, the mildest first; of more than `most`
    those nearest to evenly spread shares."""
    front: list[tuple[ReductionConfig, Quality]] = []
    for setting, quality in sorted(measured(trials), key=lambda item: item[1].share):  # of equal shares the best first
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
    """The lowest share that a setting keeps, in steps of 0.01, in words."""
    even = []
    for variant in variants:
        method = METHODS[variant.method]
        if method.at_share is not None and method.prepare is None:
            even.append(variant)
    for hundredths in range(1, 100):
        if any(even_setting(variant, trials.facts, hundredths / 100) is not None for variant in even):
            return f"the least that a setting keeps of this model is {hundredths / 100:.2f}. Give that or more."
    return "what these methods keep depends on the images. Give a higher share, or let other methods be tried too."


def _for_share(trials: Trials, variants: Sequence[Variant], share: float, seed: int, clock: Clock) -> None:
    candidates = _at(trials, variants, share)
    trials.plan(_images(trials, len(variants)) + CLIMBS * _climbing(trials) + _of_front(trials), clock.end)
    ranked = _halve(trials, candidates, subset_sizes(len(trials.dataset)), clock.begin, clock.at(0.5))
    if not ranked:
        raise ValueError(f"share={share} cannot be reached: {what_is_reached(trials, variants)}")
    best = _climb_from(trials, ranked, share, seed, clock)
    _fill_front(trials, best, clock.at(1.0))


def _for_speedup(trials: Trials, variants: Sequence[Variant], speedup: float, seed: int, clock: Clock) -> None:
    """At first the share stands for the time; then the best of some methods, in all and in few layers, are timed."""
    sizes = subset_sizes(len(trials.dataset))
    least = max(1 / speedup, LEAST_SHARE)
    candidates = _at(trials, variants, least)
    trials.plan(_images(trials, len(variants)) + CLIMBS * _climbing(trials) + _of_front(trials), clock.end)
    ranked = _halve(trials, candidates, sizes[:-1] or sizes, clock.begin, clock.at(0.3))
    shares: dict[str, float] = {}
    fitted: list[tuple[float, Candidate]] = []
    for candidate in _few_of_each_method(trials, ranked):
        if fitted and trials.clock > clock.at(0.5):
            break
        share = _share_at_speed(trials, candidate.variant, speedup, least)
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
    for candidate in best[:1]:  # the climb changed where tokens are removed, and so the time
        share = _share_at_speed(trials, candidate.variant, speedup, least)
        found = None if share is None else _candidate(trials, candidate.variant, share)
        if found is not None:
            trials.quality(found.setting, sizes[-1])
    _fill_front(trials, best, clock.at(1.0))


def _for_drop(trials: Trials, variants: Sequence[Variant], most: float, seed: int, clock: Clock) -> None:
    sizes = subset_sizes(len(trials.dataset))
    candidates = _at(trials, variants, FIRST_SHARE)
    forwards = _images(trials, len(variants)) + CLIMBS * _climbing(trials) + _of_front(trials)
    trials.plan(forwards + CLIMBS * 6 * len(trials.dataset), clock.end)
    ranked = _halve(trials, candidates, sizes, clock.begin, clock.at(0.35))
    lowest = _lowest_within(trials, _of_different_methods(ranked)[:3], most, 1.0, clock.at(0.45))
    if lowest is None:
        return
    share = lowest[1]
    if share < FIRST_SHARE - 0.1:  # what is best at another share may be another method
        good = [candidate.variant for candidate in ranked[: max(6, len(ranked) // 3)]]
        ranked = _halve(trials, _at(trials, good, share), sizes[-2:], trials.clock, clock.at(0.5))
    best = _climb_from(trials, ranked, share, seed, clock)
    _lowest_within(trials, _of_different_methods(best)[:3], most, share, clock.at(0.95))
    _fill_front(trials, best, clock.at(1.0))


def _lowest_within(
    trials: Trials, candidates: Sequence[Candidate], most: float, highest: float, until: float
) -> tuple[Candidate, float] | None:
    """The variant, and the share, with the fewest multiply-adds whose drop is at most `most`."""
    best: tuple[Candidate, float] | None = None
    for candidate in candidates:
        steps = round((highest - LEAST_SHARE) / STEP)
        low, high = 0, steps + 1  # low keeps within the drop, or is the highest share
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


def _share_at_speed(trials: Trials, variant: Variant, speedup: float, share: float) -> float | None:
    """The share at which a variant is as many times faster than dense, or slightly more. None: it is not seen to be.

    The time is taken to fall as the share does: what a setting takes more than its share is what it costs to decide.
    """
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
        share = min(0.98, max(0.05, share + 1 / (1.02 * speedup) - 1 / measured))
    return best


def _halve(
    trials: Trials, candidates: Iterable[Candidate], sizes: Sequence[int], begin: float, end: float
) -> list[Candidate]:
    """Measure all on few images, the better quarter on more, and so on; the best first.

    The best of each method and each method's own setting stay to the end, to be shown beside the chosen one.
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
        # The best of each method first: where time ends within a round, none is lost.
        candidates = best_of + [
            candidate
            for place, candidate in enumerate(ranked)
            if candidate not in best_of and (place < quarter or _is_default(candidate.variant))
        ]
    return ranked


def _climb_from(
    trials: Trials, ranked: Sequence[Candidate], share: float, seed: int, clock: Clock, climbs: int = CLIMBS
) -> list[Candidate]:
    """Climb from the best candidates whose layers can take other numbers, one of each method; all, the best first."""
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
    """Change how much a layer removes, or a setting, as long as that brings the model nearer to the dense one.

    Few images say whether to look at more. All are looked at only at the end, by the caller.
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
    ours, theirs = (trials.quality(candidate.setting, count) for candidate in (one, other))
    return ours is not None and theirs is not None and ours.distance < theirs.distance


def _moves(variant: Variant) -> Iterator[tuple[Any, ...]]:
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
    """The variant after a move; `step` says how far, from 0 to 1."""
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
    """The variants at a share, each setting once; made when their turn comes, as some are fitted on images."""
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
    """The first candidate of each method."""
    found: dict[str, Candidate] = {}
    for candidate in ranked:
        found.setdefault(candidate.variant.method, candidate)
    return list(found.values())


def _few_of_each_method(trials: Trials, ranked: Sequence[Candidate], methods: int = 4) -> list[Candidate]:
    """The best candidate of each of the best methods, and the best one that reduces in at most half of the layers."""
    found: list[Candidate] = []
    for name in list(dict.fromkeys(candidate.variant.method for candidate in ranked))[:methods]:
        own = [candidate for candidate in ranked if candidate.variant.method == name]
        few = [candidate for candidate in own if _layers(trials, candidate) <= trials.facts.num_hidden_layers / 2]
        found += [own[0], *(candidate for candidate in few[:1] if candidate is not own[0])]
    return found


def _layers(trials: Trials, candidate: Candidate) -> int:
    """How many layers reduce; an adaptive method may do so in all."""
    shape = shape_of(candidate.setting, trials.facts)
    return trials.facts.num_hidden_layers if shape is None else sum(part > 0 for part in shape)


def _in_turns(variants: Sequence[Variant]) -> list[Variant]:
    """One of each method, then the next of each: where time ends early, every method was tried."""
    of_method: dict[str, list[Variant]] = {}
    for variant in variants:
        of_method.setdefault(variant.method, []).append(variant)
    return [variant for row in zip_longest(*of_method.values()) for variant in row if variant is not None]


def _is_default(variant: Variant) -> bool:
    return not variant.settings and variant.shape is None


def _images(trials: Trials, variants: int) -> int:
    """About how many forwards a halving takes."""
    total, before, left = 0, 0, variants
    for size in subset_sizes(len(trials.dataset)):
        total, before, left = total + left * (size - before), size, math.ceil(left / 4) + 6
    return total


def _climbing(trials: Trials) -> int:
    sizes = subset_sizes(len(trials.dataset))
    return MOST_MOVES * (sizes[-3:][0] + sizes[-2:][0]) // 2


def _of_front(trials: Trials) -> int:
    return len(FRONT) * len(trials.dataset)
