"""Charts as inline SVG."""

from __future__ import annotations

import math

from dice_py.reporting.formatting import number


def gap_curve_svg(alphas: list[float], gaps: list[float], alpha: float | None, exact: list[bool] | None = None) -> str:
    """The falling step function of mean length gap against α, with a dot at the α in use.

    Args:
        alphas: where the steps begin, ascending.
        gaps: `gaps[i]` holds from `alphas[i]` to `alphas[i + 1]`.
        alpha: the α in use; None: no dot.
        exact: False where a gap was computed on a sample of the prompts; such steps are drawn lighter.
    """
    steps = zip(alphas, gaps, exact or [True] * len(alphas), strict=True)
    points = [(a, g, e) for a, g, e in steps if math.isfinite(a) and math.isfinite(g)]
    if len(points) < 2:
        return "<p class='note'>The gap does not change with α here: there is no curve to draw.</p>"
    # A few distant break points would flatten the curve near the α in use.
    limit = max(min(points[-1][0], 4 * alpha) if alpha else points[-1][0], 1e-12)
    points = [p for p in points if p[0] <= limit]
    width, height, left, bottom, top = 640, 260, 70, 40, 15
    low = min(0.0, *(g for _, g, _ in points))
    high = max(0.0, *(g for _, g, _ in points))
    span = (high - low) or 1.0

    def label(at: float, value: float) -> str:
        return f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>'

    def x(value: float) -> float:
        return left + value / limit * (width - left - 20)

    def y(value: float) -> float:
        return top + (high - value) / span * (height - top - bottom)

    # Consecutive steps of one kind are one path, up to where the next kind begins.
    paths = {True: "", False: ""}
    for i, (a, g, e) in enumerate(points):
        if i == 0 or points[i - 1][2] != e:
            paths[e] += f"M{x(a):.1f},{y(g):.1f}"
        end, after = points[i + 1][:2] if i + 1 < len(points) else (limit, g)
        paths[e] += f"H{x(end):.1f}V{y(after):.1f}"
    drawn = "".join(f'<path class="curve{"" if e else " sampled"}" d="{path}"/>' for e, path in paths.items() if path)
    marked = ""
    reached = [g for a, g, _ in points if alpha is not None and a <= alpha]
    if alpha is not None and reached and alpha <= limit:
        marked = f'<circle class="chosen" cx="{x(alpha):.1f}" cy="{y(reached[-1]):.1f}" r="5"/>'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="mean length gap against alpha">'
        f'<line class="axis" x1="{left}" y1="{y(0):.1f}" x2="{width - 20}" y2="{y(0):.1f}"/>'
        f'<line class="axis" x1="{left}" y1="{top}" x2="{left}" y2="{height - bottom}"/>'
        f"{drawn}{marked}"
        f"{''.join(label(y(value), value) for value in sorted({low, 0.0, high}))}"
        f'<text x="{left}" y="{height - 22}">0</text>'
        f'<text x="{width - 20}" y="{height - 22}" text-anchor="end">{number(limit)}</text>'
        f'<text x="{(width + left) / 2:.0f}" y="{height - 6}" text-anchor="middle">'
        "α (reward per unit of length)</text>"
        "</svg>"
    )
