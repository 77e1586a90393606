"""The tile beside the gallery: the average in passing of what is selected."""

from __future__ import annotations

from qtpy.QtCore import QRectF, Qt
from qtpy.QtGui import (
    QColor,
    QFontMetricsF,
    QImage,
    QMouseEvent,
    QPainter,
    QPaintEvent,
)
from qtpy.QtWidgets import (
    QSizePolicy,
    QWidget,
)

from particle_explorer.state import Preview
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.painted import to_qimage
from particle_explorer.widgets.pictures import (
    thumbnail,
)
from particle_explorer.widgets.plot_frame import LOOKS, Look
from particle_explorer.widgets.provenance import show_provenance


class Average(QWidget):
    """The average in passing of what is selected, with the number of particles in it."""

    def __init__(self) -> None:
        super().__init__()
        self.look: Look = LOOKS["dark"]
        self.preview: Preview | None = None
        self._picture: QImage | None = None
        self.setSizePolicy(QSizePolicy.Policy.Fixed, QSizePolicy.Policy.Expanding)
        self.setFixedWidth(112)

    def show_preview(self, preview: Preview | None) -> None:
        self.preview = preview
        self._picture = None if preview is None else to_qimage(thumbnail(preview.image))
        how = "aligned by the poses of this run" if preview is None or preview.aligned else "not aligned"
        self.setToolTip(
            f"<p>A preview: a sample of the selected particles, as prepared for the model, {how}, averaged "
            "without CTF correction. It follows the lasso while it is drawn. The tab Classes averages the "
            "original images. A click says which particles, poses and settings made it.</p>"
        )
        self.update()

    def mouseReleaseEvent(self, event: QMouseEvent | None) -> None:
        if event is not None and event.button() == Qt.MouseButton.LeftButton and self.preview is not None:
            show_provenance(self.window(), "preview average", self.preview.made)

    def paintEvent(self, event: QPaintEvent | None) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
        line = QFontMetricsF(self.font()).height()
        side = max(min(self.width() - 6.0, self.height() - 2 * line - 2), 8.0)
        box = QRectF((self.width() - side) / 2, 2, side, side)
        painter.setPen(QColor(self.look.text))
        if self._picture is None or self.preview is None:
            painter.fillRect(self.rect().adjusted(0, 2, 0, -2), QColor(self.look.plot))
            flags = Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextWordWrap
            words = "Select particles: their average appears here."
            painter.drawText(QRectF(self.rect()).adjusted(6, 2, -6, -2), flags, words)
        else:
            painter.drawImage(box, self._picture)
            n, of = self.preview.n, self.preview.of
            for i, words in enumerate(("preview average", f"N {number(n)} of {number(of)}")):
                below = QRectF(0, box.bottom() + i * line, self.width(), line)
                painter.drawText(below, Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextDontClip, words)
        painter.end()
