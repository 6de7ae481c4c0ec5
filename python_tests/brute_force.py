"""The definitions of one row and head in plain Python: what the twins are tested against."""

from __future__ import annotations

import math
from fractions import Fraction


def seen(position: int, query: int, num_queries: int, length: int, causal: bool) -> bool:
    return not causal or position <= length - num_queries + query


def score_row(logits, modality, query_modality, n, causal):
    """Self and cross sums of one head from its logits [O][L]."""
    length, window = len(modality), len(query_modality)
    own, other = [0.0] * length, [0.0] * length
    for i, observer in enumerate(query_modality):
        visible = [j for j in range(length) if modality[j] >= 0 and seen(j, i, window, length, causal)]
        if observer < 0 or not visible:
            continue
        total = n + sum(math.exp(logits[i][j]) for j in visible)
        for j in visible:
            target = own if modality[j] == observer else other
            target[j] += math.exp(logits[i][j]) / total
    return own, other


def pool_row(values, modality, kind, kernel):
    """Smooth the scores of a row's candidates inside runs of equal modality."""
    if kind == "none":
        return list(values)
    out = []
    after = 0 if kind == "past" else kernel // 2
    for j in range(len(values)):
        near = range(max(0, j - kernel // 2), min(len(values), j + after + 1))
        window = [values[i] for i in near if len(set(modality[min(i, j) : max(i, j) + 1])) == 1]
        out.append(sum(window) / len(window) if kind == "avg" else max(window))
    return out


def select_row(
    own, other, modality, query_modality, budget, recent, rho, combine, k_self, k_cross, pool, kernel, causal
):
    """Kept positions of one row, ascending. Scores are Fractions."""
    length, window = len(modality), len(query_modality)
    real = [j for j in range(length) if modality[j] >= 0]
    if len(real) < budget or (len(real) == budget and k_self is None):
        return real
    last = real[len(real) - recent :] if recent else []
    candidates = real[: len(real) - recent]
    kinds = [modality[j] for j in candidates]
    smooth_own = dict(
        zip(candidates, pool_row([own[j] for j in candidates], kinds, pool, kernel), strict=True)
    )
    smooth_other = dict(
        zip(candidates, pool_row([other[j] for j in candidates], kinds, pool, kernel), strict=True)
    )
    watchers = {
        j: [m for i, m in enumerate(query_modality) if m >= 0 and seen(j, i, window, length, causal)]
        for j in candidates
    }
    valid_own = [j for j in candidates if any(m == modality[j] for m in watchers[j])]
    valid_other = [j for j in candidates if any(m != modality[j] for m in watchers[j])]
    tie = {j: (own[j] + other[j], j) for j in candidates}
    list_own = sorted(valid_own, key=lambda j: (smooth_own[j], tie[j]), reverse=True)
    list_other = sorted(valid_other, key=lambda j: (smooth_other[j], tie[j]), reverse=True)
    if k_self is not None:
        first, second = set(list_own[:k_self]), set(list_other[:k_cross])
        return sorted((first & second if combine == "intersection" else first | second) | set(last))

    rho = Fraction(round(1000 * rho), 1000)
    rank_own = {j: r for r, j in enumerate(list_own, 1)}
    rank_other = {j: r for r, j in enumerate(list_other, 1)}
    if rho in (0, 1):
        lead, rest = (list_own, list_other) if rho == 0 else (list_other, list_own)
        order = lead + [j for j in rest if j not in set(lead)]
    else:
        keys = {}
        for j in set(valid_own) | set(valid_other):
            terms = [rank_own[j] / (1 - rho)] if j in rank_own else []
            terms += [rank_other[j] / rho] if j in rank_other else []
            if combine == "calibrated":
                sum_own = sum(smooth_own[i] for i in valid_own)
                sum_other = sum(smooth_other[i] for i in valid_other)
                own_term = (1 - rho) * smooth_own[j] / sum_own if j in rank_own and sum_own else 0
                keys[j] = -(
                    own_term + (rho * smooth_other[j] / sum_other if j in rank_other and sum_other else 0)
                )
            else:
                keys[j] = min(terms) if combine == "union" else max(terms)
        order = sorted(keys, key=lambda j: (-keys[j], tie[j]), reverse=True)
    order += sorted((j for j in candidates if j not in set(order)), key=lambda j: tie[j], reverse=True)
    return sorted(order[: budget - recent] + last)
