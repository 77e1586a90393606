"""Class averages on one page of HTML: pictures, curves, counts, and settings enough to make them again."""

from __future__ import annotations

import html
import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from particle_explorer import __version__
from particle_explorer.class_sets import StoredClasses
from particle_explorer.report import curves, figures, page
from particle_explorer.session import Session

SHARED = (
    "Both halves of an average were aligned by one model: their correlation is self-consistency, an upper "
    "bound, and no resolution. Where the curve does not stand clear of that of noise, nothing is known."
)
INDEPENDENT = (
    "The halves were aligned by two models that saw no particle of the other half, and laid onto each other "
    "only afterwards: their correlation at 0.143 may be called a resolution."
)
SIDE_PX = 128


def report(session: Session, stored: StoredClasses) -> str:
    """The whole page."""
    independent = all(one["halves_independent"] for one in stored.classes)
    images = stored.images if stored.images.ndim == 3 else stored.images.mean(1)
    zoom = max(1, round(SIDE_PX / images.shape[-1]))
    words = [caption(one) for one in stored.classes]
    rows = [figures(images[i : i + 6], words[i : i + 6], zoom=zoom) for i in range(0, len(images), 6)]
    body = [f"<h1>{html.escape(session.name)}: averages {html.escape(stored.name)}</h1>"]
    body.append(f'<p class="note">{len(stored.classes)} averages, {len(stored.members)} members</p>')
    body += rows
    for key, title in (("variance", "Where members differ"), ("residual", "What is left over")):
        pictures = session.classes.pictures(stored.name, key)
        if pictures is not None:
            labels = [html.escape(str(one["label"])) for one in stored.classes]
            body.append(f"<h2>{title}</h2>")
            small = max(1, round(96 / pictures.shape[-1]))
            body += [
                figures(pictures[i : i + 8], labels[i : i + 8], zoom=small) for i in range(0, len(labels), 8)
            ]
    body += ["<h2>Quality</h2>", f"<p>{INDEPENDENT if independent else SHARED}</p>", _table(stored)]
    body += [_curves(one, images.shape[-1], stored.pixel_size_A) for one in stored.classes]
    body += ["<h2>How it was made</h2>", _how(session, stored)]
    return page(f"{session.name}: {stored.name}", "\n".join(body))


def caption(one: dict[str, Any]) -> str:
    """Label, number of members, reach of the signal, mark."""
    words = [f"<b>{html.escape(str(one['label']))}</b>", f"N {one['n']}"]
    if one.get("ssnr_radius_A") is not None:
        words.append(f"SSNR {one['ssnr_radius_A']:.3g} Å")
    if one.get("mark"):
        words.append(html.escape(str(one["mark"])))
    return "<br>".join(words)


def _table(stored: StoredClasses) -> str:
    heads = [
        "class",
        "N",
        "effective N",
        "SSNR above 1 to",
        "above noise control to",
        "resolution (independent halves)",
    ]
    heads += ["mark", "mirror resembles", "symmetry"]
    rows = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for one in stored.classes:
        symmetry, mirror = one.get("symmetry") or {}, one.get("mirror")
        cells = [
            str(one["label"]),
            str(one["n"]),
            f"{one['n_effective']:.1f}",
            _length(one.get("ssnr_radius_A")),
            _length(one.get("believable_radius_A")) if one.get("control_frc") else "not made",
            _length(one.get("resolution_A")) if one["halves_independent"] else "not known",
            str(one.get("mark", "")),
            f"{mirror['of']} ({mirror['correlation']:.2f})" if mirror else "",
            f"C{symmetry['fold']} ({symmetry['correlation']:.2f})" if symmetry.get("fold", 1) > 1 else "",
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f'<div class="panel"><table>{"".join(rows)}</table></div>'


def _length(value: Any) -> str:
    return "nowhere" if value is None or not math.isfinite(float(value)) else f"{float(value):.3g} Å"


def _curves(one: dict[str, Any], n: int, pixel_size_A: float) -> str:
    frc = np.asarray(one["frc"], float)
    known = math.isfinite(pixel_size_A)
    x = np.arange(len(frc)) / (n * (pixel_size_A if known else 1.0))
    lines: list[tuple[str, NDArray[np.float64]]] = [(str(one["frc_label"]), frc)]
    if one.get("control_frc"):
        lines.append((f"noise control, N {one['control_n']}", np.asarray(one["control_frc"], float)))
    ssnr = np.array([0.0 if value is None else float(value) for value in one["ssnr"]])
    lines.append(("SSNR / (1 + SSNR), by the variance over members", ssnr / (1 + ssnr)))
    unit = "spatial frequency, 1/Å" if known else "spatial frequency, 1/px"
    title = f"{html.escape(str(one['label']))} · N {one['n']}"
    return f'<h3>{title}</h3><div class="panel">{curves(x, lines, unit, "correlation")}</div>'


def _how(session: Session, stored: StoredClasses) -> str:
    how = dict(stored.how)
    names = [str(how[key]) for key in ("run",) if how.get(key)] + [str(name) for name in how.get("runs", [])]
    there = {run.name: run for run in session.runs()}
    runs = {name: there[name].config.model_dump(mode="json") for name in names if name in there}
    content = {
        "version": __version__,
        "source": str(session.original_source),
        "particles": session.n_particles,
        "prepared": session.info.model_dump(mode="json"),
        "runs": runs,
        "averages": how,
        "settings of the averages": stored.classes[0].get("settings"),
    }
    text = json.dumps(content, indent=1, default=str, ensure_ascii=False)
    words = [
        "<p>Members, weights and the pose that moved each back: <code>classes/"
        f"{html.escape(stored.name)}.parquet</code> in the session. All settings:</p>"
    ]
    return "".join(words) + f"<pre>{html.escape(text)}</pre>"
