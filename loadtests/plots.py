"""Growth as plots: SVG by pygal, which is asked for only when something is drawn.

Duty: one file for each series, with units on its axes, and machine and command below. It measures nothing.
Strategy: no background, and a grey that has a contrast of more than 4 against white and against a dark page, so that
one file serves both; no script, and the same bytes for the same figures.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from loadtests.growth_figures import FIGURES, FLAT, RULE_US, Growth

MISSING = "pygal is not installed, and plots are drawn with it. Install it with `pip install pygal`."
INK = "#767676"
GUIDE = "#9a9a9a66"
COLOURS = ("#2f81f7", "#bf7b00", "#a371f7", "#2da44e")
WIDTH, HEIGHT = 760, 480
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class PygalMissingError(Exception):
    """pygal is not installed. Install it, as the text says."""


def find() -> Any:
    """Give pygal. Raises PygalMissingError."""
    try:
        pygal = import_module("pygal")
    except ImportError:
        raise PygalMissingError(MISSING) from None
    # It adds a finder of plugins to Python's imports, of a kind that Python warns of at each import from then on.
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]
    return pygal


def caption(document: Mapping[str, Any]) -> str:
    """Where and how figures came about."""
    about = document["machine"]
    where = f"{about['processor']}, {about['cores']} cores, Python {about['python']}, {about['began']}"
    return f"{where}\n{document['command']}"


def draw(growth: Growth, below: str, folder: Path) -> Path:
    """Draw a series. Gives the file."""
    chart = _chart(growth, below)
    (_draw_rules if growth.series.kind == "rules" else _draw_relative)(chart, growth)
    path = folder / f"growth-{growth.series.kind}.svg"
    path.write_text(chart.render(is_unicode=True) + "\n")
    return path


def _chart(growth: Growth, below: str) -> Any:
    pygal = find()
    style = pygal.style.Style(
        background="transparent", plot_background="transparent", opacity="1", opacity_hover="1", transition="0s",
        foreground=INK, foreground_strong=INK, foreground_subtle=INK, colors=_colours(growth), font_family="sans-serif",
        guide_stroke_color=GUIDE, major_guide_stroke_color=GUIDE, title_font_size=13,
        label_font_size=13, major_label_font_size=13, legend_font_size=13,
    )  # fmt: skip
    chart = pygal.XY(
        style=style, js=(), width=WIDTH, height=HEIGHT, legend_at_bottom=True, legend_at_bottom_columns=3,
        truncate_legend=-1, dots_size=4, stroke_style={"width": 2}, disable_xml_declaration=True, pretty_print=True,
        title=f"Processor time by {growth.series.axis}", x_title=f"{growth.series.axis}\n{below}",
    )  # fmt: skip
    chart.uuid = f"growth-{growth.series.kind}"
    chart.add_xml_filter(_without_scripts)
    return chart


def _colours(growth: Growth) -> tuple[str, ...]:
    """One for each figure, and grey for what stands beside them."""
    drawn = 1 if growth.series.kind == "rules" else len(growth.figures())
    return (*COLOURS[:drawn], INK)


def _without_scripts(root: Any) -> Any:
    for parent in list(root.iter()):
        for child in list(parent):
            if str(child.tag).rpartition("}")[2] == "script":
                parent.remove(child)
    return root


def _draw_relative(chart: Any, growth: Growth) -> None:
    """Each figure over that of the smallest point, over the size's logarithm."""
    sizes = list(growth.points)
    chart.x_labels = [{"value": math.log10(size), "label": _power(size)} for size in sizes]
    chart.y_title = f"times that at {sizes[0]:,}"
    highest = 2 * FLAT
    dots = []
    for figure in growth.figures():
        relative = growth.relative(figure)
        chart.add(FIGURES[figure], [(math.log10(size), ratio) for size, ratio in relative.items()])
        dots += [(math.log10(size), ratio) for size, ratio in growth.repetitions(figure)]
        highest = max(highest, *relative.values())
    chart.add("each repetition", [(x, y) for x, y in dots if y <= highest], stroke=False, dots_size=1.5)
    chart.y_labels = _steps(highest)
    chart.range = (0, chart.y_labels[-1])


def _draw_rules(chart: Any, growth: Growth) -> None:
    """Microseconds beyond no rules at all, and what rules may cost."""
    sizes = list(growth.points)
    chart.x_labels = [{"value": size, "label": str(size)} for size in sizes]
    chart.y_title = f"µs more than with {sizes[0]} rules"
    chart.add(FIGURES["cpu_us"], list(growth.more("cpu_us").items()))
    chart.add(f"{RULE_US:g} µs a rule", [(size, RULE_US * size) for size in sizes], show_dots=False)


def _power(size: int) -> str:
    exponent = round(math.log10(size))
    if size < 1000 or 10**exponent != size:
        return f"{size:,}"
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def _steps(highest: float) -> list[float]:
    step = 0.5 if highest <= 4 else float(math.ceil(highest / 8))
    return [step * i for i in range(math.ceil(highest / step) + 1)]
