"""The plots of docs/, drawn from the results of the benchmarks with matplotlib."""

from __future__ import annotations

from pathlib import Path

PLAIN, OURS = "plain LoRA", "DyLoRA-MoE"
RELATIVE_TIME = "time relative to one plain LoRA"
MUTED = ("#9aa5b1", "#b8a17e", "#8fae8b", "#c08a8a")
STRONG = ("#1f5fa8", "#d1622b", "#2b8a57")
SIZE, DPI = (9.5, 4.2), 110


def draw(results: dict[str, dict], folder: Path) -> list[Path]:
    """Every plot that the results have the numbers for; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for name, result in results.items():
        drawing = {"routing": _routing, "generate": _generate, "scaling": _scaling}.get(result["benchmark"])
        if drawing is not None and result["series"]:
            drawn.append(_save(drawing(result["series"]), folder / f"{name}.png"))
    return drawn


def _figure(count: int):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=SIZE, squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _routing(series: dict):
    """Bars: time relative to one plain LoRA, grouped by the number of experts."""
    figure, axes = _figure(len(series))
    for axis, (kind, found) in zip(axes, series.items(), strict=True):
        _bars(axis, found["x"], {name: line for name, line in found["lines"].items() if name != PLAIN})
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=kind, xlabel="number of experts", ylabel=RELATIVE_TIME)
    return _with_legend(figure, axes[-1])


def _bars(axis, places: list, lines: dict[str, list]) -> None:
    width = 0.8 / max(1, len(lines))
    muted, strong = iter(MUTED), iter(STRONG)
    for index, (name, values) in enumerate(lines.items()):
        shift = (index - (len(lines) - 1) / 2) * width
        at = [place + shift for place in range(len(values))]  # the last places may have no value
        axis.bar(at, values, width, label=name, color=next(strong) if name.startswith(OURS) else next(muted))
    axis.set_xticks(range(len(places)), [str(place) for place in places])


def _generate(series: dict):
    found = series["generate"]
    figure, (axis,) = _figure(1)
    names = list(found["lines"])
    colours = [STRONG[0] if name.startswith(OURS) else MUTED[0] for name in names]
    axis.barh(names, [found["lines"][name][0] for name in names], color=colours)
    axis.set(xlabel="generated tokens per second, batch of 1")
    axis.invert_yaxis()
    return figure


def _scaling(series: dict):
    """Lines: time relative to one plain LoRA, against what grows; the floors dashed."""
    figure, axes = _figure(len(series))
    for axis, found in zip(axes, series.values(), strict=True):
        strong, muted = iter(STRONG), iter(MUTED)
        for name, values in found["lines"].items():
            is_floor = name.startswith("floor")
            style = {"linestyle": "--", "color": next(muted)} if is_floor else {"marker": "o", "color": next(strong)}
            axis.plot(found["x"], values, label=name, markersize=4, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(found["x"], [str(x) for x in found["x"]])
        axis.minorticks_off()
        axis.set(xlabel=found["label"], ylim=(0.8, None))
    axes[0].set_ylabel(RELATIVE_TIME)
    return _with_legend(figure, axes[0])


def _with_legend(figure, axis):
    """One legend for all axes, below them: it hides no line."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure
